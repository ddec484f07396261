"""Encoder-decoders: encoded once, decoded with state, token-identical to the originals."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, GenerationMixin
from transformers.modeling_outputs import BaseModelOutput
from zoo import build

import rewriter
from rewriter.errors import RewriterError
from rewriter.graph import argument
from rewriter.seq2seq import RewrittenSeq2Seq
from rewriter.state import State, carriers
from rewriter.state_size import state_bytes

NAMES = ["t5", "bart", "whisper"]
LENGTH = 17
PLAN = {
    "steps": [
        {
            "pass": "sliding_window",
            "targets": ["re:.*decoder.(layers|block).0.*"],
            "window": 6,
            "sinks": 2,
        },
        {"pass": "low_rank", "targets": ["re:.*(encoder|decoder).*(fc1|wi)"], "keep": 0.7},
    ]
}
OPTIONS = {
    "greedy": {"do_sample": False},
    "beam": {"num_beams": 3, "do_sample": False},
    "sampling": {"do_sample": True},
    "uncached": {"do_sample": False, "use_cache": False},
}


@cache
def original(name: str):
    return build(name)


@cache
def rewritten(name: str, plan: str = "empty") -> RewrittenSeq2Seq:
    return rewriter.rewrite(original(name), PLAN if plan == "rewritten" else {"steps": []})


def source(name: str, padding: str = "left") -> dict[str, torch.Tensor]:
    """The encoder's inputs for three rows, two of them padded."""
    generator = torch.Generator().manual_seed(3)
    if name == "whisper":
        return {"input_features": torch.randn(3, 8, 40, generator=generator)}
    ids = torch.randint(3, 97, (3, 15), generator=generator)
    mask = torch.ones_like(ids)
    for row, hidden in ((1, 5), (2, 3)):
        mask[row, :hidden] = 0
        if padding == "right":
            mask[row] = mask[row].flip(0)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def target() -> dict[str, torch.Tensor]:
    """Decoder tokens of which one row is left-padded."""
    ids = torch.randint(3, 97, (3, LENGTH), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask}


def closeness(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_forward_is_the_originals(name, padding):
    inputs = source(name, padding) | {"decoder_input_ids": target()["decoder_input_ids"]}
    with torch.no_grad():
        ours, truth = rewritten(name)(**inputs), original(name)(**inputs)
    assert type(ours) is type(truth)
    assert closeness(ours.logits, truth.logits) <= 1e-5
    real = inputs.get("attention_mask", torch.ones(3, 20)).bool()
    hidden = [o.encoder_last_hidden_state[real] for o in (ours, truth)]
    assert closeness(*hidden) <= 1e-5


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_generation_is_the_originals(name, how, padding):
    made = []
    for model in (rewritten(name), original(name)):
        torch.manual_seed(5)
        # Whisper's own `generate` wants speech tokens: test_real_models.py.
        options = {"max_new_tokens": 20, "min_new_tokens": 12, **OPTIONS[how]}
        made.append(GenerationMixin.generate(model, **source(name, padding), **options))
    assert torch.equal(*made)


@pytest.mark.parametrize("name", NAMES)
def test_generation_from_a_prompt_padded_on_the_left(name):
    prompt = {k: v[:, :6] for k, v in target().items()}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    made = [
        GenerationMixin.generate(model, **source(name), **prompt, **options)
        for model in (rewritten(name), original(name))
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize("name", NAMES)
def test_decoder_part_holds_no_projection_of_the_encoded_input(name):
    """Cross-attention keys and values are computed in `memory`, once for a sequence."""
    model = rewritten(name)
    parts = {n: getattr(model.parts, n).graph for n in ("encoder", "memory", "decoder")}
    weights = {k: {n.target for n in g.nodes if n.op == "get_attr"} for k, g in parts.items()}
    projections = {
        linear.name + ".weight"
        for a in model.graph.attention
        if not argument(a.node, "causal") and "decoder" in a.path
        for linear in (a.key_projection, a.value_projection)
    }
    assert len(projections) == 4
    assert {w for w in weights["memory"] if str(w).endswith("weight")} == projections
    shared = {n for n in weights["encoder"] & weights["decoder"] if "embed" in n or "shared" in n}
    assert len(shared) <= 1  # tokens are embedded on both sides
    assert not weights["decoder"] & (projections | weights["encoder"]) - shared
    assert len(carriers(model.graph)) == len(model.graph.states) == 2


@pytest.mark.parametrize("plan", ["empty", "rewritten"])
@pytest.mark.parametrize("cuts", [[LENGTH], [5, 12, LENGTH], list(range(1, LENGTH + 1))])
@pytest.mark.parametrize("name", NAMES)
def test_prefill_equals_chunks_and_steps(name, cuts, plan):
    model, inputs, tokens = rewritten(name, plan), source(name), target()
    ids, mask = tokens.values()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    extra = ["decoder_position_ids"] * ("decoder_position_ids" in model.graph.inputs)
    with torch.no_grad():
        whole = model(**inputs, **tokens, **dict.fromkeys(extra, positions)).logits
        state, parts, past = State(model.graph.states), [], 0
        encoded = model.get_encoder()(**inputs)
        for cut in cuts:
            first = {**inputs, "encoder_outputs": encoded} if past == 0 else {}
            parts.append(
                model(
                    **first,
                    decoder_input_ids=ids[:, past:cut],
                    decoder_attention_mask=mask[:, :cut],
                    **dict.fromkeys(extra, positions[:, past:cut]),
                    past_key_values=state,
                ).logits
            )
            past = cut
    real = mask.bool()
    assert closeness(torch.cat(parts, 1)[real], whole[real]) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_state_follows_its_row(name):
    """Rows of a state are chosen as beam search chooses them, cross attention included."""
    model, inputs = rewritten(name), source(name)
    order = torch.tensor([2, 0, 0])
    ids = target()["decoder_input_ids"]
    with torch.no_grad():
        state = model(**inputs, decoder_input_ids=ids[:, :5], use_cache=True).past_key_values
        state.reorder_cache(order)
        ours = model(decoder_input_ids=ids[:, 5:], past_key_values=state).logits
        chosen = {k: v[order] for k, v in inputs.items()}
        past = torch.cat([ids[order, :5], ids[:, 5:]], 1)
        truth = original(name)(**chosen, decoder_input_ids=past).logits[:, 5:]
    assert closeness(ours, truth) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_reported_state_is_the_resident_one(name):
    model, inputs, ids = rewritten(name), source(name), torch.full((3, 64), 5)
    ids = ids[:, :40] if name == "whisper" else ids
    state = model(**inputs, decoder_input_ids=ids, use_cache=True).past_key_values
    part = model.report["state"]["after"]
    length = 20 if name == "whisper" else 15
    own = state_bytes(part, 64) + part.get("per_source_token", 0) * length  # buffers hold 64
    assert state.bytes() == 3 * own
    memory = sum(t.numel() * t.element_size() for t in state.memory if torch.is_tensor(t))
    keys_and_values = 2 * 2 * 32 * 4 * length  # layers, key and value, width, fp32
    assert memory == 3 * (keys_and_values + (0 if name == "whisper" else length))


@pytest.mark.parametrize("name", NAMES)
def test_trains_as_the_original(name):
    model, truth = copy.deepcopy(rewritten(name)), copy.deepcopy(original(name))
    labels = target()["decoder_input_ids"].clone()
    labels[0, 9:] = -100
    losses = [m(**source(name), labels=labels).loss for m in (model, truth)]
    assert closeness(*(loss.detach() for loss in losses)) <= 1e-5
    for loss in losses:
        loss.backward()
    gradients = {n: p.grad for n, p in truth.named_parameters() if p.grad is not None}
    ours = {n: p.grad for n, p in model.body.named_parameters()}
    assert {n for n, g in ours.items() if g is not None} >= gradients.keys()
    for n, gradient in gradients.items():
        # Key biases have no gradient but rounding.
        if gradient.abs().max() > 1e-6:
            assert closeness(ours[n], gradient) <= 1e-4, n


@pytest.mark.parametrize("plan", ["empty", "rewritten"])
@pytest.mark.parametrize("name", NAMES)
def test_save_and_load_are_bit_equal(name, plan, tmp_path: Path):
    model, inputs = rewritten(name, plan), source(name) | target()
    model.save_pretrained(tmp_path / "out")
    auto = AutoModelForSpeechSeq2Seq if name == "whisper" else AutoModelForSeq2SeqLM
    again = auto.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    frozen = [{n for n, p in m.named_parameters() if not p.requires_grad} for m in (again, model)]
    assert frozen[0] == frozen[1] and bool(frozen[0]) == (name == "whisper")
    made = [
        GenerationMixin.generate(m, **source(name), max_new_tokens=8, num_beams=2)
        for m in (again, model)
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize("name", NAMES)
def test_passes_reach_both_sides(name):
    model = rewritten(name, "rewritten")
    sites = {(s["pass"], s["site"]): s["error"] for s in model.report["sites"]}
    windows = [site for step, site in sites if step == "sliding_window"]
    assert len(windows) == 1 and "decoder" in windows[0]
    low_rank = [site for step, site in sites if step == "low_rank"]
    assert {"encoder", "decoder"} <= {p for site in low_rank for p in site.split(".")}
    assert all(0 < error < 2 for error in sites.values())
    options = {"max_new_tokens": 24, "min_new_tokens": 20, "num_beams": 2}
    made = [
        GenerationMixin.generate(model, **source(name), use_cache=cached, **options)
        for cached in (True, False)
    ]
    assert torch.equal(*made)


def test_a_decoder_layer_becomes_mamba2():
    plan = {"steps": [{"pass": "mamba2", "targets": ["model.decoder.layers.1.self_attn"]}]}
    model = rewriter.rewrite(original("bart"), plan)
    assert [s["kind"] for s in model.graph.states] == ["kv", "recurrent"]
    made = [
        model.generate(**source("bart"), use_cache=cached, max_new_tokens=16, min_new_tokens=16)
        for cached in (True, False)
    ]
    assert torch.equal(*made)


def test_a_window_that_hides_nothing_is_exact():
    step = {"pass": "sliding_window", "targets": ["re:.*decoder.*self_attn"], "window": 64}
    model = rewriter.rewrite(original("bart"), {"steps": [step]})
    inputs = source("bart") | target()
    with torch.no_grad():
        assert closeness(model(**inputs).logits, original("bart")(**inputs).logits) <= 1e-5


def test_an_encoder_result_may_be_given():
    model, inputs = rewritten("t5"), source("t5")
    ids = target()["decoder_input_ids"]
    with torch.no_grad():
        encoded = model.get_encoder()(**inputs)
        assert isinstance(encoded, BaseModelOutput)
        mask = inputs["attention_mask"]
        ours = model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=ids)
        assert closeness(ours.logits, model(**inputs, decoder_input_ids=ids).logits) <= 1e-6


@pytest.mark.parametrize(
    ("extra", "message"),
    [({}, "decoder_input_ids"), ({"output_attentions": True}, "output_attentions")],
)
def test_mistakes_are_one_clear_error(extra, message):
    with pytest.raises(RewriterError, match=message):
        rewritten("t5")(**source("t5"), **extra)
