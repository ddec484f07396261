"""Captured graphs mean what the original models mean, at other sizes and with padding."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from zoo import ZOO, build

from rewriter.capture import capture
from rewriter.examples import example_inputs
from rewriter.graph import Graph, argument, set_argument

BATCH, LENGTH, TARGET = 3, 19, 7  # the example that a capture sees has other sizes
TOLERANCE = 1e-5
#: Models whose forward ties the graph to the example's number of images.
IMAGES_FIXED = {"llava", "smolvlm"}
SLOW = {"mamba2", "bamba", "jamba"}
NAMES = [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in ZOO]


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


def difference(one: Tensor, other: Tensor, mask: Tensor | None) -> float:
    """Largest difference over the largest value, at real tokens."""
    if mask is not None and one.dim() == 3 and one.shape[:2] == mask.shape:
        one, other = one[mask.bool()], other[mask.bool()]
    return ((one - other).abs().max() / other.abs().max()).item()


def worst(name: str, padding: str) -> float:
    model, graph = captured(name)
    inputs = inputs_for(name, model, graph, padding)
    truth, ours = outputs_of(model, inputs), run(graph, inputs)
    assert ours.keys() <= truth.keys() and ours
    mask = inputs.get("attention_mask")
    return max(difference(ours[k], truth[k], mask) for k in ours)


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
    return difference(ours["logits"], outputs_of(model, inputs)["logits"], None)


@pytest.mark.parametrize("name", NAMES)
def test_every_attention_is_one_node(name):
    _, graph = captured(name)
    assert graph.near_misses == []
    assert len(graph.attention) == ZOO[name][1]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_graph_equals_original(name, padding):
    assert worst(name, padding) < TOLERANCE


@pytest.mark.parametrize(
    "name, literal, edit",
    [
        ("gemma2", "softcap", lambda cap: 0.0),
        ("gpt_oss", "sink_logits", lambda sinks: None),
        ("mistral", "window", lambda window: window + 1),
        ("mistral", "window", lambda window: window - 1),
        ("modernbert", "window", lambda window: window + 1),
        ("llama4", "chunk", lambda chunk: chunk + 1),
        ("llama4", "chunk", lambda chunk: 0),
        ("bloom", "bias", lambda bias: None),
        ("t5", "bias", lambda bias: None),
        ("llama", "causal", lambda causal: False),
    ],
)
def test_these_models_would_show_a_wrong_literal(name, literal, edit):
    assert change(name, literal, edit) > 1e-3
