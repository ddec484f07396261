"""`gated_rms_norm` on a GPU: one pass forward, one backward with partial sums for the weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rewriter.kernels.gated_rms_norm import reference
from rewriter.kernels.kernel import COMPILE_OPTIONS, Compilation, kernel

__all__ = ["backward", "compilations", "forward"]

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@kernel
def normalise(
    X, GATE, W, Y, tokens, channels, size, eps,
    HAS_GATE: tl.constexpr, FIRST: tl.constexpr, BM: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """grid: (tiles of tokens, groups); FIRST: the norm comes before the gate."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    g = tl.arange(0, BG)
    c = tl.program_id(1) * size + g
    inside = (row < tokens)[:, None] & (g < size)[None, :]
    where = row[:, None] * channels + c[None, :]
    u = tl.load(X + where, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(W + c, mask=g < size, other=0.0).to(tl.float32)
    if HAS_GATE:
        z = tl.load(GATE + where, mask=inside, other=0.0).to(tl.float32)
        factor = z * tl.sigmoid(z)
        if not FIRST:
            u = u * factor
    y = u * tl.rsqrt(tl.sum(u * u, 1) / size + eps)[:, None] * w[None, :]
    if HAS_GATE:
        if FIRST:
            y = y * factor
    tl.store(Y + where, y.to(Y.dtype.element_ty), mask=inside)


@kernel
def normalise_gradients(
    X, GATE, W, DY, DX, DGATE, DW, tokens, channels, size, eps,
    HAS_GATE: tl.constexpr, FIRST: tl.constexpr, BM: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """grid as `normalise`. DW: [tiles of tokens, C], a tile's sums."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    g = tl.arange(0, BG)
    c = tl.program_id(1) * size + g
    inside = (row < tokens)[:, None] & (g < size)[None, :]
    where = row[:, None] * channels + c[None, :]
    x = tl.load(X + where, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(DY + where, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(W + c, mask=g < size, other=0.0).to(tl.float32)[None, :]
    u = x
    dnorm = dy
    if HAS_GATE:
        z = tl.load(GATE + where, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(z)
        factor = z * s
        slope = s * (1 + z * (1 - s))
        if FIRST:
            dnorm = dy * factor
        else:
            u = x * factor
    scale = tl.rsqrt(tl.sum(u * u, 1) / size + eps)[:, None]
    unit = u * scale
    tl.store(DW + tl.program_id(0) * channels + c, tl.sum(dnorm * unit, 0), mask=g < size)
    dunit = dnorm * w
    du = scale * (dunit - unit * (tl.sum(dunit * unit, 1) / size)[:, None])
    if HAS_GATE:
        if FIRST:
            dgate = dy * unit * w * slope
        else:
            dgate = du * x * slope
            du = du * factor
        tl.store(DGATE + where, dgate.to(DGATE.dtype.element_ty), mask=inside)
    tl.store(DX + where, du.to(DX.dtype.element_ty), mask=inside)


def tiles(size: int) -> dict[str, Any]:
    """Constants and options for groups of `size` channels."""
    group = max(16, triton.next_power_of_2(size))
    return {
        "BM": max(1, min(16, 2048 // group)),
        "BG": group,
        "num_warps": 4 if group < 4096 else 8,
    }


def forward(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    group_size: int,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
) -> Tensor:
    """Same contract as the op."""
    if x.dtype == torch.float64:
        return reference.gated_rms_norm(x, gate, weight, group_size, eps, norm_before_gate)
    x, weight = x.contiguous(), weight.contiguous()
    y, channels = torch.empty_like(x), x.shape[-1]
    tokens, options = x.numel() // channels, tiles(group_size)
    normalise[(triton.cdiv(tokens, options["BM"]), channels // group_size)](
        x, x if gate is None else gate.contiguous(), weight, y, tokens, channels, group_size, eps,
        HAS_GATE=gate is not None, FIRST=norm_before_gate, **options,
    )  # fmt: skip
    return y


def backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    group_size: int,
    eps: float,
    norm_before_gate: bool,
) -> tuple[Tensor | None, ...]:
    """One gradient or None for each argument of the op."""
    (dy,) = grads
    assert dy is not None
    x, channels = x.contiguous(), x.shape[-1]
    dx, dgate = torch.empty_like(x), None if gate is None else torch.empty_like(x, dtype=gate.dtype)
    tokens, options = x.numel() // channels, tiles(group_size)
    parts = triton.cdiv(tokens, options["BM"])
    dw = x.new_empty(parts, channels, dtype=torch.float32)
    normalise_gradients[(parts, channels // group_size)](
        x, x if gate is None else gate.contiguous(), weight.contiguous(), dy.contiguous(),
        dx, dx if dgate is None else dgate, dw, tokens, channels, group_size, eps,
        HAS_GATE=gate is not None, FIRST=norm_before_gate, **options,
    )  # fmt: skip
    return dx, dgate, dw.sum(0).to(weight.dtype), None, None, None


def compilations() -> list[Compilation]:
    """Groups of 64 (one a head) and of 2048 channels, gate first."""
    made = []
    for name in TYPES.values():
        for size in (64, 2048):
            for item in (normalise, normalise_gradients):
                values = {"HAS_GATE": True, "FIRST": False, **tiles(size)}
                options = {n: v for n, v in values.items() if n in COMPILE_OPTIONS}
                constants = {n: v for n, v in values.items() if n not in options}
                pointers = {
                    n: "*fp32" if n == "DW" else f"*{name}"
                    for n in item.arg_names
                    if n[0].isupper() and n not in constants
                }
                signature = {**pointers, "eps": "fp32"}
                aligned = (*pointers, "channels", "size")
                case = f"{name} group {size}"
                made.append(Compilation(item, case, signature, constants, aligned, options, False))
    return made
