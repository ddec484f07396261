"""SmolLM2-135M in ONNX Runtime: the empty plan and each pass alone, against the torch graph."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import rewriter

pytest.importorskip("onnxruntime")

from rewriter.backends.onnx import export_onnx  # noqa: E402

pytestmark = pytest.mark.slow

LAYERS = 30
WINDOW = {"pass": "sliding_window", "window": 40, "sinks": 4, "policy": "warn"}
LOW_RANK = {"pass": "low_rank", "keep": 0.8, "policy": "warn"}
PLANS = {
    "empty": ([], {"GroupQueryAttention": LAYERS}),
    "sliding_window": ([WINDOW], {}),  # with sinks: standard operators, said in `fallbacks`
    # In few layers: without any sinks rounding alone moves the logits of the model by 1.5e-4.
    "window_without_sinks": (
        [WINDOW | {"sinks": 0, "layers": [11, 12, 13, 14]}],
        {"GroupQueryAttention": LAYERS},
    ),
    "low_rank": ([LOW_RANK | {"layers": [3, 20]}], {"GroupQueryAttention": LAYERS}),
    "mamba2": (
        [{"pass": "mamba2", "layers": [6]}],
        {"GroupQueryAttention": LAYERS - 1, "LinearAttention": 1, "CausalConvWithState": 1},
    ),
}


@pytest.fixture(scope="module")
def captured(smollm2: Path):
    """The model and its graph: captured once for all plans."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    return model, rewriter.capture(model)


@pytest.mark.parametrize("name", PLANS)
def test_the_file_computes_what_the_graph_does(
    captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """32 tokens and 32 steps of a left-padded batch, chunks of it, optimisations off and on."""
    model, graph = captured
    module = importlib.import_module("rewriter.rewrite")  # the package names its function so
    monkeypatch.setattr(module, "capture", lambda _: copy.deepcopy(graph))
    steps, wanted = PLANS[name]
    plan = {
        "steps": steps,
        "gate": {"sequences": 1, "length": 64},
        "calibration": {"sequences": 4, "length": 128},
    }
    tokens = torch.randint(0, 49152, (4, 128), generator=torch.Generator().manual_seed(0))
    report = export_onnx(rewriter.rewrite(model, plan, data=tokens), tmp_path / "out")
    fused = {k.split("::")[1]: n for k, n in report["ops"].items() if k != "all"}
    mixers = {"GroupQueryAttention", "LinearAttention", "CausalConvWithState"}
    assert {k: n for k, n in fused.items() if k in mixers} == wanted
    for phase in ("prefill", "decode", "chunked"):
        assert report["errors"][phase] <= 1e-4
        assert report["errors"][f"{phase}, not optimised"] <= 1e-4
    assert bool(report["fallbacks"]) == (name == "sliding_window")
    assert report["bytes"] <= 1.02 * sum(t.nbytes for _, t in graph.parameters())
