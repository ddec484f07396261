"""Low-rank additions to linears of a graph, and folding them away."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from rewriter.errors import PlanError
from rewriter.graph import LINEAR, argument, as_linear, aten, place
from rewriter.recover.stages import Lora


def add_lora(
    module: GraphModule, options: Lora, seed: int
) -> tuple[GraphModule, dict[str, Tensor], dict[str, tuple[str, str]]]:
    """A copy of the graph in which chosen linears have a trainable addition x Aᵀ Bᵀ α/r.

    Returns:
        The copy; the new tensors by name, A [r, in] (random) and B [out, r] (zero); and for
        every changed weight the names of its A and B.

    Raises PlanError: no linear matches.
    """
    from rewriter.calibration import copy_module

    module = copy_module(module)
    random = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    pairs: dict[str, tuple[str, str]] = {}
    names = []
    for node in list(module.graph.nodes):
        linear = as_linear(node)
        if linear is None or node.target is not LINEAR:
            continue
        names.append(linear.name)
        weight = str(linear.weight.target)
        if weight in pairs or not any(_matches(t, linear.name) for t in options.targets):
            continue
        owner, _, leaf = weight.rpartition(".")
        value = getattr(module.get_submodule(owner), leaf)
        out, width = value.shape
        a, b = f"{linear.name}.lora.a", f"{linear.name}.lora.b"
        scale = 1 / math.sqrt(width)
        made[a] = (torch.rand(options.rank, width, generator=random) * 2 - 1) * scale
        made[b] = torch.zeros(out, options.rank)
        for name in (a, b):
            made[name] = made[name].to(value.device)
            place(module, name, nn.Parameter(made[name]))
        with module.graph.inserting_after(node):
            sum_node = module.graph.call_function(aten.add.Tensor, (node, node))
        with module.graph.inserting_before(sum_node):
            nodes = [module.graph.get_attr(n) for n in (a, b)]
            low = module.graph.call_function(LINEAR, (argument(node, "input"), nodes[0]))
            high = module.graph.call_function(LINEAR, (low, nodes[1]))
            factor = options.alpha / options.rank
            scaled = module.graph.call_function(aten.mul.Tensor, (high, factor))
        node.replace_all_uses_with(sum_node)
        sum_node.args = (node, scaled)
        pairs[weight] = a, b
    if not pairs:
        raise PlanError(
            f"lora: no linear matches {options.targets}",
            f"linears: {', '.join(list(dict.fromkeys(names))[:6])} …",
        )
    module.graph.lint()
    module.recompile()
    return module, made, pairs


def fold(weight: Tensor, a: Tensor, b: Tensor, options: Lora) -> Tensor:
    """W + α/r B A, computed in float64."""
    change = (b.double() @ a.double()) * (options.alpha / options.rank)
    return (weight.detach().double() + change.to(weight.device)).to(weight.dtype)


def _matches(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.fullmatch(target[3:], name) is not None
    return target == name
