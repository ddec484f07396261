"""What a quantised file computes, beside the file that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from rewriter.backends.onnx.quantize.grids import Array

#: Tokens that are scored after a prefill, and one at a time after one.
LENGTH, STEPS = 2048, 128
#: Calls of each sequence that the check repeats: 8-bit products in float are slow.
CALLS = 6
#: Operators between the head's input and the logits.
HEAD = {
    "MatMul",
    "FusedMatMul",
    "Gemm",
    "MatMulNBits",
    "Reshape",
    "Mul",
    "Div",
    "Tanh",
    "Cast",
    "Add",
}


def session(file: Path, changed: dict[str, Array] | None = None) -> Any:
    """A CPU session that prints errors only; `changed`: other values of stored tensors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    changed = changed or {}
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(v) for v in changed.values()]
    if values:
        options.add_external_initializers(list(changed), values)
    made = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return made, values  # the session does not keep the values


def variant(file: Path, level: int | None = None, last: int | None = None) -> Path:
    """A second graph over the same stored tensors, beside `file`.

    level: another accuracy_level. last: logits of this many of the last columns, if the file
    gives those of the last one alone.
    """
    model = onnx.load(file, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits" and level is not None:
            next(a for a in node.attribute if a.name == "accuracy_level").i = level
    if last is not None and (cut := _last_column(model.graph)) is not None:
        name = "rewriter_scored_columns"
        model.graph.initializer.append(numpy_helper.from_array(np.array([-last]), name))
        cut.input[1] = name
    made = file.with_name(f"{file.stem}.variant{file.suffix}")
    onnx.save(model, made)
    return made


def _last_column(graph: Any) -> Any:
    """The Slice that leaves the head the last column, or None: logits are those of every column."""
    makers = {name: node for node in graph.node for name in node.output}
    node = makers.get(graph.output[0].name)
    while node is not None and node.op_type in HEAD:
        node = makers.get(node.input[0])
    return node if node is not None and node.op_type == "Slice" else None


class Caller:
    """Calls a session and feeds it its states."""

    def __init__(self, session: Any, states: dict[str, Any]) -> None:
        self.session, self.states = session, states
        self.names = [o.name for o in session.get_outputs()]
        self.inputs = {i.name for i in session.get_inputs()}
        self.held: dict[str, Array] = {}
        self.keep: list[str] = []  # other values to hold on to
        self.kept: dict[str, Array] = {}

    def start(self, batch: int) -> None:
        self.held = {n: s.start(batch).numpy() for n, s in self.states.items()}

    def __call__(self, inputs: dict[str, Array]) -> Array:
        """The first output."""
        feed = {k: v for k, v in inputs.items() if k in self.inputs} | self.held
        out = dict(zip(self.names, self.session.run(None, feed), strict=True))
        self.held = {n: out[s.output] for n, s in self.states.items()}
        self.kept = {n: out[n] for n in self.keep}
        return out[self.names[0]]

    def tokens(self, ids: Array, past: int) -> Array:
        """Logits after new tokens [1, L] of a sequence that holds `past`."""
        length = ids.shape[1]
        return self(
            {
                "input_ids": ids,
                "attention_mask": np.ones((1, past + length), np.int64),
                "position_ids": np.arange(past, past + length)[None],
                "token_type_ids": np.zeros_like(ids),
            }
        )


def difference(made: Caller, wanted: Caller, runs: list[Any]) -> float:
    """max|Δ| / max|wanted| of the first output over the first calls of each sequence."""
    worst = 0.0
    for run in runs:
        for caller in (made, wanted):
            caller.start(run.real[0].shape[0])
        for inputs, real in list(zip(run.inputs, run.real, strict=True))[:CALLS]:
            feed = {k: v.numpy() for k, v in inputs.items()}
            got, want = made(feed), wanted(feed)
            keep = real.numpy()
            if got.ndim >= 2 and got.shape[1] != keep.shape[1]:
                keep = keep[:, -got.shape[1] :]
            if got.shape[:2] == keep.shape:
                got, want = got[keep], want[keep]
            error = np.abs(got.astype(np.float64) - want).max() / np.abs(want).max()
            worst = max(worst, float(error) if error == error else float("inf"))
    return worst


def text_loss(made: Caller, wanted: Caller, ids: Array) -> dict[str, dict[str, float]]:
    """Of next tokens after a prefill of `ids` [1, L], and after its last ones one at a time.

    Returns for "prefill" and "decode": perplexity_before, perplexity, ratio, kl (nats a token).
    """
    length = ids.shape[1]
    steps = min(STEPS, length // 2)
    head = length - steps
    wanted.start(1)
    want = wanted.tokens(ids, 0)[0]
    made.start(1)
    result = {"prefill": _compare(made.tokens(ids, 0)[0], want, ids[0])}
    if made.states:
        made.start(1)
        rows = [made.tokens(ids[:, :head], 0)[0, -1:]]
        rows += [made.tokens(ids[:, at : at + 1], at)[0, -1:] for at in range(head, length)]
        result["decode"] = _compare(np.concatenate(rows), want[-steps - 1 :], ids[0])
    return result


def _compare(got: Array, want: Array, ids: Array) -> dict[str, float]:
    """Logits [N, V] at the last N tokens of `ids`; each scores the token after it."""
    next_ids = torch.from_numpy(ids[len(ids) - len(got) + 1 :])
    before = after = kl = 0.0
    for at in range(0, len(next_ids), 256):
        target = next_ids[at : at + 256, None]
        new, old = (
            torch.log_softmax(torch.from_numpy(x[at : at + len(target)]), -1) for x in (got, want)
        )
        before -= float(old.gather(1, target).double().sum())
        after -= float(new.gather(1, target).double().sum())
        kl += float((old.exp() * (old - new)).double().sum())
    count = len(next_ids)
    return {
        "tokens": count,
        "perplexity_before": float(np.exp(before / count)),
        "perplexity": float(np.exp(after / count)),
        "ratio": float(np.exp((after - before) / count)),
        "kl": kl / count,
    }
