"""The Triton backend without a GPU: numbers in the interpreter, kernels compiled ahead of time."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rewriter
from rewriter.errors import GateError, RewriterError

pytest.importorskip("triton")

from triton import knobs  # noqa: E402

from rewriter.backends import triton as backend  # noqa: E402
from rewriter.backends.triton import compile as aot  # noqa: E402
from rewriter.backends.triton import decode, export, forms, launches, tune  # noqa: E402
from rewriter.kernels.kernel import CONFIGURATIONS  # noqa: E402
from rewriter.kernels.low_rank_linear import triton as low_rank  # noqa: E402


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """Two layers, weights large enough that a wrong mask shows in the logits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=211,
        tie_word_embeddings=True,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5) if weight.dim() > 1 else weight.add_(torch.randn_like(weight))
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 211, shape, generator=torch.Generator().manual_seed(1))


def rewritten(llama: LlamaForCausalLM, *steps: dict) -> rewriter.RewrittenModel:
    return rewriter.rewrite(llama, rewriter.Plan(steps=list(steps)), data=tokens(2, 48))


@pytest.fixture(scope="module")
def plain(llama: LlamaForCausalLM) -> rewriter.RewrittenModel:
    return rewritten(llama)


RANK = {"pass": "low_rank", "rank": 16, "policy": "warn"}
WINDOW = {"pass": "sliding_window", "window": 8, "sinks": 3, "policy": "warn"}
PLANS = {
    "plain": [],
    "window": [WINDOW],
    "pivot": [RANK],
    "factors": [RANK | {"form": "factors"}],
    "mamba2": [{"pass": "mamba2", "layers": [1]}],
}


@pytest.mark.parametrize("name", PLANS)
def test_kernels_equal_the_graph_and_fixed_buffers_decode_the_same(
    llama: LlamaForCausalLM, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rewritten(llama, *PLANS[name])
    made, errors = export._converted(model, check=True, tolerance=None)
    assert set(errors) == {"prefill", "decode"} and max(errors.values()) <= 1e-5

    # What a CUDA graph replays, with torch for the kernels: the interpreter was compared above.
    monkeypatch.setattr(type(made.body), "run", lambda self, *values: self.module(*values))
    monkeypatch.setattr(decode, "CAPACITY", 16)  # grows on the way
    made.fixed_decode = True
    prompt, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    for beams in (1, 2):
        options = {"max_new_tokens": 14, "do_sample": False, "num_beams": beams}
        want = model.generate(prompt, attention_mask=mask, **options)
        assert torch.equal(made.generate(prompt, attention_mask=mask, **options), want)
    assert decode.can_be_fixed(made.graph)


def test_a_decoder_holds_its_addresses_and_gives_its_state_back(
    llama: LlamaForCausalLM, plain: rewriter.RewrittenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plain.to_triton(check=False)
    monkeypatch.setattr(type(made.body), "run", lambda self, *values: self.module(*values))
    made.fixed_decode = True
    text = tokens(1, 30)
    want = plain(input_ids=text).logits
    with torch.no_grad():
        state = made(input_ids=text[:, :10], use_cache=True).past_key_values
        places = set()
        for i in range(10, 14):
            got = made(input_ids=text[:, i : i + 1], past_key_values=state)
            places.add(tuple(t.data_ptr() for m in state.mixers for t in m.tensors().values()))
            torch.testing.assert_close(got.logits[0, 0], want[0, i], rtol=1e-4, atol=1e-4)
        assert len(places) == 1 and state.mixers[0].key.shape[2] == decode.CAPACITY
        rest = made(input_ids=text[:, 14:], past_key_values=state)  # many tokens: thawed
    assert not hasattr(state.mixers[0], "decoder")
    torch.testing.assert_close(rest.logits, want[:, 14:], rtol=1e-4, atol=1e-4)


def test_siblings_are_packed(llama: LlamaForCausalLM) -> None:
    for form in ("factors", "pivot"):
        model = rewritten(llama, RANK | {"form": form})
        graph = forms.pack_low_rank(model.graph)
        nodes = [n for n in forms.dialect(graph.module) if n.target is forms.LOW_RANK]
        # query, key, value; output; gate, up; down
        assert [len(n.args[2]) for n in nodes] == [3, 1, 2, 1] * 2
        assert {n.args[4] is not None for n in nodes} == {form == "pivot"}
        names = {name for name, _ in graph.module.named_parameters()}
        assert not any(name.endswith("k_proj.low_rank.b") for name in names)
        inputs = tokens(2, 7), torch.ones(2, 7, dtype=torch.long), torch.arange(7).expand(2, 7)
        want, got = model.graph.module(*inputs)[0], graph.module(*inputs)[0]
        assert float((want - got).abs().max() / want.abs().max()) <= 1e-5


def test_an_op_without_a_form_is_named(
    plain: rewriter.RewrittenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(forms.TRITON, "attention")
    with pytest.raises(RewriterError, match=r"rewriter.attention \(at model.layers.0.self_attn"):
        rewriter.export(plain, tmp_path / "out", to="triton")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_kernel_fails_and_leaves_nothing(
    plain: rewriter.RewrittenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = forms.form_of

    def wrong(target):
        form = right(target)
        return form if form is None else lambda *args: form(*args) * 1.001

    monkeypatch.setattr(forms, "form_of", wrong)
    with pytest.raises(GateError, match="differ from the graph"):
        rewriter.export(plain, tmp_path / "out", to="triton")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def compiled() -> Iterator[list[bool]]:
    """Whether each compilation that Triton is asked for was a hit in its cache."""
    hits: list[bool] = []
    with knobs.compilation.scope(), knobs.cache.scope():
        knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        yield hits


def test_folder_holds_all_that_a_gpu_would_compile(
    llama: LlamaForCausalLM,
    tmp_path: Path,
    compiled: list[bool],
) -> None:
    model = rewritten(copy.deepcopy(llama).bfloat16(), RANK | {"targets": ["re:.*1.mlp.down_proj"]})
    report = rewriter.export(
        model, tmp_path / "out", to="triton", target=["sm_90", "gfx942"], prefill=[32]
    )
    assert report["targets"] == ["sm_90", "gfx942"] and report["max_error"] <= 2e-2
    assert report["ops"] == {"rewriter.attention": 2, "rewriter.low_rank_linear": 1}
    assert json.loads((tmp_path / "out" / "triton.json").read_text()) == report
    for target, binary in (("sm_90", "cubin"), ("gfx942", "hsaco")):
        folder = tmp_path / "out" / "kernels" / target
        index = json.loads((folder / "index.json").read_text())["kernels"]
        assert len(index) == report["kernels"][target] > 0
        for entry in index:
            assert (folder / entry["key"] / f"{entry['name']}.{binary}").stat().st_size > 0
            assert entry["shared_bytes"] <= aot.SHARED_LIMIT[target]
            assert {"source", "signature", "constants", "options"} <= set(entry)

    # The same shapes on a machine with that GPU and an empty cache: Triton finds every kernel.
    made = backend.load(tmp_path / "out")
    if launches.current_target() is None:
        assert made.stored == {"target": None, "kernels": 0, "why": "there is no GPU"}
    found = export.record(made.graph, "sm_90", [32], 1)
    knobs.cache.dir = str(tmp_path / "cache")
    assert launches.install(tmp_path / "out" / "kernels" / "sm_90")["kernels"] > 0
    compiled.clear()
    with launches.pretending(aot.TARGETS["sm_90"]):
        for launch in found:
            launches.warm(launch)
    assert compiled and all(compiled)
    configurations = json.loads((tmp_path / "out" / tune.FILE).read_text())["launches"]
    assert {row["launch"] for row in configurations} == {launch.key for launch in found}


def test_kernels_of_another_triton_are_not_used(tmp_path: Path) -> None:
    stored = {"triton": "0.1", "target": "sm_90", "kernels": [{"key": "x", "name": "y"}]}
    (tmp_path / "index.json").write_text(json.dumps(stored))
    found = launches.install(tmp_path)
    assert found["kernels"] == 0 and "compiled by triton 0.1" in found["why"]


def test_mistakes_are_named(plain: rewriter.RewrittenModel, tmp_path: Path) -> None:
    with pytest.raises(RewriterError, match="unknown target 'sm_1'.*\n.*sm_80, sm_90"):
        rewriter.export(plain, tmp_path / "out", to="triton", target="sm_1")
    with pytest.raises(RewriterError, match="has no triton.json"):
        backend.load(tmp_path)


def test_tuning_keeps_the_fastest() -> None:
    asked = []

    def bench(call):  # not called: there is no GPU
        given = call.keywords
        asked.append((given["num_warps"], given["num_stages"]))
        return abs(given["num_warps"] - 8) + given["num_stages"]

    before = dict(CONFIGURATIONS)
    x, first, second = torch.randn(3, 32), torch.randn(16, 32), [torch.randn(8, 16)]
    try:
        with tune.tuning(bench), launches.recording("sm_90") as found:
            low_rank.forward(x.bfloat16(), first.bfloat16(), [s.bfloat16() for s in second])
        (launch,) = found
        described = tune.describe([launch])
        assert asked[0] == (4, 3)
        assert described["launches"][0] == {
            "launch": launch.key,
            "options": {"num_warps": 8, "num_stages": 2},
            "tuned": True,
        }
        CONFIGURATIONS.clear()
        tune.use(described)
        assert CONFIGURATIONS[launch.key] == {"num_warps": 8, "num_stages": 2}
    finally:
        CONFIGURATIONS.clear()
        CONFIGURATIONS.update(before)


# ---- ahead of time -------------------------------------------------------------------------------

SAMPLE = ("low_rank_linear.second_factor[prefill bf16]", "low_rank_linear.both_factors[rank 128]")


@pytest.mark.parametrize("target", aot.TARGETS)
def test_kernels_compile_within_limits(target: str) -> None:
    items = aot.compilations("low_rank_linear")
    for name in SAMPLE:
        facts = aot.measure(items[name], target)
        assert facts.complaints(target, items[name].matrix_unit) == [], name


def test_the_committed_table_is_of_these_kernels_and_within_limits() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    versions = json.loads((results / "aot.versions.json").read_text())
    rows = {
        (row.pop("kernel"), row.pop("target")): aot.Facts(**row)
        for row in json.loads((results / "aot.json").read_text())
    }
    items = aot.compilations()
    stale = [n for n, item in items.items() if versions["sources"].get(n) != aot.fingerprint(item)]
    assert not stale, "run python -m benchmarks.aot"
    wanted = {(n, t) for n, item in items.items() for t in item.targets or aot.TARGETS}
    assert wanted == set(rows)
    broken = {
        (name, target): found
        for (name, target), facts in rows.items()
        if (found := facts.complaints(target, items[name].matrix_unit))
    }
    assert not broken


def test_limits_are_told() -> None:
    facts = aot.Facts(255, 80, 100_000, 25.0, False)
    assert len(facts.complaints("sm_80", True)) == 3
    assert len(facts.complaints("gfx942", True)) == 4
    assert aot.Facts(255, 64, 100_000, 1.0, True).complaints("sm_80", True) == []


def test_a_compiler_that_hangs_or_fails_is_an_error() -> None:
    import os
    import time

    assert aot.in_child(lambda: 7, 10) == 7
    with pytest.raises(RewriterError, match="longer than 0.2 s"):
        aot.in_child(lambda: time.sleep(30), 0.2)
    with pytest.raises(RewriterError, match="ZeroDivisionError"):
        aot.in_child(lambda: 1 // 0, 10)
    with pytest.raises(RewriterError, match="exit code 9"):
        aot.in_child(lambda: os._exit(9), 10)
