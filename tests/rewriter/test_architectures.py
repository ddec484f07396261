"""Captured graphs mean what the original models mean, at other sizes and with padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from zoo import ZOO, build

from rewriter.capture import capture
from rewriter.errors import CaptureError
from rewriter.examples import example_inputs
from rewriter.graph import Graph, argument, set_argument

BATCH, LENGTH, TARGET = 3, 19, 7  # the example that a capture sees has other sizes
TOLERANCE = 1e-5
#: Models whose forward ties the graph to the example's number of images.
IMAGES_FIXED = {"llava", "smolvlm"}
SLOW = {"mamba2", "bamba", "jamba", "smolvlm", "falcon"}
NAMES = [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in ZOO]
#: Models without a padding mask are given no padded inputs.
CASES = [
    pytest.param(n, p, marks=pytest.mark.slow if n in SLOW else ())
    for n in ZOO
    for p in (["none"] if n == "vit" else ["none", "left", "right"])
]


@cache
def captured(name: str) -> tuple[PreTrainedModel, Graph]:
    model = build(name)
    return model, capture(model)


def inputs_for(name: str, model: PreTrainedModel, graph: Graph, padding: str) -> dict[str, Tensor]:
    """Inputs at other sizes than the example's; `padding` is none, left or right."""
    generator = torch.Generator().manual_seed(7)
    example = example_inputs(model)
    batch = 2 if name in IMAGES_FIXED else BATCH
    length = 12 if name == "jamba" else LENGTH
    ids = torch.randint(3, 97, (batch, length), generator=generator)
    if name in IMAGES_FIXED:
        images = int((example["input_ids"][0] == 98).sum())
        ids = torch.cat([ids, torch.full((batch, images), 98), ids[:, :5]], 1)
    mask = torch.ones_like(ids)
    for row, hidden in enumerate([0, 7, 4][:batch]):
        if padding == "left":
            mask[row, :hidden] = 0
        elif padding == "right" and hidden:
            mask[row, -hidden:] = 0
    if name in IMAGES_FIXED:
        mask |= ids == 98
    ids = ids.masked_fill((mask == 0) & (ids != 98), 0)
    made = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
        "token_type_ids": torch.zeros_like(ids),
        "decoder_input_ids": torch.randint(3, 97, (batch, TARGET), generator=generator),
    }
    seen = torch.ones_like(made["decoder_input_ids"])
    if padding == "left":
        seen[0, :2] = 0
    elif padding == "right":
        seen[0, -2:] = 0
    made["decoder_attention_mask"] = seen
    made["decoder_position_ids"] = (seen.cumsum(-1) - 1).clamp_min(0)
    for image in ("pixel_values", "input_features"):
        if image in example:
            shape = (batch, *example[image].shape[1:])
            made[image] = torch.randn(shape, generator=generator)
    return {n: made[n] for n in graph.inputs}


def outputs_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        output = model(**inputs, return_dict=True)
    return {k: v for k, v in output.items() if isinstance(v, Tensor)}


def run(graph: Graph, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(zip(graph.outputs, graph.module(*inputs.values()), strict=True))


def difference(one: Tensor, other: Tensor, masks: Sequence[Tensor] = ()) -> float:
    """Largest difference over the largest value, at real tokens."""
    mask = next((m for m in masks if one.dim() == 3 and one.shape[:2] == m.shape), None)
    if mask is not None:
        one, other = one[mask.bool()], other[mask.bool()]
    return ((one - other).abs().max() / other.abs().max()).item()


def worst(name: str, padding: str) -> float:
    model, graph = captured(name)
    inputs = inputs_for(name, model, graph, padding)
    truth, ours = outputs_of(model, inputs), run(graph, inputs)
    assert ours.keys() <= truth.keys() and ours
    names = ("attention_mask", "decoder_attention_mask")
    masks = [inputs[n] for n in names if n in inputs]
    return max(difference(ours[k], truth[k], masks) for k in ours)


def change(name: str, literal: str, edit) -> float:
    """Difference to the original while one literal of every attention that has it is edited."""
    model, graph = captured(name)
    inputs = inputs_for(name, model, graph, "none")
    before = [(a.node, v) for a in graph.attention if (v := argument(a.node, literal))]
    assert before, f"no attention of {name} has {literal}"
    try:
        for node, value in before:
            set_argument(node, literal, edit(value))
        graph.recompile()
        ours = run(graph, inputs)
    finally:
        for node, value in before:
            set_argument(node, literal, value)
        graph.recompile()
    return difference(ours["logits"], outputs_of(model, inputs)["logits"])


@pytest.mark.parametrize("name", NAMES)
def test_every_attention_is_one_node(name):
    _, graph = captured(name)
    assert graph.near_misses == []
    assert len(graph.attention) == ZOO[name][1]


@pytest.mark.parametrize("name, padding", CASES)
def test_graph_equals_original(name, padding):
    assert worst(name, padding) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jamba", "llava", "smolvlm"])
def test_sizes_that_the_original_ties_are_refused(name):
    """Jamba's scan is a loop over time; these vision models split by number of images."""
    model, graph = captured(name)
    inputs = inputs_for(name, model, graph, "none")
    dim = 1 if name == "jamba" else 0
    longer = {k: torch.cat([v, v.narrow(dim, 0, 1)], dim) for k, v in inputs.items()}
    assert outputs_of(model, longer)  # the original itself can
    with pytest.raises(RuntimeError, match="ties its graph to .* of size"):
        run(graph, longer)


@pytest.mark.parametrize(
    "name, literal, edit",
    [
        ("gemma2", "softcap", lambda cap: 0.0),
        ("gpt_oss", "sink_logits", lambda sinks: None),
        ("mistral", "window", lambda window: window + 1),
        ("mistral", "window", lambda window: window - 1),
        ("modernbert", "window", lambda window: window + 1),
        ("llama4", "mask", lambda mask: None),  # chunks count from a row's first real token
        ("bloom", "bias", lambda bias: None),
        ("t5", "bias", lambda bias: None),
        ("llama", "causal", lambda causal: False),
    ],
)
def test_these_models_would_show_a_wrong_literal(name, literal, edit):
    assert change(name, literal, edit) > 1e-3


class Tiny(nn.Module):
    """A plain language model of one block; `mix` is its attention, written by hand."""

    def __init__(self, mix):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix = nn.Embedding(50, 32), mix
        self.project, self.out, self.head = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 50)

    def forward(self, ids):
        x = self.embed(ids)
        query, key, value = (
            t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.project(x).chunk(3, -1)
        )
        return self.head(x + self.out(self.mix(query, key, value).transpose(1, 2).flatten(2)))


def by_hand(query, key, value):
    scores = query @ key.transpose(-2, -1) / math.sqrt(8)
    hidden = torch.triu(torch.ones(scores.shape[-2:], dtype=torch.bool), 1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value


def einsum(query, key, value):
    weights = (torch.einsum("bhld,bhsd->bhls", query, key) * 8**-0.5).softmax(-1)
    return torch.einsum("bhls,bhsd->bhld", weights, value)


def alibi(query, key, value):
    index = torch.arange(query.shape[2])
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
    bias = slopes * (index[None, :] - index[:, None])
    hidden = index[None, :] > index[:, None]
    scores = (query @ key.transpose(-2, -1)) * 8**-0.5 + bias
    return scores.masked_fill(hidden, -1e9).softmax(-1) @ value


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.embed, self.layers = nn.Embedding(50, 32), nn.TransformerEncoder(layer, 2)

    def forward(self, ids):
        return self.layers(self.embed(ids))


@pytest.mark.parametrize(
    "model, nodes, kind",
    [
        (lambda: Tiny(by_hand), 1, "causal"),
        (lambda: Tiny(einsum), 1, "bidirectional"),
        (lambda: Tiny(alibi), 1, "causal bias"),
        (Encoder, 2, "bidirectional"),
    ],
    ids=["nanogpt", "einsum", "alibi", "encoder"],
)
def test_plain_modules(model, nodes, kind):
    model = model().eval()
    graph = capture(model, example=(torch.randint(0, 50, (2, 12)),))
    assert [a.kind for a in graph.attention] == [kind] * nodes, graph.near_misses
    ids = torch.randint(0, 50, (BATCH, LENGTH))
    with torch.no_grad():
        (ours,) = graph.module(ids)
        assert difference(ours, model(ids)) < TOLERANCE


def test_a_plain_module_needs_an_example():
    with pytest.raises(CaptureError, match="example="):
        capture(Tiny(by_hand))
