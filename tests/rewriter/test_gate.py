"""The gate: planted wrong rewrites are caught, right ones pass, policies do what they say."""

from __future__ import annotations

import pytest
import torch
from faults import FAULTS, HEADS, LENGTH, PASSES, WIDTH, drop_of, literal, plant, without_bias
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rewriter.capture import capture
from rewriter.errors import GateError, PlanError, VerifyError
from rewriter.graph import ATTENTION, argument
from rewriter.passes import mamba2
from rewriter.passes._mamba2_mixer import CONV, SSD, Mixer, mixer_features, quadratic
from rewriter.passes.mamba2 import Mamba2
from rewriter.passes.sliding_window import SlidingWindow
from rewriter.protocol import Pass
from rewriter.rewrite import rewrite

OPTIONS = {
    "sliding_window": {"window": 5, "sinks": 2, "layers": [0, 1]},
    "low_rank": {"rank": 6, "targets": ["re:.*layers\\.[01]\\.self_attn.q_proj"]},
    "mamba2": {"layers": [0, 1]},
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HEADS * WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        initializer_range=0.2,
    )
    made = LlamaForCausalLM(config).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return made


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 64, (8, LENGTH), generator=torch.Generator().manual_seed(1))


def run(model, ids, name, gate=None, **options):
    step = {"pass": name, **OPTIONS[name], **options}
    plan = {"steps": [step], "gate": {"sequences": 3, "length": LENGTH, **(gate or {})}}
    return rewrite(model, plan, ids)


# ---- planted faults ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "what", "fault"), FAULTS, ids=[f"{n}-{w}" for n, w, _ in FAULTS])
def test_planted_faults_are_caught(monkeypatch, model, ids, name, what, fault):
    """Without the look at the node: the numbers alone must tell."""
    monkeypatch.setattr(PASSES[name], "check", Pass.check)
    plant(monkeypatch, name, fault)
    with pytest.raises((GateError, VerifyError)):
        run(model, ids, name)


@pytest.mark.parametrize("target", [SSD, CONV])
def test_one_of_two_masks_is_checked(monkeypatch, model, ids, target):
    """At the calibrated start either mask alone hides padding: no number shows the other."""
    plant(monkeypatch, "mamba2", drop_of(target, "mask"))
    with pytest.raises(VerifyError, match="mask"):
        run(model, ids, "mamba2")


@pytest.mark.parametrize("form", ["pivot", "factors"])
def test_a_wrong_factor_is_caught_in_both_forms(monkeypatch, model, ids, form):
    plant(monkeypatch, "low_rank", without_bias)
    with pytest.raises((GateError, VerifyError)):
        run(model, ids, "low_rank", form=form)


def test_a_window_longer_than_the_text_is_checked(monkeypatch, model, ids):
    plant(monkeypatch, "sliding_window", literal("window", lambda x: x + 1))
    with pytest.raises(VerifyError, match="window is 41"):
        run(model, ids, "sliding_window", window=40)


def test_a_dropped_mask_is_caught_with_one_sequence(monkeypatch, model, ids):
    monkeypatch.setattr(SlidingWindow, "check", Pass.check)
    plant(monkeypatch, "sliding_window", literal("mask", lambda x: None))
    with pytest.raises(GateError):
        run(model, ids[:1], "sliding_window", gate={"sequences": 1})


def test_a_wrong_mixer_is_caught_whatever_its_start(monkeypatch, model, ids):
    plant(monkeypatch, "mamba2", drop_of(CONV, "mask"))
    monkeypatch.setattr(Mamba2, "check", Pass.check)
    with pytest.raises(GateError):
        run(model, ids, "mamba2", init="matvlm", fit="none")


# ---- right rewrites -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sliding_window", {}),
        ("low_rank", {"form": "pivot"}),
        ("low_rank", {"form": "factors", "weighting": "activation"}),
        ("low_rank", {"rank": None, "keep": 0.6, "targets": None}),
        ("mamba2", {}),
        ("mamba2", {"init": "matvlm"}),
        ("mamba2", {"init": "matvlm", "fit": "none", "bias": False}),
        ("mamba2", {"init": "linear_attention", "fit": "none"}),
        ("mamba2", {"init": "long_decay"}),
    ],
)
def test_right_rewrites_pass(model, ids, name, options):
    made = run(model, ids, name, **options)
    changed = [s for s in made.report["sites"] if s["facts"].get("form") != "dense"]
    assert changed and all(s["error"] > 0 for s in changed)


def test_a_window_over_everything_changes_nothing(model, ids):
    made = run(model, ids, "sliding_window", window=LENGTH, tolerance=1e-5)
    assert made.report["whole"]["kl"] < 1e-8
    torch.testing.assert_close(made(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["pivot", "factors"])
def test_full_rank_changes_nothing(model, ids, form):
    made = run(model, ids, "low_rank", rank=HEADS * WIDTH, form=form, tolerance=1e-3)
    assert made.report["whole"]["kl"] < 1e-6


def test_several_steps_on_the_same_layers(model, ids):
    steps = [
        {"pass": "sliding_window", "window": 8, "layers": [0]},
        {"pass": "mamba2", "layers": [1]},
        {"pass": "low_rank", "rank": 12, "targets": ["re:.*layers\\.[012]\\..*"]},
        {"pass": "sliding_window", "window": 5, "layers": [0]},
    ]
    made = rewrite(model, {"steps": steps, "gate": {"length": LENGTH}}, ids)
    sites = made.report["sites"]
    windows = [s for s in sites if s["pass"] == "sliding_window"]
    assert [s["facts"]["window"] for s in windows] == [5]
    assert any("mamba2.in_proj" in s["site"] for s in sites)
    assert all(0 < s["error"] < 10 for s in sites)


def test_two_mixers_on_one_layer_are_a_mistake_in_the_plan(model, ids):
    steps = [
        {"pass": "sliding_window", "window": 5, "layers": [1]},
        {"pass": "mamba2", "layers": [1]},
    ]
    with pytest.raises(PlanError, match="sliding_window made at model.layers.1.self_attn"):
        rewrite(model, {"steps": steps, "gate": {"length": LENGTH}}, ids)


def test_a_fault_in_a_later_step_is_caught(monkeypatch, model, ids):
    monkeypatch.setattr(SlidingWindow, "check", Pass.check)
    plant(monkeypatch, "sliding_window", literal("window", lambda x: x + 1))
    steps = [
        {"pass": "low_rank", "rank": 12, "targets": ["re:.*layers\\.1\\..*"]},
        {"pass": "sliding_window", "window": 5, "layers": [1]},
    ]
    with pytest.raises(GateError, match="promises"):
        rewrite(model, {"steps": steps, "gate": {"length": LENGTH}}, ids)


def test_the_matrix_form_is_the_scan(model):
    torch.manual_seed(0)
    H, Hk, d, D, k = 4, 2, 3, 10, 4
    rows = 2 * H * d + 2 * Hk * d + H
    tensors = {
        "in_proj.weight": torch.randn(rows, D),
        "in_proj.bias": torch.randn(rows),
        "conv1d.weight": torch.randn((H + 2 * Hk) * d, k),
        "conv1d.bias": torch.randn((H + 2 * Hk) * d),
        "A_log": torch.randn(H),
        "dt_bias": torch.randn(H),
        "D": torch.randn(H),
        "norm.weight": torch.randn(H * d),
        "out_proj.weight": torch.randn(D, H * d),
        "out_proj.bias": torch.randn(D),
    }
    mixer = Mixer({n: t.double() for n, t in tensors.items()}, H, Hk, d, activation="silu")
    hidden = torch.randn(2, 9, D, dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    features = mixer_features(hidden, mixer, mask)
    p = mixer.tensors
    scan = features @ p["out_proj.weight"].T + p["out_proj.bias"]
    torch.testing.assert_close(quadratic(hidden, mixer, mask)[mask], scan[mask])


def _permute_query_heads(mixer: Mixer) -> None:
    z, shared = HEADS * WIDTH, 2 * mixer.kv_heads * WIDTH
    query = mixer.tensors["in_proj.weight"][z + shared : z + shared + HEADS * WIDTH]
    query.copy_(query.roll(WIDTH, 0))


def _drop_bias(mixer: Mixer) -> None:
    mixer.tensors["in_proj.bias"][HEADS * WIDTH :] = 0


def _swap_key_and_value(mixer: Mixer) -> None:
    z, n = HEADS * WIDTH, mixer.kv_heads * WIDTH
    both = mixer.tensors["in_proj.weight"][z : z + 2 * n]
    both.copy_(both.roll(n, 0))


@pytest.mark.parametrize("spoil", [_permute_query_heads, _drop_bias, _swap_key_and_value])
@pytest.mark.parametrize("fit", ["output_projection", "none"])
def test_wrongly_loaded_weights_are_caught(monkeypatch, model, ids, spoil, fit):
    def wrong(*args):
        mixer = initial_mixer(*args)
        spoil(mixer)
        return mixer

    initial_mixer = mamba2.initial_mixer
    monkeypatch.setattr(mamba2, "initial_mixer", wrong)
    with pytest.raises(GateError, match="promises"):
        run(model, ids, "mamba2", fit=fit)


# ---- policies -------------------------------------------------------------------------------


def errors(model, ids, name) -> dict[str, float]:
    return {s["site"]: s["error"] for s in run(model, ids, name).report["sites"]}


def test_fail(model, ids):
    with pytest.raises(GateError, match="above 1e-06"):
        run(model, ids, "sliding_window", tolerance=1e-6)


def test_warn(model, ids):
    made = run(model, ids, "sliding_window", tolerance=1e-6, policy="warn")
    assert len(made.report["sites"]) == 2
    assert sum("above 1e-06" in w for w in made.report["warnings"]) == 2


@pytest.mark.parametrize("name", list(PASSES))
def test_roll_back_of_one_site(model, ids, name):
    found = errors(model, ids, name)
    worst = max(found, key=lambda k: found[k])
    bound = sum(found.values()) / 2
    made = run(model, ids, name, tolerance=bound, policy="roll_back")
    assert [s["site"] for s in made.report["sites"]] == [s for s in found if s != worst]
    assert any("rolled back" in w and worst in w for w in made.report["warnings"])
    kept = made.report["sites"][0]
    assert kept["error"] == pytest.approx(found[kept["site"]], rel=1e-5)
    for part in (worst, f"{worst}.q_proj", f"{worst}.o_proj"):  # it has its own tensors again
        name_ = f"{part}.weight"
        if name_ in model.state_dict():
            assert torch.equal(made.graph.tensor(name_), model.state_dict()[name_])
    assert made(ids).logits.isfinite().all()


def test_roll_back_of_everything_leaves_the_original(model, ids):
    made = run(model, ids, "mamba2", tolerance=1e-6, policy="roll_back")
    assert made.report["sites"] == []
    torch.testing.assert_close(made(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_roll_back_of_a_later_step_keeps_the_earlier(model, ids):
    steps = [
        {"pass": "mamba2", "layers": [0]},
        {"pass": "sliding_window", "window": 5, "policy": "roll_back", "tolerance": 1e-6},
        {"pass": "low_rank", "rank": 12, "targets": ["re:.*layers\\.[12]\\.mlp.*"]},
    ]
    made = rewrite(model, {"steps": steps, "gate": {"length": LENGTH}}, ids)
    assert {s["pass"] for s in made.report["sites"]} == {"mamba2", "low_rank"}
    assert all(not argument(a.node, "window") for a in made.graph.attention)
    assert made(ids).logits.isfinite().all()


def test_a_wrong_rewrite_fails_under_every_policy(monkeypatch, model, ids):
    monkeypatch.setattr(SlidingWindow, "check", Pass.check)
    plant(monkeypatch, "sliding_window", literal("scale", lambda x: x * 1.5))
    for policy in ("warn", "roll_back"):
        with pytest.raises(GateError, match="promises"):
            run(model, ids, "sliding_window", policy=policy, tolerance=10.0)


def test_max_kl(model, ids):
    with pytest.raises(GateError, match="KL"):
        run(model, ids, "sliding_window", gate={"max_kl": 1e-9})


def test_capture_is_what_the_faults_expect(model):
    graph = capture(model)
    assert len(graph.attention) == 3
    assert all(n.target is ATTENTION for n in (a.node for a in graph.attention))
