"""Activations of the original: what passes calibrate on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaForCausalLM

from rewriter import calibration
from rewriter.calibration import Activations, copy_module, graph_inputs
from rewriter.capture import capture


def made(model: LlamaForCausalLM) -> Activations:
    graph = capture(model)
    random = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 200, (1, length), generator=random) for length in (7, 12, 30)]
    return Activations(copy_module(graph.module), graph, [graph_inputs(graph, r) for r in rows])


def test_sequences_group_by_group_are_those_of_one_run(
    tiny_llama: LlamaForCausalLM, monkeypatch: Any
) -> None:
    """In the graph's order or not, with nodes that several groups want; the text runs once."""
    one = made(tiny_llama)
    nodes = [n for n in one.graph.nodes if n.op == "call_function" and "val" in n.meta]
    nodes = [n for n in nodes if isinstance(n.meta["val"], torch.Tensor)]
    first, middle, last = nodes[3], nodes[len(nodes) // 2], nodes[-3]
    (whole,) = one.sequences([[first, middle, last]])
    assert [len(v) for v in whole] == [3, 3, 3]
    assert [v[last].shape[1] for v in whole] != [whole[0][last].shape[1]] * 3

    runs = []
    walk = calibration.walk
    monkeypatch.setattr(calibration, "walk", lambda *a: (runs.append(a), walk(*a))[1])
    for groups in (
        [[first], [middle], [last]],
        [[last], [first, middle]],
        [[middle, first], [first], [last, middle]],
    ):
        runs.clear()
        found = list(one.sequences(groups))
        assert len(runs) == 3  # once a sequence, however many groups
        for group, values in zip(groups, found, strict=True):
            for value, want in zip(values, whole, strict=True):
                assert set(value) == set(group)
                assert all(torch.equal(value[n], want[n]) for n in group)


def test_nothing_after_the_last_group_runs(tiny_llama: LlamaForCausalLM, monkeypatch: Any) -> None:
    one = made(tiny_llama)
    nodes = [n for n in one.graph.nodes if n.op == "call_function"]
    seen = []
    walk = calibration.walk

    def counted(*given: Any) -> Any:
        for step in walk(*given):
            seen.append(step[0])
            yield step

    monkeypatch.setattr(calibration, "walk", counted)
    groups = one.sequences([[nodes[2]], [nodes[10]]])
    next(groups)
    assert seen[-1].name == nodes[2].name
    next(groups)
    assert seen[-1].name == nodes[10].name
