"""`causal_conv1d` on a GPU: one pass forward, two backward (pre-activation, then inputs)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rewriter.kernels.autograd import _recompute
from rewriter.kernels.causal_conv1d import reference
from rewriter.kernels.kernel import Compilation, kernel
from rewriter.kernels.linear_attention.reference import inert

__all__ = ["backward", "compilations", "forward"]

TILE = {"BT": 16, "BC": 64}
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@kernel
def _preactivation(
    X, W, BIAS, PAST, b, t, c, T, channels, xb, xt,
    HAS_BIAS: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """bias + sum_i W[:, i] u_{t-K+1+i} for a tile; u_t with t < 0 is in PAST [B, C, K-1]."""
    in_c = (c < channels)[None, :]
    z = tl.zeros([BT, BC], tl.float32)
    if HAS_BIAS:
        z += tl.load(BIAS + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(K):
        w = tl.load(W + c * K + i, mask=c < channels, other=0.0).to(tl.float32)
        z += w[None, :] * _input(X, PAST, b, t - (K - 1) + i, c, in_c, T, channels, xb, xt, K)
    return z


@kernel
def _input(X, PAST, b, at, c, in_c, T, channels, xb, xt, K: tl.constexpr):
    now = ((at >= 0) & (at < T))[:, None] & in_c
    u = tl.load(X + b * xb + at[:, None] * xt + c[None, :], mask=now, other=0.0).to(tl.float32)
    if K > 1:
        past = PAST + (b * channels + c[None, :]) * (K - 1) + at[:, None] + K - 1
        u += tl.load(past, mask=(at < 0)[:, None] & in_c, other=0.0).to(tl.float32)
    return u


@kernel
def convolve(
    X, W, BIAS, PAST, Y, T, channels, xb, xt,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """grid: (tiles of C, tiles of T, B)."""
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    z = _preactivation(X, W, BIAS, PAST, b, t, c, T, channels, xb, xt, HAS_BIAS, K, BT, BC)
    if SILU:
        z = z * tl.sigmoid(z)
    where = Y + (b * T + t[:, None]) * channels + c[None, :]
    tl.store(where, z.to(Y.dtype.element_ty), mask=(t < T)[:, None] & (c < channels)[None, :])


@kernel
def preactivation_gradient(
    X, W, BIAS, PAST, DY, DZ, DW, T, channels, xb, xt,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """grid as `convolve`. DW: [B, tiles of T, K + 1, C], a tile's sums; the last is the bias's."""
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    in_c = (c < channels)[None, :]
    inside = (t < T)[:, None] & in_c
    where = (b * T + t[:, None]) * channels + c[None, :]
    dz = tl.load(DY + where, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        z = _preactivation(X, W, BIAS, PAST, b, t, c, T, channels, xb, xt, HAS_BIAS, K, BT, BC)
        s = tl.sigmoid(z)
        dz = dz * s * (1 + z * (1 - s))
    tl.store(DZ + where, dz, mask=inside)
    sums = DW + (b * tl.num_programs(1) + tl.program_id(1)) * (K + 1) * channels + c
    for i in tl.static_range(K):
        u = _input(X, PAST, b, t - (K - 1) + i, c, in_c, T, channels, xb, xt, K)
        tl.store(sums + i * channels, tl.sum(dz * u, 0), mask=c < channels)
    tl.store(sums + K * channels, tl.sum(dz, 0), mask=c < channels)


@kernel
def input_gradient(
    DZ, W, DU, T, channels, K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """grid: (tiles of C, tiles of T + K - 1, B). DU: [B, K-1 + T, C], the past first."""
    b = tl.program_id(2).to(tl.int64)
    p = tl.program_id(1) * BT + tl.arange(0, BT)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    in_c = (c < channels)[None, :]
    du = tl.zeros([BT, BC], tl.float32)
    for i in tl.static_range(K):
        at = p - i  # u_{t-K+1+i} is at p = t + i
        dz = tl.load(DZ + (b * T + at[:, None]) * channels + c[None, :],
                     mask=((at >= 0) & (at < T))[:, None] & in_c, other=0.0)  # fmt: skip
        du += tl.load(W + c * K + i, mask=c < channels, other=0.0).to(tl.float32)[None, :] * dz
    total = T + K - 1
    where = DU + (b * total + p[:, None]) * channels + c[None, :]
    tl.store(where, du, mask=(p < total)[:, None] & in_c)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, silu: bool
    ) -> Tensor:
        x = x if x.stride(2) == 1 else x.contiguous()
        weight, past = weight.contiguous(), past.contiguous()
        ctx.save_for_backward(x, weight, bias, past)
        ctx.silu = silu
        batch, length, channels = x.shape
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        grid = (triton.cdiv(channels, TILE["BC"]), triton.cdiv(length, TILE["BT"]), batch)
        convolve[grid](
            x, weight, weight if bias is None else bias, past, y,
            length, channels, x.stride(0), x.stride(1),
            HAS_BIAS=bias is not None, SILU=silu, K=weight.shape[1], **TILE,
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, past = ctx.saved_tensors
        (batch, length, channels), k = x.shape, weight.shape[1]
        dy = dy.contiguous()
        dz = dy.new_empty(dy.shape, dtype=torch.float32)
        parts = triton.cdiv(length, TILE["BT"])
        sums = dz.new_empty(batch, parts, k + 1, channels)
        preactivation_gradient[(triton.cdiv(channels, TILE["BC"]), parts, batch)](
            x, weight, weight if bias is None else bias, past, dy, dz, sums,
            length, channels, x.stride(0), x.stride(1),
            HAS_BIAS=bias is not None, SILU=ctx.silu, K=k, **TILE,
        )  # fmt: skip
        du = dz.new_empty(batch, length + k - 1, channels)
        grid = (triton.cdiv(channels, TILE["BC"]), triton.cdiv(du.shape[1], TILE["BT"]), batch)
        input_gradient[grid](dz, weight, du, length, channels, K=k, **TILE)
        sums = sums.sum((0, 1))
        return (
            du[:, k - 1 :].to(x.dtype),
            sums[:k].T.to(weight.dtype),
            None if bias is None else sums[k].to(bias.dtype),
            du[:, : k - 1].transpose(1, 2).to(past.dtype),
            None,
        )


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """Same contract as the package's function; differentiable."""
    if x.dtype == torch.float64:
        return reference.causal_conv1d(x, weight, bias, state, mask, activation)
    (batch, length, channels), k = x.shape, weight.shape[1]
    (x,) = inert(mask, x)
    past = x.new_zeros(batch, channels, k - 1) if state is None else state.to(x.dtype)
    y = _Convolution.apply(x, weight, bias, past, activation == "silu")
    if length >= k - 1:
        last = x[:, length - k + 1 :].transpose(1, 2)
        return y, last.clone(memory_format=torch.contiguous_format)
    return y, torch.cat([past[..., length:], x.transpose(1, 2)], 2)


def backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> tuple[Tensor | None, ...]:
    """One gradient or None for each argument of the op."""
    args = [x, weight, bias, state, mask, activation]
    needed = tuple(isinstance(a, Tensor) for a in args)
    return _recompute(forward, args, needed, tuple(grads))


def compilations() -> list[Compilation]:
    """Four taps with bias and silu."""
    made = []
    for name in TYPES.values():
        for item in (convolve, preactivation_gradient, input_gradient):
            values = {"HAS_BIAS": True, "SILU": True, "K": 4, **TILE}
            constants = {n: v for n, v in values.items() if n in item.arg_names}
            pointers = {
                n: "*fp32" if n in ("DZ", "DW", "DU") else f"*{name}"
                for n in item.arg_names
                if n[0].isupper() and n != "T" and n not in constants
            }
            strides = [n for n in ("channels", "xb", "xt") if n in item.arg_names]
            aligned = (*pointers, *strides)
            made.append(Compilation(item, name, pointers, constants, aligned, matrix_unit=False))
    return made
