"""Columns of activations that would spoil the rounding of the 31 beside them.

At accuracy_level 4 ONNX Runtime rounds activations to int8 in blocks with one scale each. A few
columns of a normalised hidden state are always far larger than the rest (in SmolLM2 the same
four to sixteen in every layer), and set the scale of their block. Taken out of the product and
multiplied in float they cost a product with a thin matrix and save most of the error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from rewriter.backends.onnx.quantize import loss
from rewriter.backends.onnx.quantize.grids import BLOCK, Array

#: Numbers of columns that are tried, up to one a block; the first within WITHIN of the last one's
#: error is taken.
COUNTS = (2, 4, 8, 16)
WITHIN = 1.15
#: None is taken out unless the last number lowers the error to this share.
PAYS = 0.7


def activations(
    file: Path,
    names: list[str],
    run: Callable[[loss.Caller], Any],
    states: dict[str, Any],
    last: int | None,
) -> dict[str, Array]:
    """What `run` makes the file compute, by name of a value: float32 [rows, K]. last: `variant`."""
    made = loss.variant(file, last=last)
    model = onnx.load(made, load_external_data=False)
    known = {o.name for o in model.graph.output}
    for name in names:
        if name not in known:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    onnx.save(model, made)
    caller = loss.Caller(loss.session(made)[0], states)
    made.unlink()
    caller.keep = names
    run(caller)
    return {n: v.reshape(-1, v.shape[-1]) for n, v in caller.kept.items()}


def outliers(x: Array, energy: Array) -> Array:
    """Columns of activations x [rows, K] to keep in float; energy: squared norm of each
    column of the weights [K]. Often none."""
    counts = [n for n in COUNTS if n <= x.shape[1] // BLOCK] or [1]
    ranked = _ranked(x, energy)
    plain = _error(x, energy)
    errors = {}
    for count in counts:
        rest = x.copy()
        rest[:, ranked[:count]] = 0
        errors[count] = _error(rest, energy)
    if errors[counts[-1]] > PAYS * plain:
        return np.empty(0, np.int64)
    count = next(n for n in counts if errors[n] <= WITHIN * errors[counts[-1]])
    return np.sort(ranked[:count])


def _blocks(x: Array) -> Array:
    return np.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK))).reshape(len(x), -1, BLOCK)


def _ranked(x: Array, energy: Array) -> Array:
    """Columns by how much smaller the scale of their block is without them."""
    blocks = np.abs(_blocks(x))
    largest = blocks.argmax(-1)
    two = np.partition(blocks, -2, axis=-1)[..., -2:] ** 2
    gain = (two[..., 1] - two[..., 0]) * _blocks(energy[None]).sum(-1)
    total = np.zeros(blocks.shape[1] * BLOCK)
    np.add.at(total, (largest + np.arange(blocks.shape[1]) * BLOCK).ravel(), gain.ravel())
    return np.argsort(-total[: x.shape[1]], kind="stable")


def _error(x: Array, energy: Array) -> float:
    """Root of the summed squares of what rounding x does to the product."""
    blocks = _blocks(x)
    scales = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    scales[scales == 0] = 1
    rest = (np.rint(blocks / scales) * scales - blocks).reshape(len(x), -1)[:, : x.shape[1]]
    return float(np.sqrt(((rest.astype(np.float64) ** 2).sum(0) * energy).sum()))
