"""`hybrid_linear`: the exact case, what the gate expects, the start, decoding, reasons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import rewriter
from rewriter.capture import capture
from rewriter.errors import GateError, PlanError
from rewriter.graph import Graph
from rewriter.passes._hybrid_linear_fit import fit_gates
from rewriter.passes._hybrid_linear_maps import Maps, map_tensors
from rewriter.passes.hybrid_linear import Config, HybridLinear, _initial
from rewriter.protocol import NearMiss

HYBRID = torch.ops.rewriter.hybrid_attention.default
SIZES = {"window": 8, "sinks": 2}
UNTRAINED = {"feature_map": "hedgehog_split", "feature_dim": 12, "gate_init": 10.0}


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(**{**sizes, **heads, "max_position_embeddings": 256, **changes})
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # attention that looks somewhere, so that the gates have work
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(12)
            layer.self_attn.k_proj.weight.mul_(12)
    return model


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def rewrite(model: Any, **options: Any) -> Any:
    plan = {
        "steps": [{"pass": "hybrid_linear", **SIZES, **options}],
        "calibration": {"sequences": 4, "length": 64},
        "gate": {"sequences": 2, "length": 60},
    }
    return rewriter.rewrite(model, plan, tokens(4, 64))


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def gap(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


VARIANTS = [
    {},
    {"window_kind": "sliding", "key_features": "heads", "reference": "mean", "far_cap": 10},
    {"feature_dim": 16, "gates": "head"},
    {"feature_map": "hedgehog_split", "feature_dim": 12, "reference": "max", "sinks": 0},
    {"feature_map": "hedgehog_joint", "feature_dim": 12, "gates": "head"},
    {"feature_map": "t2r", "feature_dim": 5},
    {"feature_map": "elu1"},
    {"feature_map": "exp", "gate_init": 3.0, "gates": "head"},
    {"feature_map": "identity", "gate_init": 1e-3, "gates": "head"},
    {"variant": "liger"},
    {"variant": "liger", "mix": 0.25, "gate_normaliser": 4.0, "sinks": 0},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_variant_is_what_it_says_and_decodes(options: dict[str, Any]) -> None:
    """The gate compares the graph with the quadratic form, padded rows too; then state laws."""
    model = rewrite(llama(), **options)
    sites = model.lock["sites"]
    assert len(sites) == 2 and model.report["status"] == "unrecovered"
    ids = tokens(2, 50, seed=1)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        whole = model(ids, mask, positions, use_cache=False).logits
        parts: list[Tensor] = []
        state: Any = None
        for start, stop in ((0, 23), (23, 24), (24, 41), *((i, i + 1) for i in range(41, 50))):
            out = model(
                ids[:, start:stop],
                mask[:, :stop],
                positions[:, start:stop],
                past_key_values=state,
                use_cache=True,
            )
            state = out.past_key_values
            parts.append(out.logits)
        alone = logits(model, ids[1:, 20:])
    real = mask.bool()
    assert gap(torch.cat(parts, 1)[real], whole[real]) <= 1e-5
    assert gap(whole[1:, 20:], alone) <= 1e-5
    size = model.report["state"]["after"]
    assert size["per_token"] == 0
    assert state is not None
    held = state.bytes()
    with torch.no_grad():
        model(ids[:, :1], torch.ones(2, 51), positions[:, -1:] + 1, past_key_values=state)
    assert state.bytes() == held


def test_beams_and_saving(tmp_path: Any) -> None:
    model = rewrite(llama())
    ids = tokens(2, 21, seed=3)
    chosen = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    fast = model.generate(ids, use_cache=True, **chosen)
    assert torch.equal(fast, model.generate(ids, use_cache=False, **chosen))
    model.save_pretrained(tmp_path / "out")
    again = rewriter.load(tmp_path / "out")
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("options", [{}, {"window_kind": "sliding"}, UNTRAINED], ids=str)
def test_a_window_over_everything_changes_nothing(options: dict[str, Any]) -> None:
    original = llama()
    model = rewrite(original, **options, window=64)
    ids = tokens(2, 64, seed=2)
    assert gap(logits(model, ids), logits(original, ids)) <= 1e-5
    longer = tokens(2, 200, seed=2)
    assert gap(logits(model, longer), logits(original, longer)) > 1e-3


@pytest.mark.slow
def test_identity_on_real_weights(smollm2: Any) -> None:
    original = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    ids = torch.randint(3, 40000, (1, 96), generator=torch.Generator().manual_seed(0))
    plan = {
        "steps": [{"pass": "hybrid_linear", "window": 96, "feature_dim": 16}],
        "calibration": {"sequences": 1, "length": 96},
        "gate": {"sequences": 1, "length": 64},
    }
    model = rewriter.rewrite(original, plan, ids)
    assert gap(logits(model, ids), logits(original, ids)) <= 1e-5


def test_what_trains_and_what_stays() -> None:
    original = llama()
    kept = {n: t.clone() for n, t in original.named_parameters()}
    model = rewrite(original, layers=[1], feature_dim=16)
    new = dict(model.graph.parameters())
    assert all(torch.equal(new[n], t) for n, t in kept.items())
    prefix = "model.layers.1.self_attn.hybrid_linear."
    shapes = {n.removeprefix(prefix): tuple(t.shape) for n, t in new.items() if n not in kept}
    shapes = {n: s for n, s in shapes.items() if "inv_freq" not in n}
    assert shapes == {
        "gate": (4,),
        "query_gate": (4, 12),
        "key_gate.weight": (2, 12),
        "key_gate.bias": (2,),
        "query_map.weight": (4, 16, 12),
        "query_map.bias": (4, 16),
        "key_map.weight": (2, 16, 12),
        "key_map.bias": (2, 16),
    }
    trained = {n: p for n, p in model.named_parameters() if "hybrid_linear" in n}
    assert len(trained) == len(shapes)
    ids = tokens(2, 60, seed=5)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trained.values())


# ---- the start ------------------------------------------------------------------------------


def text_like(count: int, length: int = 160) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Heads whose far keys matter: clustered keys, values that go with the cluster."""
    g = torch.Generator().manual_seed(0)
    centre, meaning = 2 * torch.randn(2, 12, 8, generator=g), torch.randn(2, 12, 8, generator=g)
    found = []
    for _ in range(count):
        which = torch.randint(12, (2, length), generator=g)
        head = torch.arange(2)[:, None]
        noise = 0.3 * torch.randn(2, length, 8, generator=g)
        key = centre[head, which] + noise
        wanted = torch.randint(12, (2, length), generator=g)
        query = centre[head, wanted].repeat_interleave(2, 0)
        query = query + torch.randn(query.shape, generator=g)
        found.append((query[None], key[None], meaning[head, which][None]))
    return found


def start(options: dict[str, Any], count: int = 8) -> dict[str, Any]:
    c, seen = Config(**{**SIZES, **options}), text_like(count)
    tensors = _initial(c, seen, seen[0][0], 4, 2, 8, 8**-0.5, 0)
    maps = Maps(c.feature_map, tensors, 4, 2)
    return fit_gates(maps, seen, c, 8**-0.5, c.gates == "query_key")[1]


@pytest.mark.parametrize(
    "options",
    [
        {"feature_dim": 12},
        {"feature_dim": 12, "window_kind": "sliding", "reference": "mean"},
        {"feature_map": "hedgehog_split", "feature_dim": 16, "reference": "max"},
        {"feature_map": "elu1", "gates": "head"},
        {"feature_map": "exp"},
    ],
    ids=str,
)
def test_the_start_is_no_worse_than_the_window(options: dict[str, Any]) -> None:
    for count in (1, 8):
        facts = start(options, count)
        assert facts["error_start"] <= 1.001 * facts["error_window"]


@pytest.mark.parametrize("kind", ["block", "sliding"])
def test_a_window_of_sinks_alone_starts_from_numbers(kind: str) -> None:
    """With as many sinks as the window is long, the first blocks have nothing far to fit."""
    facts = start({"feature_dim": 12, "window": 4, "sinks": 4, "window_kind": kind})
    assert facts["error_start"] <= 1.001 * facts["error_window"]


def test_centroids_find_what_the_window_misses() -> None:
    facts = start({"feature_dim": 16})
    assert facts["error_start"] < 0.1 * facts["error_window"]
    assert facts["error_on"] == "held-out sequences"
    # Gates of the right size matter: the same centroids with constant gates do worse.
    assert facts["error_start"] < start({"feature_dim": 16, "gates": "head"})["error_start"]


def test_the_start_is_of_the_whole_function() -> None:
    """The fit's own account of the output is what the op computes."""
    c, seen = Config(**SIZES, feature_dim=16), text_like(4)
    maps = Maps("centroid", _initial(c, seen, seen[0][0], 4, 2, 8, 8**-0.5, 0), 4, 2)
    maps, facts = fit_gates(maps, seen, c, 8**-0.5, True)
    query, key, value = seen[3]  # the sequence that was held out
    y, _ = rewriter.kernels.hybrid_attention.hybrid_attention(
        query,
        key,
        value,
        *map_tensors(query, key, maps),
        scale=8**-0.5,
        far_cap=c.far_cap,
        **SIZES,
    )
    key, value = (t.repeat_interleave(2, 1) for t in (key, value))
    truth = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    truth, y = truth.transpose(1, 2)[:, 16:], y[:, 16:]
    error = float((y - truth).square().sum() / truth.square().sum())
    assert error == pytest.approx(facts["error_start"], rel=1e-3)


# ---- mistakes -------------------------------------------------------------------------------


def test_a_wrong_rewrite_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = HybridLinear.rewrite

    def shifted(self: Any, graph: Graph, site: Any) -> Any:
        made = honest(self, graph, site)
        graph.tensor(f"{site.name}.hybrid_linear.query_map.weight").data.mul_(1.01)
        return made

    monkeypatch.setattr(HybridLinear, "rewrite", shifted)
    with pytest.raises(GateError, match="does not compute what the pass promises"):
        rewrite(llama())


class Model(nn.Module):
    """One attention of a kind that is no site."""

    def __init__(self, **kind: Any) -> None:
        super().__init__()
        self.attention = Odd(**kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x) + 1


class Odd(nn.Module):
    def __init__(self, **kind: Any) -> None:
        super().__init__()
        self.kind = {"causal": True, "window": 0, "chunk": 0, "softcap": 0.0, "bias": None, **kind}
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        other = x * 2 if self.kind.get("cross") else x
        q, k = (p(t).unflatten(2, (2, 4)).transpose(1, 2) for p, t in
                ((self.q_proj, x), (self.k_proj, other)))  # fmt: skip
        bias = x.new_zeros(1, 2, 1, 1) if self.kind["bias"] else None
        sink = x.new_zeros(2) if self.kind.get("sink") else None
        mask = x.new_ones(1, 1, x.shape[1], x.shape[1]).bool() if self.kind.get("dense") else None
        kind = [self.kind[n] for n in ("causal", "window", "chunk")]
        return torch.ops.rewriter.attention(
            q, k, k, mask, bias, sink, None, 0.5, *kind, 0, self.kind["softcap"]
        )


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ({"causal": False}, "bidirectional"),
        ({"window": 4}, "already sees only a window of 4"),
        ({"chunk": 4}, "already sees only chunks of 4"),
        ({"softcap": 30.0}, "capped at 30"),
        ({"bias": True}, "bias"),
        ({"sink": True}, "sink logits"),
        ({"dense": True}, "dense"),
        ({"cross": True}, "cross-attention"),
    ],
    ids=str,
)
def test_reasons(kind: dict[str, Any], words: str) -> None:
    graph = capture(Model(**kind), example=(torch.randn(2, 6, 8),))
    (found,) = HybridLinear().sites(graph)
    assert isinstance(found, NearMiss) and words in found.reason


def test_liger_finds_its_rows_in_a_fused_projection() -> None:
    torch.manual_seed(0)
    config = Phi3Config(
        hidden_size=48,
        intermediate_size=64,
        vocab_size=97,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    model = rewrite(Phi3ForCausalLM(config).eval(), variant="liger")
    assert model.lock["sites"][0]["facts"]["variant"] == "liger"


def test_liger_says_what_it_lacks() -> None:
    graph = capture(Model(), example=(torch.randn(2, 6, 8),))
    (found,) = HybridLinear(variant="liger").sites(graph)
    assert isinstance(found, NearMiss) and "linear" in found.reason


def test_no_text_is_a_mistake() -> None:
    method = HybridLinear()
    assert method.needs_calibration and not HybridLinear(**UNTRAINED).needs_calibration
    graph = capture(llama())
    with pytest.raises(PlanError, match="fit on text"):
        method.prepare(graph, list(method.sites(graph)), None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sinks": 65}, "do not fit"),
        ({"gate_init": 0}, "sliding_window"),
        ({"feature_map": "hedgehog_joint", "feature_dim": 7}, "even"),
        ({"variant": "liger", "reference": "max"}, "has no option reference"),
        ({"mix": 0.3}, "has no option mix"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Config(**options)
