"""The second factor: gathered for a few tokens, written out tile by tile on chip for many.

The basis times x is one dense product, which the vendor's library does best.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from rewriter.kernels.dense_sparse_linear import cpu
from rewriter.kernels.dense_sparse_linear.cpu import backward
from rewriter.kernels.kernel import COMPILE_OPTIONS, Compilation, kernel

__all__ = ["backward", "compilations", "forward"]

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
INTEGERS = {torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}
#: From this many tokens the product with the zeros written out is worth its operations.
MANY = 16


@kernel
def gather_rows(
    Z, INDEX, VALUE, BIAS, Y, outputs, atoms, rows, every,
    HAS_BIAS: tl.constexpr, S: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """BN outputs of one token. Z [tokens, every], every = blocks x atoms; rows of a block."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    t = tl.arange(0, BS)
    keep = (row < outputs)[:, None] & (t < S)[None, :]
    at = row[:, None] * S + t[None, :]
    index = tl.load(INDEX + at, mask=keep, other=0).to(tl.int32)
    value = tl.load(VALUE + at, mask=keep, other=0.0).to(tl.float32)
    z = tl.load(Z + token * every + (row // rows * atoms)[:, None] + index, mask=keep, other=0.0)
    y = tl.sum(z.to(tl.float32) * value, 1)
    if HAS_BIAS:
        y += tl.load(BIAS + row, mask=row < outputs, other=0.0).to(tl.float32)
    tl.store(Y + token * outputs + row, y.to(Y.dtype.element_ty), mask=row < outputs)


@kernel
def product_rows(
    Z, INDEX, VALUE, BIAS, Y, tokens, outputs, atoms, rows, every,
    HAS_BIAS: tl.constexpr, S: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM tokens and BN outputs of one block; the factor's tile [BK, BN] is made on chip."""
    tiles = tl.cdiv(rows, BN)
    block = tl.program_id(1) // tiles
    inside = tl.program_id(1) % tiles * BN + tl.arange(0, BN)
    row = block * rows + inside
    keep = inside < rows
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    z = Z + token.to(tl.int64)[:, None] * every + block * atoms
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, atoms, BK):
        atom = start + tl.arange(0, BK)
        factor = tl.zeros([BK, BN], tl.float32)
        for t in range(0, S):
            index = tl.load(INDEX + row * S + t, mask=keep, other=0).to(tl.int32)
            value = tl.load(VALUE + row * S + t, mask=keep, other=0.0).to(tl.float32)
            factor += tl.where(index[None, :] == atom[:, None], value[None, :], 0.0)
        given = (token < tokens)[:, None] & (atom < atoms)[None, :]
        values = tl.load(z + atom[None, :], mask=given, other=0.0)
        acc = tl.dot(values, factor.to(values.dtype), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(BIAS + row, mask=keep, other=0.0).to(tl.float32)[None, :]
    y = Y + token.to(tl.int64)[:, None] * outputs + row[None, :]
    tl.store(y, acc.to(Y.dtype.element_ty), mask=(token < tokens)[:, None] & keep[None, :])


def tiles(dtype: torch.dtype, coefficients: int, many: bool) -> dict[str, int]:
    """Tile and launch options of `product_rows` (many) and `gather_rows`."""
    if many:
        size = 32 if dtype == torch.float32 else 64  # larger IEEE products spill
        return {"BM": size, "BN": size, "BK": size, "num_warps": 4, "num_stages": 2}
    wide = triton.next_power_of_2(coefficients)
    return {"BN": max(16, min(128, 2048 // wide)), "BS": wide, "num_warps": 4}


def forward(
    x: Tensor,
    basis: Tensor,
    index: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    many: bool | None = None,
) -> Tensor:
    """The op on a GPU, or in the interpreter. many: which kernel, instead of by the tokens."""
    if x.dtype not in TYPES or index.dtype not in INTEGERS:
        return cpu.dense_sparse_linear(x, basis, index, value, bias)
    (blocks, atoms, columns), (outputs, s) = basis.shape, index.shape
    z = linear(x.reshape(-1, columns), basis.flatten(0, 1))
    y = x.new_empty((z.shape[0], outputs))
    offsets, rows = y if bias is None else bias.contiguous(), outputs // blocks
    many = z.shape[0] >= MANY if many is None else many
    options: dict[str, Any] = tiles(x.dtype, s, many) | {"S": s, "HAS_BIAS": bias is not None}
    tensors = (z, index.contiguous(), value.contiguous(), offsets, y)
    if many:
        grid = triton.cdiv(z.shape[0], options["BM"]), blocks * triton.cdiv(rows, options["BN"])
        sizes = (z.shape[0], outputs, atoms, rows, z.shape[1])
        product_rows[grid](*tensors, *sizes, **options)
    else:
        grid = z.shape[0], triton.cdiv(outputs, options["BN"])
        gather_rows[grid](*tensors, outputs, atoms, rows, z.shape[1], **options)
    return y.view(*x.shape[:-1], outputs)


def compilations() -> list[Compilation]:
    """Default configurations: 16 coefficients a row, byte indices."""
    made = []
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for many, item in ((False, gather_rows), (True, product_rows)):
            options = tiles(dtype, 16, many) | {"S": 16, "HAS_BIAS": True}
            launch = {k: v for k, v in options.items() if k in COMPILE_OPTIONS}
            constants = {k: v for k, v in options.items() if k not in launch}
            types = {p: f"*{name}" for p in ("Z", "VALUE", "BIAS", "Y")} | {"INDEX": "*u8"}
            aligned = (*types, "outputs", "atoms", "rows", "every")
            unit = many and dtype != torch.float32
            case = f"{'prefill' if many else 'decode'} {name}"
            made.append(Compilation(item, case, types, constants, aligned, launch, unit))
    return made
