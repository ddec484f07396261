"""The Mamba-2 mixer of the `mamba2` pass: its form, its matrix, its start and its fit."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from math import log, sqrt
from typing import Any

import torch
from torch import Tensor

import rewriter.kernels.causal_conv1d
import rewriter.kernels.ssd  # noqa: F401  both register their op
from rewriter.graph import Graph, Linear, aten
from rewriter.passes._region import Region

CONV = torch.ops.rewriter.causal_conv1d.default
SSD = torch.ops.rewriter.ssd.default
EPS = 1e-5
UNIT_GATE = 1.2785  # silu(1.2785) = 1
HALF_LIVES = {"calibrated": (1.0, 64.0), "long_decay": (8.0, 2048.0)}  # tokens


@dataclass(frozen=True)
class Mixer:
    """Tensors of one mixer by name, and what they leave open.

    in_proj.weight: [z | x | B | C | dt, D] with H d, Hk d, Hk d, H d and H rows (z only with a
    gate). conv1d.weight: [(H + 2 Hk) d, k]. A_log, dt_bias, D: [H] float32. norm.weight: [H d].
    out_proj.weight: [D, H d]. Absent where not used: in_proj.bias, norm.weight, out_proj.bias.
    """

    tensors: dict[str, Tensor]
    heads: int
    kv_heads: int
    width: int
    activation: str = "none"
    gate: bool = True
    norm: bool = True


def features(
    call: Callable[..., Any], hidden: Any, p: dict[str, Any], mixer: Mixer, mask: Any
) -> Any:
    """The input of out_proj: written once, for tensors and for nodes of a graph.

    Args:
        call: call(target, *args) runs an ATen op, or appends it to a graph.
        hidden: [B, L, D]. p: the mixer's tensors (or their nodes). mask: [B, L] or None.

    Returns:
        [B, L, H d].
    """
    H, Hk, d = mixer.heads, mixer.kv_heads, mixer.width
    dtype = mixer.tensors["in_proj.weight"].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def cut(value: Any, start: int, size: int) -> Any:
        return call(aten.slice.Tensor, value, 2, start, start + size)

    def as_heads(value: Any, start: int, heads: int) -> Any:  # [B, L, H, d]
        value = call(aten.unflatten.int, cut(value, start, heads * d), 2, [heads, d])
        # Interleaved: kv head g serves the query heads g r … g r + r - 1.
        repeat = H // heads
        return call(aten.repeat_interleave.self_int, value, repeat, 2) if repeat > 1 else value

    def to_wide(value: Any) -> Any:
        return value if dtype == wide else call(aten.to.dtype, value, wide)

    z, xbc = (H * d if mixer.gate else 0), (H + 2 * Hk) * d
    projected = call(aten.linear.default, hidden, p["in_proj.weight"], p.get("in_proj.bias"))
    mixed = call(
        CONV,
        cut(projected, z, xbc),
        p["conv1d.weight"],
        p["conv1d.bias"],
        None,
        mask,
        mixer.activation,
    )
    mixed = call(operator.getitem, mixed, 0)
    x, B, C = (as_heads(mixed, s, n) for s, n in ((0, Hk), (Hk * d, Hk), (2 * Hk * d, H)))
    dt = call(aten.add.Tensor, to_wide(cut(projected, z + xbc, H)), p["dt_bias"])
    dt = call(aten.softplus.default, dt)
    A = call(aten.neg.default, call(aten.exp.default, p["A_log"]))
    y = call(operator.getitem, call(SSD, x, dt, A, B, C, p["D"], None, mask), 0)
    y = to_wide(y)
    if mixer.gate:
        gate = call(aten.unflatten.int, cut(projected, 0, z), 2, [H, d])
        y = call(aten.mul.Tensor, y, call(aten.silu.default, to_wide(gate)))
    if mixer.norm:  # one group a head, after the gate
        square = call(aten.mean.dim, call(aten.mul.Tensor, y, y), [-1], True)
        scale = call(aten.rsqrt.default, call(aten.add.Tensor, square, EPS))
        weight = call(aten.unflatten.int, p["norm.weight"], 0, [H, d])
        y = call(aten.mul.Tensor, call(aten.mul.Tensor, y, scale), weight)
    y = y if dtype == wide else call(aten.to.dtype, y, dtype)
    return call(aten.flatten.using_ints, y, 2, 3)


def mixer_features(hidden: Tensor, mixer: Mixer, mask: Tensor | None = None) -> Tensor:
    """`features` on tensors: hidden [B, L, D] and mask [B, L] to [B, L, H d]."""
    return features(lambda f, *args: f(*args), hidden, mixer.tensors, mixer, mask)


def quadratic(
    hidden: Tensor, mixer: Mixer, mask: Tensor | None, xbc: Tensor | None = None
) -> Tensor:
    """What a mixer computes, without its scan: y_t = Σ_{s ≤ t} (C_t·B_s) exp(l_t - l_s) dt_s x_s.

    Args:
        hidden: [B, L, D]. mask: [B, S ≥ L], whose last L columns are these tokens, or None.
        xbc: [B, L, (H + 2 Hk) d], x, B and C in place of what in_proj makes.

    Returns:
        [B, L, Dout] float64: the output of out_proj.
    """
    p = {n: t.detach().double() for n, t in mixer.tensors.items()}
    (batch, length, _), (H, Hk, d) = hidden.shape, (mixer.heads, mixer.kv_heads, mixer.width)
    real = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
    real = real if mask is None else mask[:, mask.shape[1] - length :].bool()
    projected = hidden.double() @ p["in_proj.weight"].T
    if "in_proj.bias" in p:
        projected = projected + p["in_proj.bias"]
    z, x, B, C, dt = projected.split([H * d * mixer.gate, Hk * d, Hk * d, H * d, H], 2)
    mixed = torch.cat([x, B, C], 2) if xbc is None else xbc.double()
    mixed = mixed * real[..., None]
    kernel = p["conv1d.weight"]  # its last column is for the current token
    total = p["conv1d.bias"].expand(mixed.shape)
    for lag in range(min(kernel.shape[1], length)):
        shifted = torch.zeros_like(mixed)
        shifted[:, lag:] = mixed[:, : length - lag]
        total = total + kernel[:, -1 - lag] * shifted
    if mixer.activation == "silu":
        total = total * total.sigmoid()
    x, B, C = total.split([Hk * d, Hk * d, H * d], 2)
    step = torch.logaddexp(dt + p["dt_bias"], dt.new_zeros(())) * real[..., None]
    past = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
    made = []
    for h in range(H):
        group = slice(h // (H // Hk) * d, (h // (H // Hk) + 1) * d)
        own = slice(h * d, (h + 1) * d)
        decay = -p["A_log"][h].exp() * step[..., h].cumsum(1)
        decay = decay[:, :, None] - decay[:, None, :]
        matrix = (C[..., own] @ B[..., group].mT) * decay.masked_fill(~past, -torch.inf).exp()
        y = (matrix * step[:, None, :, h]) @ x[..., group] + p["D"][h] * x[..., group]
        if mixer.gate:
            y = y * z[..., own] * z[..., own].sigmoid()
        if mixer.norm:
            y = y / (y.square().mean(-1, keepdim=True) + EPS).sqrt() * p["norm.weight"][own]
        made.append(y)
    output = torch.cat(made, 2) @ p["out_proj.weight"].T
    return output + p["out_proj.bias"] if "out_proj.bias" in p else output


def initial_mixer(graph: Graph, region: Region, config: Any, random: torch.Generator) -> Mixer:
    """The mixer before any fit: copied rows, and the rest as `config.init` says."""
    a, d, H, Hk = region.attention, region.width, region.heads, region.kv_heads
    published, linear = config.init == "matvlm", config.init == "linear_attention"
    like = graph.tensor(a.query_projection.weight)  # type: ignore[union-attr]
    dim, k, channels = region.inputs, config.conv_kernel, (H + 2 * Hk) * d

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return torch.rand(*shape, generator=random) * (high - low) + low

    z, dt = torch.zeros(0 if linear else H * d, dim), torch.zeros(H, dim)
    conv, conv_bias = torch.zeros(channels, k), torch.zeros(channels)
    conv[:, -1] = 1
    if published:
        z, dt = (uniform(len(t), dim, low=-1 / sqrt(dim), high=1 / sqrt(dim)) for t in (z, dt))
        conv = uniform(channels, k, low=-1 / sqrt(k), high=1 / sqrt(k))
        conv_bias = uniform(channels, low=-1 / sqrt(k), high=1 / sqrt(k))
        decay = uniform(H, low=1, high=16)
        step = uniform(H, low=log(1e-3), high=log(1e-1)).exp().clamp_min(1e-4)
    elif linear:
        decay, step = torch.full((H,), 1e-30), torch.ones(H)  # exp(-dt A) rounds to 1
    else:  # A = -1 and dt = ln 2 / half-life: the state is a decayed mean, not a sum
        low, high = HALF_LIVES[config.init]
        decay = torch.ones(H)
        step = log(2) / torch.logspace(log(low, 2), log(high, 2), H, base=2)

    rows = ("value", "key", "query")  # become x, B, C
    copied = [region.weight(graph, n) for n in rows]
    tensors = {"in_proj.weight": torch.cat([_as(z, like), *copied, _as(dt, like)])}
    if config.bias:
        gate = torch.full((len(z),), 0.0 if published else UNIT_GATE)
        biases = [region.bias(graph, n) for n in rows]
        tensors["in_proj.bias"] = torch.cat([_as(gate, like), *biases, like.new_zeros(H)])
    tensors["conv1d.weight"] = _as(conv, like)
    tensors["conv1d.bias"] = _as(conv_bias, like)
    small = {
        "A_log": decay.log(),
        "dt_bias": step + torch.log(-torch.expm1(-step)),  # the inverse of softplus
        "D": torch.full((H,), float(published)),
    }
    tensors |= {n: t.to(like.device) for n, t in small.items()}  # float32 in every model
    if not linear:
        tensors["norm.weight"] = like.new_ones(H * d)
    output: Linear = a.output_projection  # type: ignore[assignment]
    weight = graph.tensor(output.weight)
    tensors["out_proj.weight"] = weight.t() if output.transposed else weight
    if config.bias:
        bias = output.bias
        tensors["out_proj.bias"] = (
            graph.tensor(bias) if bias is not None else like.new_zeros(region.outputs)
        )
    return Mixer(
        {n: t.detach().clone() for n, t in tensors.items()},
        H,
        Hk,
        d,
        activation="silu" if published else "none",
        gate=not linear,
        norm=not linear,
    )


def _as(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.device, like.dtype)


def state_size(mixer: Mixer) -> int:
    """Floats that decoding keeps for one sequence: matrix states and last inputs."""
    channels, kernel = mixer.tensors["conv1d.weight"].shape
    return mixer.heads * mixer.width**2 + channels * (kernel - 1)


@torch.no_grad()
def fit(
    mixer: Mixer, pairs: list[tuple[Tensor, Tensor]], ridge: float
) -> tuple[Mixer, dict[str, Any]]:
    """Ridge regression of out_proj (and bias) from the mixer's features to the true outputs.

    Args:
        pairs: for every sequence, hidden [1, T, D] and the attention's output [1, T, Dout].
        ridge: penalty in units of the mean squared feature; the bias is not penalised.

    Returns:
        The mixer, and its relative error before and after. From eight sequences on, every
        eighth is kept out of the fit and the errors are measured on those.
    """
    old, with_bias = mixer.tensors["out_proj.weight"], "out_proj.bias" in mixer.tensors
    n = old.shape[1] + with_bias
    sums = [
        [old.new_zeros(shape, dtype=torch.float64) for shape in ((n, n), (n, old.shape[0]), ())]
        for _ in ("fit", "held out")
    ]
    for i, (hidden, truth) in enumerate(pairs):
        f = mixer_features(hidden.to(old), mixer)[0].double()
        f = torch.cat([f, f.new_ones(len(f), 1)], 1) if with_bias else f
        y = truth[0].double()
        held = len(pairs) >= 8 and i % 8 == 7
        for total, term in zip(sums[held], (f.T @ f, f.T @ y, y.square().sum()), strict=True):
            total += term
    (gram, cross, _), measured = sums[0], sums[len(pairs) >= 8]

    penalty = torch.full((n,), ridge * float(gram.diagonal()[: old.shape[1]].mean()))
    if with_bias:
        penalty[-1] = 0
    system = gram + torch.diag(penalty.to(gram))
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:  # fewer tokens than features and no ridge
        new = torch.linalg.pinv(system, hermitian=True) @ cross
    else:
        new = torch.cholesky_solve(cross, factor)
    before = old.T.double()
    if with_bias:
        before = torch.cat([before, mixer.tensors["out_proj.bias"].double()[None]])
    facts = {
        "relative_error_before": _relative_error(before, measured),
        "relative_error": _relative_error(new, measured),
        "error_on": "held-out sequences" if len(pairs) >= 8 else "the fitted sequences",
    }
    tensors = dict(mixer.tensors)
    tensors["out_proj.weight"] = new[: old.shape[1]].T.to(old.dtype).contiguous()
    if with_bias:
        tensors["out_proj.bias"] = new[-1].to(old.dtype)
    return Mixer(**{**vars(mixer), "tensors": tensors}), facts


def _relative_error(weight: Tensor, sums: list[Tensor]) -> float:
    """‖F W - Y‖ / ‖Y‖ from FᵀF, FᵀY and ‖Y‖²."""
    gram, cross, total = sums
    squared = total - 2 * (weight * cross).sum() + (weight * (gram @ weight)).sum()
    return float((squared.clamp_min(0) / total).sqrt())
