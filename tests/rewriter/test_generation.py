"""Decoders of many architectures generate the originals' tokens, with state where they can."""

from __future__ import annotations

import pytest
import torch
from zoo import build

import rewriter
from rewriter.examples import example_inputs

SLOW = ("falcon", "llava", "smolvlm")
WITH_STATE = [
    *("llama", "qwen3", "gemma3", "mistral", "phi3", "gpt2", "opt", "gpt_neox", "bloom"),
    *("mixtral", "gemma2", "gpt_oss", "llama4"),
    *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW),
]


def compare(name):
    """Greedy, beam search and sampling from a left-padded batch, against the original."""
    original = build(name)
    model = rewriter.rewrite(original, {"steps": []})
    ids = torch.randint(3, 97, (2, 15), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    ways = [{"do_sample": False}, {"do_sample": True}, {"num_beams": 3}]
    if "pixel_values" in model.graph.inputs:
        example = example_inputs(original)
        inputs = {k: v for k, v in example.items() if k != "position_ids"}
        inputs["suppress_tokens"] = [98]  # no image can follow
        ways.pop()  # the graph is tied to its number of images
    for options in ways:
        made = []
        for which in (model, original):
            torch.manual_seed(1)
            made.append(which.generate(**inputs, max_new_tokens=16, min_new_tokens=12, **options))
        assert torch.equal(*made), options
    return model


@pytest.mark.parametrize("name", WITH_STATE)
def test_with_state(name):
    model = compare(name)
    assert model.graph.decodes and model.graph.states


@pytest.mark.slow
def test_layers_that_carry_an_unknown_state_are_not_cached():
    """Bamba's own Mamba layers: every call sees the whole sequence, and is right."""
    model = compare("bamba")
    assert not model.graph.decodes and not model.graph.states
