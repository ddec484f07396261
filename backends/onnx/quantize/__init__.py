"""Weight-only quantisation of an exported file: 8 or 4 bits, or the grid of a GGUF source.

The file is edited after it has been found equal to the torch graph. Two questions are then asked
of the result: whether it computes what the file would with the grid's numbers as its weights
(products in float: this is exact up to rounding), and what is lost on text as it will be served,
over a long prefill and in cached decode, since ONNX Runtime also rounds activations there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.backends.onnx.quantize import loss
from rewriter.backends.onnx.quantize.gguf import Source
from rewriter.backends.onnx.quantize.grids import Array, Grid, round_to_grid
from rewriter.backends.onnx.quantize.nodes import Edited, product_inputs, quantise_nodes
from rewriter.backends.onnx.quantize.outliers import activations, outliers
from rewriter.backends.onnx.quantize.text import gguf_source, text
from rewriter.backends.onnx.write import count
from rewriter.errors import GateError, RewriterError

__all__ = ["check_weights", "quantise", "text"]

WEIGHTS = ("fp32", "int8", "int4", "source")
#: accuracy_level of MatMulNBits: activations in blocks of int8. At the others (float) each call
#: unpacks an 8-bit matrix, 230 ms in place of 9 for the products of one token of SmolLM2; in 4 bits
#: they take 12.3 ms in place of 7.7.
LEVEL = 4
#: Tokens on which outliers are looked for.
SEEN = 256
#: Largest perplexity over that of the unquantised file. 4 bits without a source lose more by
#: nature: the bound there is against breakage.
MAX_LOSS = {"int8": 1.01, "source": 1.01, "int4": 1.5}
#: Largest difference of the first output of a model that is not asked for text.
MAX_OUTPUT = 0.2


def check_weights(weights: str, source: str | Path | None, model: Any) -> Source | None:
    """What the GGUF file holds, if one is needed. Raises RewriterError for a wrong option."""
    if weights not in WEIGHTS:
        raise RewriterError(f"unknown weights '{weights}'", f"use one of: {', '.join(WEIGHTS)}")
    return Source(gguf_source(model, source)) if weights == "source" else None


def quantise(
    file: Path,
    weights: str,
    *,
    states: dict[str, Any],
    runs: list[Any],
    tokens: Callable[[], tuple[Array, str]] | None,
    tolerance: float,
    source: Source | None = None,
    max_loss: float | None = None,
    level: int = LEVEL,
) -> dict[str, Any]:
    """Replace `file` (and its external data) by its quantised form.

    Args:
        file: an exported model.onnx that computes what the graph does.
        weights: "int8", "int4" (matrices in 4 bits, embeddings and a head that is one of them in
            8) or "source": matrices that are in a GGUF file keep its grid, the others stay.
        states: of the file, by input. runs: of `check.sequences`.
        tokens: makes ids [1, L] to measure the loss on and says what they are; None: not a text
            model, the loss is then that of the first output of `runs`.
        tolerance: largest difference between the file and one with the grid's numbers.
        source: what the GGUF file holds, for "source".
        max_loss: largest perplexity over that of the unquantised file.
        level: accuracy_level.

    Returns: {weights, parameters: {kind: count}, not_quantised: [names: why], float_columns:
    {input: columns}, exact_error, loss: {prefill, decode: {perplexity_before, perplexity, ratio,
    kl}}, …} for the report.

    Raises:
        RewriterError: none of the matrices has a grid.
        GateError: a difference or a loss above its bound.
    """
    model = ir.load(file)
    columns = _outliers(model, file, states, runs, tokens)
    edited = quantise_nodes(model, _chooser(weights, source), level, columns)
    if not edited.grids:
        why = "; ".join(f"{n}: {w}" for n, w in list(edited.kept.items())[:3])
        raise RewriterError(f"no matrix could be quantised ({why})", "export with weights='fp32'")
    made = file.parent / "quantised" / file.name
    made.parent.mkdir()
    ir.save(model, made, external_data=f"{file.name}.data")
    del model
    report = _describe(edited, weights, level)
    bound = MAX_LOSS[weights] if max_loss is None else max_loss
    report["exact_error"] = _exact_error(made, file, edited, states, runs)
    report["loss"] = _loss(made, file, states, runs, tokens)
    report["max_loss"] = bound
    _judge(report, tolerance, bound)
    report["ops"] = count(ir.load(made))
    for path in made.parent.iterdir():
        os.replace(path, file.with_name(path.name))
    made.parent.rmdir()
    return report


def _outliers(
    model: ir.Model, file: Path, states: dict[str, Any], runs: list[Any], tokens: Any
) -> Callable[[str, Array], Array]:
    """Measured on the first SEEN tokens of the text, or on the first call of each of `runs`."""

    def run(caller: loss.Caller) -> None:
        if tokens is not None:
            caller.start(1)
            caller.tokens(tokens()[0][:, :SEEN], 0)
        else:
            caller.start(runs[0].real[0].shape[0])
            caller({k: v.numpy() for k, v in runs[0].inputs[0].items()})

    seen = activations(file, product_inputs(model), run, states, SEEN)
    none = np.empty(0, np.int64)
    return lambda name, energy: outliers(seen[name], energy) if name in seen else none


def _chooser(weights: str, source: Source | None) -> Callable[[str, Array, bool], Grid | str]:
    if source is not None:
        return lambda name, weight, rows: source.grid(weight)
    return lambda name, weight, rows: round_to_grid(weight, 8 if rows or weights == "int8" else 4)


def _describe(edited: Edited, weights: str, level: int) -> dict[str, Any]:
    """Counts for the report: parameters of each kind, and why matrices stay as they are."""
    kinds: Counter[str] = Counter()
    for grid in edited.grids.values():
        kinds[f"{grid.bits} bits, {grid.origin}"] += grid.rows * grid.columns
    reasons: dict[str, list[str]] = {}
    for name, why in edited.kept.items():
        reasons.setdefault(why, []).append(name)
    kept = [f"{', '.join(n[:3])}{' …' if n[3:] else ''}: {w}" for w, n in reasons.items()]
    return {
        "weights": weights,
        "block": next(iter(edited.grids.values())).block,
        "accuracy_level": level,
        "parameters": dict(kinds),
        "matrices": len(edited.grids),
        "float_columns": {n: len(c) for n, c in edited.columns.items() if len(c)},
        "not_quantised": kept,
    }


def _exact_error(
    made: Path, file: Path, edited: Edited, states: dict[str, Any], runs: list[Any]
) -> float:
    """The quantised file with products in float, against `file` with the grid's numbers."""
    numbers = {
        name: np.ascontiguousarray(grid.weights().T if name in edited.turned else grid.weights())
        for name, grid in edited.grids.items()
        if grid.origin == "rounded"  # those of a source are the same numbers
    }
    reference, held = loss.session(file, numbers)
    plain = loss.variant(made, level=0)
    exact, _ = loss.session(plain)
    plain.unlink()
    error = loss.difference(loss.Caller(exact, states), loss.Caller(reference, states), runs)
    del held
    return error


def _loss(
    made: Path,
    file: Path,
    states: dict[str, Any],
    runs: list[Any],
    tokens: Callable[[], tuple[Array, str]] | None,
) -> dict[str, Any]:
    """As it will be served: perplexity on text, or the difference of the first output."""
    if tokens is None:
        made_, wanted = (loss.Caller(loss.session(f)[0], states) for f in (made, file))
        return {"output": loss.difference(made_, wanted, runs)}
    ids, text = tokens()
    callers = []
    for path in (made, file):
        plain = loss.variant(path, last=ids.shape[1])
        callers.append(loss.Caller(loss.session(plain)[0], states))
        plain.unlink()
    return {"text": text, "length": ids.shape[1]} | loss.text_loss(*callers, ids)


def _judge(report: dict[str, Any], tolerance: float, bound: float) -> None:
    """Raises GateError."""
    if not report["exact_error"] <= tolerance:
        raise GateError(
            f"the quantised file differs by {report['exact_error']:.1e} from one with the "
            f"grid's numbers as weights (bound {tolerance:g})",
            "report this model; weights='fp32' exports it",
        )
    if not report["loss"].get("output", 0.0) <= MAX_OUTPUT:
        raise GateError(
            f"the first output differs by {report['loss']['output']:.3f} of its largest number "
            f"(bound {MAX_OUTPUT:g})",
            "export with more bits",
        )
    for phase in ("prefill", "decode"):
        found = report["loss"].get(phase)
        if found is None:
            continue
        # Two standard errors of the mean: the difference of a token has the variance 2 KL.
        error = 2 * (2 * max(found["kl"], 0.0) / found["tokens"]) ** 0.5
        if not found["ratio"] <= bound * np.exp(error):
            raise GateError(
                f"perplexity in {phase} is {found['perplexity']:.3f} in place of "
                f"{found['perplexity_before']:.3f}, {found['ratio']:.4f} times as much "
                f"(bound {bound:g}, give or take {error:.4f})",
                "export with more bits, or accept it by max_loss=…",
            )
