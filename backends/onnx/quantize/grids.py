"""Weights on a block-wise integer grid, and rounding to one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

#: Columns that share a scale. ONNX Runtime rounds activations in blocks of the same size.
BLOCK = 32
#: Shares of a block's range that rounding to 4 bits tries; the one with the least error is kept.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)


@dataclass(frozen=True)
class Grid:
    """w = (quant - zero) * scale + minimum for each block of a row.

    bits: 4 or 8. columns: K. quants: uint8 [N, K rounded up to whole blocks]; scales: float32
    [N, K / block]; zeros: uint8 [N, K / block], or None: 2^(bits - 1) everywhere; minima:
    float32 [N, K / block], or None: 0 everywhere. origin: where the grid is from.
    """

    bits: int
    columns: int
    quants: Array
    scales: Array
    zeros: Array | None = None
    minima: Array | None = None
    origin: str = "rounded"

    @property
    def rows(self) -> int:
        return int(self.quants.shape[0])

    @property
    def block(self) -> int:
        return int(self.quants.shape[1] // self.scales.shape[1])

    def weights(self) -> Array:
        """The numbers that the grid stands for, float32 [N, K]."""
        blocks = self.quants.reshape(self.rows, -1, self.block).astype(np.float32)
        zeros = 1 << (self.bits - 1) if self.zeros is None else self.zeros[..., None]
        made = (blocks - np.float32(zeros)) * self.scales[..., None]
        if self.minima is not None:
            made += self.minima[..., None]
        return made.reshape(self.rows, -1)[:, : self.columns]

    def packed(self) -> Array:
        """Quants as MatMulNBits reads them, uint8 [N, K / block, block * bits / 8]."""
        return _pack(self.quants, self.bits).reshape(self.rows, self.scales.shape[1], -1)

    def packed_zeros(self) -> Array | None:
        """Zeros as MatMulNBits reads them, uint8 [N, ceil(K / block * bits / 8)]."""
        return None if self.zeros is None else _pack(self.zeros, self.bits)


def _pack(values: Array, bits: int) -> Array:
    if bits == 8:
        return np.ascontiguousarray(values)
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    return np.ascontiguousarray(values[:, ::2] | (values[:, 1::2] << 4))


def join(grids: list[Grid]) -> Grid:
    """Grids of one kind, one under another."""
    if len(grids) == 1:
        return grids[0]
    parts = {
        name: None
        if getattr(grids[0], name) is None
        else np.concatenate([getattr(g, name) for g in grids])
        for name in ("quants", "scales", "zeros", "minima")
    }
    first = grids[0]
    return Grid(first.bits, first.columns, **parts, origin=first.origin)  # type: ignore[arg-type]


def round_to_grid(weight: Array, bits: int) -> Grid:
    """Nearest numbers of a grid for weights [N, K]: symmetric in 8 bits, with zeros in 4.

    In 4 bits the range of each block is the one of SHARES with the least squared error.
    """
    rows, columns = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -columns % BLOCK)))
    blocks = padded.reshape(rows, -1, BLOCK)
    if bits == 8:
        scales = np.abs(blocks).max(-1) / np.float32(127)
        quants = np.rint(blocks / _divisor(scales)[..., None]) + 128
        return Grid(8, columns, quants.astype(np.uint8).reshape(rows, -1), scales)
    best = None
    low = np.minimum(blocks.min(-1), 0)
    high = np.maximum(blocks.max(-1), 0)
    for share in SHARES:
        scales = (high - low) * np.float32(share / 15)
        divisor = _divisor(scales)
        zeros = np.clip(np.rint(-low * np.float32(share) / divisor), 0, 15)
        quants = np.clip(np.rint(blocks / divisor[..., None]) + zeros[..., None], 0, 15)
        error = (((quants - zeros[..., None]) * scales[..., None] - blocks) ** 2).sum(-1)
        made = [error, scales, zeros.astype(np.uint8), quants.astype(np.uint8)]
        if best is None:
            best = made
        else:
            better = error < best[0]
            best = [
                np.where(better[..., None] if new.ndim == 3 else better, new, old)
                for new, old in zip(made, best, strict=True)
            ]
    assert best is not None
    _, scales, zeros, quants = best
    return Grid(4, columns, quants.reshape(rows, -1), scales, zeros)


def _divisor(scales: Array) -> Array:
    return np.where(scales == 0, np.float32(1), scales)
