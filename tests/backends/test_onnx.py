"""The ONNX export against the graph, and that a wrong lowering is caught and leaves nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rewriter
from rewriter.errors import GateError, RewriterError
from rewriter.export import BACKENDS, register_backend

pytest.importorskip("onnxruntime")

import numpy as np  # noqa: E402
import onnx_ir as ir  # noqa: E402

from rewriter.backends.onnx import check, export_onnx  # noqa: E402
from rewriter.backends.onnx.ops import attention as attention_op  # noqa: E402
from rewriter.backends.onnx.ops import causal_conv1d as conv_op  # noqa: E402
from rewriter.backends.onnx.ops import ssd as ssd_op  # noqa: E402
from rewriter.backends.onnx.registry import EXPANSIONS, StateTensor  # noqa: E402

MICROSOFT = "com.microsoft::"


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """Two layers, weights large enough that a wrong mask shows in the logits.

    The exporter folds transposes of up to 8192 elements; the embedding is larger, as real ones.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=211,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(5)
    return model


def rewritten(llama: LlamaForCausalLM, *steps: dict) -> rewriter.RewrittenModel:
    tokens = torch.randint(0, 211, (2, 48), generator=torch.Generator().manual_seed(1))
    return rewriter.rewrite(llama, rewriter.Plan(steps=list(steps)), data=tokens)


@pytest.fixture(scope="module")
def plain(llama: LlamaForCausalLM) -> rewriter.RewrittenModel:
    return rewritten(llama)


WINDOW = {"pass": "sliding_window", "window": 8, "sinks": 0, "policy": "warn"}
PLANS = {
    "window": ([WINDOW], {"GroupQueryAttention": 2}),
    "sinks": ([WINDOW | {"sinks": 3}], {}),
    "low_rank": ([{"pass": "low_rank", "rank": 16, "policy": "warn"}], {"GroupQueryAttention": 2}),
    "mamba2": (
        [{"pass": "mamba2", "layers": [1]}],
        {"GroupQueryAttention": 1, "LinearAttention": 1, "CausalConvWithState": 1},
    ),
}
MIXERS = ("GroupQueryAttention", "LinearAttention", "CausalConvWithState")
PHASES = ("prefill", "decode", "chunked")


def mixers(report: dict) -> dict[str, int]:
    found = {k.split("::")[-1]: n for k, n in report["ops"].items()}
    return {k: found[k] for k in MIXERS if k in found}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_plans_export_with_fused_operators(
    llama: LlamaForCausalLM, tmp_path: Path, name: str
) -> None:
    steps, wanted = PLANS[name]
    report = export_onnx(rewritten(llama, *steps), tmp_path / "out")
    assert mixers(report) == wanted
    assert set(report["errors"]) == {*PHASES, *(f"{p}, not optimised" for p in PHASES)}
    assert report["max_error"] < 1e-5
    assert [r for r in report["fallbacks"] if "sink" not in r] == []
    assert bool(report["fallbacks"]) == (name == "sinks")  # said, not hidden


def test_recurrent_states_are_updated_in_place(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """One buffer a state, as the formula of the state's size says, and the same answers as two."""
    from rewriter.runtime import OnnxModel

    made = rewritten(llama, {"pass": "mamba2", "fit": "none", "policy": "warn"})
    report = export_onnx(made, tmp_path / "out")
    assert len(report["states"]) == 4 and all(s["shared"] for s in report["states"])
    model = OnnxModel(tmp_path / "out", threads=1)
    random = np.random.default_rng(0)
    calls = [random.integers(0, 211, (2, n)) for n in (7, 1, 2, 5, 1)]  # below and above the kernel

    def answers() -> list[np.ndarray]:
        sequence = model.start(2, 16)
        mask = np.ones((2, 7), dtype=np.int64)
        mask[0, :3] = 0
        logits = [sequence(t, mask if i == 0 else None) for i, t in enumerate(calls)]
        assert model.about["states"][0]["shared"] == (sequence.states.bytes() == 2 * formula)
        return logits

    formula = made.report["state"]["after"]["fixed"]
    in_place = answers()
    for state in model.about["states"]:
        state["shared"] = False
    for one, two in zip(in_place, answers(), strict=True):
        assert np.array_equal(one, two)


def test_folder_is_complete_and_tied_weights_are_stored_once(
    plain: rewriter.RewrittenModel, tmp_path: Path
) -> None:
    report = rewriter.export(plain, tmp_path / "out", to="onnx")
    assert mixers(report) == {"GroupQueryAttention": 2}
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == report
    assert (tmp_path / "out" / "config.json").exists()
    import onnx

    graph = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False).graph
    large = [tuple(t.dims) for t in graph.initializer if 211 in t.dims and 64 in t.dims]
    assert len(large) == 1, large  # the embedding, which is also the head
    with pytest.raises(RewriterError, match="exists already"):
        export_onnx(plain, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_standard_operators_take_a_batch_in_chunks(
    plain: rewriter.RewrittenModel, tmp_path: Path
) -> None:
    report = export_onnx(plain, tmp_path / "out", attention="standard")
    assert {k for k in report["ops"] if k != "all"} == set()  # no domain but ONNX's own
    assert report["fallbacks"] == []
    assert report["max_error"] < 1e-5  # `chunked` ran with two rows, one of them padded


@pytest.mark.parametrize("name", ["empty", "sinks", "mamba2"])
def test_the_reference_evaluator_agrees(llama: LlamaForCausalLM, tmp_path: Path, name: str) -> None:
    """A fourth judge: ONNX's own interpreter, on the standard operators."""
    from onnx.reference import ReferenceEvaluator

    steps = {"empty": []} | {k: v[0] for k, v in PLANS.items()}
    model = rewritten(llama, *steps[name])
    report = export_onnx(model, tmp_path / "out", attention="standard")
    evaluator = ReferenceEvaluator(str(tmp_path / "out" / "model.onnx"))
    graph = model.graph
    feeder = check.Feeder(graph, graph.module)
    states = {s["input"]: StateTensor(**s) for s in report["states"]}
    with torch.no_grad():
        for run in check.sequences(graph, graph.module, feeder, batched_chunks=True):
            errors = check.errors_of(evaluator.run, run, report["outputs"], states)
            assert max(errors) < 1e-5


def _no_padding(op, mask, length):
    return _order(op, op.Expand(np.array([[1]]), op.Shape(mask)), length)


_order = attention_op.token_order
_query = EXPANSIONS["GroupedQuery"]


def _wrong_scale(node, op, memo):
    scale = node.attributes["scale"].as_float()
    node.attributes.add(ir.AttrFloat32("scale", scale * 1.1))
    return _query(node, op, memo)


@pytest.mark.parametrize("wrong", ["padding", "scale"])
def test_a_wrong_lowering_fails_and_leaves_nothing(
    plain: rewriter.RewrittenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    if wrong == "padding":
        monkeypatch.setattr(attention_op, "token_order", _no_padding)
    else:
        monkeypatch.setitem(EXPANSIONS, "GroupedQuery", _wrong_scale)
    with pytest.raises(GateError, match="differs from the graph"):
        export_onnx(plain, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_ssd_and_convolution_equal_their_references() -> None:
    """Padded prefill and one token, at sizes other than those traced."""
    from rewriter.kernels.causal_conv1d.reference import causal_conv1d
    from rewriter.kernels.ssd.reference import ssd

    def ssd_inputs(batch, length):
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, : length // 3] = 0
        r = torch.randn
        scan = r(batch, length, 4, 8), r(batch, length, 4).abs(), -r(4).abs()
        groups = r(batch, length, 2, 6), r(batch, length, 2, 6)
        return (*scan, *groups, r(4), r(batch, 4, 8, 6), mask)

    def conv_inputs(batch, length):
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, : length // 3] = 0
        r = torch.randn
        return r(batch, length, 6), r(6, 4), r(6), r(batch, 6, 3), mask

    wanted = lambda *a: causal_conv1d(*a, "silu")  # noqa: E731
    for inputs, lowering, reference in (
        (ssd_inputs, ssd_op.linear_attention, ssd),
        (ssd_inputs, ssd_op.as_matrix, ssd),
        (conv_inputs, lambda *a: conv_op.conv_with_state(*a, "silu"), wanted),
        (conv_inputs, lambda *a: conv_op.conv(*a, "silu"), wanted),
    ):
        session = _session(lowering, inputs(2, 5))
        for batch, length in ((3, 40), (2, 1)):
            args = inputs(batch, length)
            names = [i.name for i in session.get_inputs()]
            got = session.run(None, {n: a.numpy() for n, a in zip(names, args, strict=True)})
            for value, want in zip(got, reference(*args), strict=True):
                error = (torch.from_numpy(value) - want).abs().max() / want.abs().max()
                assert error < 1e-5


def _session(function, args):
    import onnxruntime

    class Module(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    batch, length = args[0].shape[:2]
    auto = torch.export.Dim.AUTO
    dynamic = tuple(
        {i: auto for i, s in enumerate(a.shape[:2]) if s == (batch, length)[i]} for a in args
    )
    with torch.no_grad():
        program = torch.export.export(Module(), args, dynamic_shapes=(dynamic,))
    model = torch.onnx.export(program, dynamo=True, opset_version=21, verbose=False).model_proto
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def test_unknown_backend_names_the_known_ones(
    plain: rewriter.RewrittenModel, tmp_path: Path
) -> None:
    with pytest.raises(RewriterError, match="onnx"):
        rewriter.export(plain, tmp_path / "out", to="tensorrt")
    assert not (tmp_path / "out").exists()


def test_a_backend_registers_itself(
    plain: rewriter.RewrittenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "echo", BACKENDS.get("onnx", export_onnx))
    register_backend("echo", lambda model, folder, **options: {"folder": str(folder), **options})
    made = rewriter.export(plain, tmp_path / "out", to="echo", depth=3)
    assert made == {"folder": str(tmp_path / "out"), "depth": 3}


def test_missing_runtime_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = check.importlib.util.find_spec
    monkeypatch.setattr(
        check.importlib.util, "find_spec", lambda n: None if n == "onnxruntime" else find(n)
    )
    with pytest.raises(RewriterError, match=r"pip install rewriter\[onnx\]"):
        check.require()


def test_importing_the_backend_needs_no_onnx() -> None:
    """Checked in a fresh interpreter: this one has imported onnxruntime already."""
    import subprocess

    code = (
        "import sys; sys.modules.update(dict.fromkeys(('onnx', 'onnxruntime', 'onnxscript')));"
        "import rewriter.backends.onnx"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
