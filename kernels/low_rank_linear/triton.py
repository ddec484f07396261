"""Two kernels: the whole product where the thin value fits in registers, and the second half.

The thin value z = x firstᵀ is one dense product, which the vendor's library does best; what it
cannot do is to serve all siblings, with bias and the pivot form's permutation, in one launch.
For many tokens and a rank of at most 128, z never leaves the chip.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from rewriter.kernels.kernel import COMPILE_OPTIONS, Compilation, Kernel, kernel
from rewriter.kernels.low_rank_linear import cpu
from rewriter.kernels.low_rank_linear.cpu import backward

__all__ = ["backward", "compilations", "forward"]

SIBLINGS = 4
FUSED_RANK = 128
#: Below this the fused kernel has too few programs to fill a large GPU.
FUSED_TOKENS = 4096
TRITON_TYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@kernel
def _second_tile(
    Z, A, BIAS, ORDER, Y, tile, tokens, rank, width, r, m, first_rank, first_column,
    HAS_BIAS: tl.constexpr, PIVOT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM x BN of y: of the m outputs of the sibling with factor A [rows, r]."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tile * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    z = Z + row.to(tl.int64)[:, None] * rank + first_rank
    inside = (row < tokens)[:, None]
    source = column
    keep = column < m
    if PIVOT:  # output `column` is z itself, or a row of the factor
        picked = tl.load(ORDER + first_column + column, mask=keep, other=0).to(tl.int32)
        picked -= first_column
        source = picked - r
        keep = keep & (source >= 0)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, r, BK):
        at = start + k
        a = tl.load(A + source[None, :] * r + at[:, None], mask=keep[None, :] & (at < r)[:, None],
                    other=0.0)  # fmt: skip
        thin = tl.load(z + at[None, :], mask=inside & (at < r)[None, :], other=0.0)
        acc = tl.dot(thin, a, acc, input_precision="ieee")
    if PIVOT:
        pivot = (column < m) & (picked < r)
        acc += tl.load(z + picked[None, :], mask=inside & pivot[None, :], other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(BIAS + first_column + column, mask=column < m, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    y = Y + row.to(tl.int64)[:, None] * width + (first_column + column)[None, :]
    tl.store(y, acc.to(Y.dtype.element_ty), mask=inside & (column < m)[None, :])


@kernel
def second_factor(
    Z, A0, A1, A2, A3, BIAS, ORDER, Y,
    tokens, rank, width, r0, r1, r2, r3, m0, m1, m2, m3,
    SIBLINGS: tl.constexpr, HAS_BIAS: tl.constexpr, PIVOT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y from Z [tokens, rank]. The branches are written out: a pointer that was chosen at run
    time has lost its alignment, and its loads are no longer wide."""
    tile = tl.program_id(1)
    t1 = tl.cdiv(m0, BN)
    t2 = t1 + tl.cdiv(m1, BN)
    t3 = t2 + tl.cdiv(m2, BN)
    if tile < t1:
        _second_tile(Z, A0, BIAS, ORDER, Y, tile, tokens, rank, width, r0, m0, 0, 0,
                     HAS_BIAS, PIVOT, BM, BN, BK)  # fmt: skip
    if SIBLINGS > 1:
        if tile >= t1 and tile < t2:
            _second_tile(Z, A1, BIAS, ORDER, Y, tile - t1, tokens, rank, width, r1, m1, r0, m0,
                         HAS_BIAS, PIVOT, BM, BN, BK)  # fmt: skip
    if SIBLINGS > 2:
        if tile >= t2 and tile < t3:
            _second_tile(Z, A2, BIAS, ORDER, Y, tile - t2, tokens, rank, width, r2, m2,
                         r0 + r1, m0 + m1, HAS_BIAS, PIVOT, BM, BN, BK)  # fmt: skip
    if SIBLINGS > 3:
        if tile >= t3:
            _second_tile(Z, A3, BIAS, ORDER, Y, tile - t3, tokens, rank, width, r3, m3,
                         r0 + r1 + r2, m0 + m1 + m2, HAS_BIAS, PIVOT, BM, BN, BK)  # fmt: skip


@kernel
def _both_tile(
    X, B, A, BIAS, Y, tokens, columns, width, r, m, first_rank, first_column,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """All m outputs of one sibling for BM tokens; r <= BR."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = (row < tokens)[:, None]
    rank = tl.arange(0, BR)
    k = tl.arange(0, BK)
    x = X + row.to(tl.int64)[:, None] * columns
    b = B + (first_rank + rank)[None, :] * columns
    z = tl.zeros([BM, BR], tl.float32)
    for start in range(0, columns, BK):
        at = start + k
        values = tl.load(x + at[None, :], mask=inside & (at < columns)[None, :], other=0.0)
        factor = tl.load(b + at[:, None], mask=(rank < r)[None, :] & (at < columns)[:, None],
                         other=0.0)  # fmt: skip
        z = tl.dot(values, factor, z, input_precision="ieee")
    thin = z.to(X.dtype.element_ty)
    for start in range(0, m, BN):
        column = start + tl.arange(0, BN)
        a = tl.load(A + column[None, :] * r + rank[:, None],
                    mask=(column < m)[None, :] & (rank < r)[:, None], other=0.0)  # fmt: skip
        acc = tl.dot(thin, a, input_precision="ieee")
        if HAS_BIAS:
            bias = tl.load(BIAS + first_column + column, mask=column < m, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        y = Y + row.to(tl.int64)[:, None] * width + (first_column + column)[None, :]
        tl.store(y, acc.to(Y.dtype.element_ty), mask=inside & (column < m)[None, :])


@kernel
def both_factors(
    X, B, A0, A1, A2, A3, BIAS, Y,
    tokens, columns, width, r0, r1, r2, r3, m0, m1, m2, m3,
    SIBLINGS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y from X [tokens, columns] and B [ranks, columns], z in registers."""
    sibling = tl.program_id(1)
    if sibling == 0:
        _both_tile(X, B, A0, BIAS, Y, tokens, columns, width, r0, m0, 0, 0,
                   HAS_BIAS, BM, BN, BK, BR)  # fmt: skip
    if SIBLINGS > 1:
        if sibling == 1:
            _both_tile(X, B, A1, BIAS, Y, tokens, columns, width, r1, m1, r0, m0,
                       HAS_BIAS, BM, BN, BK, BR)  # fmt: skip
    if SIBLINGS > 2:
        if sibling == 2:
            _both_tile(X, B, A2, BIAS, Y, tokens, columns, width, r2, m2, r0 + r1, m0 + m1,
                       HAS_BIAS, BM, BN, BK, BR)  # fmt: skip
    if SIBLINGS > 3:
        if sibling == 3:
            _both_tile(X, B, A3, BIAS, Y, tokens, columns, width, r3, m3,
                       r0 + r1 + r2, m0 + m1 + m2, HAS_BIAS, BM, BN, BK, BR)  # fmt: skip


def tiles(dtype: torch.dtype, tokens: int) -> dict[str, int]:
    """Tile and launch options of `second_factor`."""
    if dtype == torch.float32:  # IEEE products of larger tiles spill, and compile for minutes
        return {"BM": 16 if tokens <= 16 else 32, "BN": 32, "BK": 32, "num_warps": 4}
    if tokens <= 16:
        return {"BM": 16, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3}
    return {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3}


def fused_tiles(rank: int) -> dict[str, int]:
    """Tile and launch options of `both_factors`."""
    wide = max(16, triton.next_power_of_2(rank))
    return {"BM": 64, "BN": 64, "BK": 64, "BR": wide, "num_warps": 4, "num_stages": 2}


def forward(
    x: Tensor,
    first: Tensor,
    second: list[Tensor],
    bias: Tensor | None = None,
    order: Tensor | None = None,
    fused: bool | None = None,
) -> Tensor:
    """The op on a GPU, or in the interpreter. fused: which kernel, instead of by the shapes."""
    if x.dtype not in TRITON_TYPE or len(second) > SIBLINGS:
        return cpu.low_rank_linear(x, first, second, bias, order)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    ranks = [f.shape[1] for f in second]
    pivots = [0] * len(second) if order is None else ranks
    outputs = [f.shape[0] + p for f, p in zip(second, pivots, strict=True)]
    width, empty = sum(outputs), [0] * (SIBLINGS - len(second))
    y = x.new_empty((rows.shape[0], width))
    factors = [f.contiguous() for f in second]
    factors += [factors[0]] * len(empty)
    sizes = (*ranks, *empty, *outputs, *empty)
    offsets = y if bias is None else bias.contiguous()
    if fused is None:
        fused = rows.shape[0] >= FUSED_TOKENS and x.dtype != torch.float32
        fused = fused and order is None and max(ranks) <= FUSED_RANK
    if fused:
        options = fused_tiles(max(ranks))
        both_factors[(triton.cdiv(rows.shape[0], options["BM"]), len(second))](
            rows, first.contiguous(), *factors, offsets, y, *rows.shape, width, *sizes,
            SIBLINGS=len(second), HAS_BIAS=bias is not None, **options,
        )  # fmt: skip
    else:
        options = tiles(x.dtype, rows.shape[0])
        thin = linear(rows, first)
        count = sum(triton.cdiv(m, options["BN"]) for m in outputs)
        second_factor[(triton.cdiv(rows.shape[0], options["BM"]), count)](
            thin, *factors, offsets, y if order is None else order, y,
            rows.shape[0], thin.shape[1], width, *sizes,
            SIBLINGS=len(second), HAS_BIAS=bias is not None, PIVOT=order is not None, **options,
        )  # fmt: skip
    return y.view(*x.shape[:-1], width)


def compilations() -> list[Compilation]:
    """Default configurations, by dtype: query, key and value together."""
    made = []
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        pointers = {p: f"*{name}" for p in ("Z", "A0", "A1", "A2", "A3", "BIAS", "Y")}
        for case, tokens in (("decode", 1), ("prefill", 4096)):
            for pivot in (False, True):
                made.append(
                    _compilation(
                        second_factor,
                        f"{case}{' pivot' if pivot else ''} {name}",
                        pointers | {"ORDER": "*i64"},
                        tiles(dtype, tokens) | {"HAS_BIAS": True, "PIVOT": pivot},
                        dtype,
                    )
                )
    pointers = {p: "*bf16" for p in ("X", "B", "A0", "A1", "A2", "A3", "BIAS", "Y")}
    for rank in (64, 128):
        options = fused_tiles(rank) | {"HAS_BIAS": True}
        made.append(_compilation(both_factors, f"rank {rank}", pointers, options, torch.bfloat16))
    return made


def _compilation(
    item: Kernel, case: str, pointers: dict[str, str], options: dict[str, Any], dtype: torch.dtype
) -> Compilation:
    launch = {k: v for k, v in options.items() if k in COMPILE_OPTIONS}
    constants = {k: v for k, v in options.items() if k not in launch} | {"SIBLINGS": 3}
    sizes = [n for n in item.arg_names if n not in (*pointers, *constants, "tokens")]
    # IEEE products run on the ordinary units of NVIDIA's
    return Compilation(
        item, case, pointers, constants, (*pointers, *sizes), launch, dtype != torch.float32
    )
