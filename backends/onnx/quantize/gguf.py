"""The grids that a GGUF file holds, found again in a model's weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from rewriter.backends.onnx.quantize.grids import BLOCK, Array, Grid
from rewriter.errors import RewriterError


class Source:
    """A GGUF file; its tensors in Q4_0, Q4_1 and Q8_0 are grids of ours.

    Rows are found by their numbers, not by their names: so it does not matter that llama.cpp
    permutes the rows of queries and keys, that a pass has joined or removed some, or how an
    architecture names its tensors. A row that is found equals the source's bit for bit.

    Raises RewriterError: the file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise RewriterError("reading a GGUF source needs gguf", "pip install gguf")
        import gguf

        try:
            tensors = gguf.GGUFReader(path).tensors
        except Exception as error:  # it raises whatever a broken file leads to
            raise RewriterError(f"cannot read {path}: {error}", "give a .gguf file") from error
        self.path, self.tensors = Path(path), tensors
        self.kinds: dict[str, int] = {}
        self._grids: dict[int, Grid] = {}
        self._rows: dict[int, dict[bytes, tuple[int, int]]] = {}
        for number, tensor in enumerate(tensors):
            kind = tensor.tensor_type.name
            self.kinds[kind] = self.kinds.get(kind, 0) + 1
            if kind in READERS and len(tensor.shape) == 2:
                columns = int(tensor.shape[0])
                rows = self._rows.setdefault(columns, {})
                # Two rows that are equal as numbers are equal as grids, zeros aside.
                for row, key in enumerate(_keys(gguf.dequantize(tensor.data, tensor.tensor_type))):
                    rows.setdefault(key, (number, row))

    def grid(self, weight: Array) -> Grid | str:
        """The source's own grid of weights [N, K], or why it has none."""
        known = self._rows.get(weight.shape[1], {})
        places = [known.get(key) for key in _keys(weight)]
        missing = sum(place is None for place in places)
        if missing:
            return f"{missing} of {len(places)} rows are not in the source"
        numbers = np.array(places)
        used = np.unique(numbers[:, 0])
        kinds = {self.tensors[n].tensor_type.name for n in used}
        if len(kinds) > 1:
            return f"its rows are of several kinds: {', '.join(sorted(kinds))}"
        grids = {n: self._grid(n) for n in used.tolist()}
        first = next(iter(grids.values()))
        parts: dict[str, Any] = {"quants": None, "scales": None, "minima": None}
        for name in parts:
            if getattr(first, name) is None:
                continue
            parts[name] = np.empty(
                (len(places), getattr(first, name).shape[1]), getattr(first, name).dtype
            )
            for number, grid in grids.items():
                here = numbers[:, 0] == number
                parts[name][here] = getattr(grid, name)[numbers[here, 1]]
        return Grid(first.bits, weight.shape[1], **parts, origin=kinds.pop())

    def _grid(self, number: int) -> Grid:
        if number not in self._grids:
            tensor = self.tensors[number]
            data = tensor.data.reshape(tensor.data.shape[0], -1)
            self._grids[number] = READERS[tensor.tensor_type.name](data)
        return self._grids[number]


def _keys(weight: Array) -> list[bytes]:
    """What makes a row: its numbers, -0 as 0."""
    rows = np.ascontiguousarray(weight, dtype=np.float32) + np.float32(0)
    return [row.tobytes() for row in rows]


# Block formats of ggml: 16-bit floats and integers, little-endian; low nibbles are the first half.


def _blocks(data: Array, size: int) -> Array:
    """Bytes of rows [N, …] as blocks [N, K / 32, size]."""
    return data.view(np.uint8).reshape(data.shape[0], -1, size)


def _half(blocks: Array, at: int) -> Array:
    return (
        np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0].astype(np.float32)
    )


def _nibbles(blocks: Array, at: int) -> Array:
    data = blocks[..., at : at + BLOCK // 2]
    return np.concatenate([data & 15, data >> 4], -1).reshape(blocks.shape[0], -1)


def q4_0(data: Array) -> Grid:
    """w = d (q - 8)."""
    blocks = _blocks(data, 18)
    quants = _nibbles(blocks, 2)
    return Grid(4, quants.shape[1], quants, _half(blocks, 0))


def q4_1(data: Array) -> Grid:
    """w = d q + m, said as (q - 8) d + (m + 8 d); m + 8 d is exact in float32, or zeros are 0.

    A zero point of 8 keeps the integers small, which halves what rounding activations costs.
    """
    blocks = _blocks(data, 20)
    quants, scales, minima = _nibbles(blocks, 4), _half(blocks, 0), _half(blocks, 2)
    shifted = minima + 8 * scales
    if np.array_equal(shifted.astype(np.float64) - 8 * scales.astype(np.float64), minima):
        return Grid(4, quants.shape[1], quants, scales, None, shifted)
    return Grid(4, quants.shape[1], quants, scales, np.zeros(scales.shape, np.uint8), minima)


def q8_0(data: Array) -> Grid:
    """w = d q with q from -127 to 127."""
    blocks = _blocks(data, 34)
    quants = (blocks[..., 2:].view(np.int8).astype(np.int16) + 128).astype(np.uint8)
    quants = quants.reshape(data.shape[0], -1)
    return Grid(8, quants.shape[1], quants, _half(blocks, 0))


READERS = {"Q4_0": q4_0, "Q4_1": q4_1, "Q8_0": q8_0}
