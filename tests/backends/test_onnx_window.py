"""Windowed attention in ONNX: a cache of fixed size that computes what the graph does."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rewriter
from rewriter.state import State

pytest.importorskip("onnxruntime")

from rewriter.backends.onnx import check, export_onnx  # noqa: E402

WINDOW, BLOCKS = 24, 300  # a prefill of several blocks of queries


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=101,
        initializer_range=0.3,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", params=[0, 3], ids=["window", "sinks"])
def exported(request, model, tmp_path_factory):
    """The rewritten model, a session of its export, and the report."""
    step = {"pass": "sliding_window", "window": WINDOW, "sinks": request.param, "policy": "warn"}
    tokens = torch.randint(0, 101, (2, 64), generator=torch.Generator().manual_seed(1))
    made = rewriter.rewrite(model, {"steps": [step]}, data=tokens)
    folder = tmp_path_factory.mktemp("window") / "out"
    report = export_onnx(made, folder)
    return made, check.open_session(folder / "model.onnx"), report


class Session:
    """Feeds each call's states to the next."""

    def __init__(self, session, report, batch: int) -> None:
        self.session, self.report = session, report
        self.states = {
            s["input"]: np.zeros((batch, *s["shape"]), s["dtype"]) for s in report["states"]
        }

    def __call__(self, ids, mask):
        new = ids.shape[1]
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -new:]
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feed = {k: v.numpy() for k, v in feed.items()} | self.states
        out = dict(zip(self.report["outputs"], self.session.run(None, feed), strict=True))
        self.states = {s["input"]: out[s["output"]] for s in self.report["states"]}
        return torch.from_numpy(out["logits"])


@pytest.mark.parametrize(
    "lengths",
    [(BLOCKS, *[1] * 40), (7, 1, 1, 130, *[1] * 30, 60, 2), (1,) * 60],
    ids=["prefill", "chunks", "steps"],
)
def test_equals_the_graph_from_call_to_call(exported, lengths) -> None:
    """Two rows padded on the left, one more than a whole chunk; the cache never changes size."""
    made, session, report = exported
    total = sum(lengths)
    ids = torch.randint(0, 101, (3, total), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, :11] = 0
    state, onnx, seen = State(made.graph.states), Session(session, report, 3), 0
    shapes = {k: v.shape for k, v in onnx.states.items()}
    for new in lengths:
        seen += new
        part, columns = ids[:, seen - new : seen], mask[:, :seen]
        positions = (columns.cumsum(-1) - 1).clamp_min(0)[:, -new:]
        with torch.no_grad():
            want = made(
                input_ids=part,
                attention_mask=columns,
                position_ids=positions,
                past_key_values=state,
                use_cache=True,
            ).logits
        got = onnx(part, columns)
        real = columns[:, -new:].bool()
        if real.any():
            assert (got - want)[real].abs().max() <= 1e-5 * want[real].abs().max()
        assert {k: v.shape for k, v in onnx.states.items()} == shapes
    size = WINDOW + made.graph.states[0]["sinks"]
    assert set(shapes.values()) == {(3, 2, size, 8)}


def test_a_step_costs_the_same_after_many_tokens(exported) -> None:
    """32 times the context may not cost half as much again: the median of pairs, taken in turn so
    that both see the same machine."""
    _, session, report = exported
    ids = torch.randint(0, 101, (1, 3300), generator=torch.Generator().manual_seed(2))
    short, long = Session(session, report, 1), Session(session, report, 1)

    def step(onnx: Session, past: int) -> float:
        start = time.perf_counter()
        onnx(ids[:, past : past + 1], torch.ones(1, past + 1, dtype=torch.long))
        return time.perf_counter() - start

    for onnx, past in ((short, 100), (long, 3200)):
        onnx(ids[:, :past], torch.ones(1, past, dtype=torch.long))
    ratios = [step(long, 3200 + i) / step(short, 100 + i) for i in range(60)]
    assert sorted(ratios)[30] < 1.5
