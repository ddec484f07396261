"""What an honest report shows beside a result: cheap things that need no training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from tqdm import tqdm

from rewriter.calibration import copy_module
from rewriter.graph import ATTENTION, aten, path_of, place, set_argument
from rewriter.recover.graphs import Frozen, extract
from rewriter.recover.modules import LanguageModel, input_values, inputs_of, token_losses
from rewriter.recover.regions import Region

WINDOW, SINKS = 64, 4


def perplexity(
    module: GraphModule, frozen: Frozen, windows: Tensor, tensors: dict[str, Tensor] | None = None
) -> float:
    """Perplexity of a (stateless) graph on windows [N, T]; `tensors` replace its own by name."""
    tensors = tensors or {}
    model = LanguageModel(module, frozen, set(tensors))
    total = count = 0.0
    for row in tqdm(windows, desc="perplexity", leave=False, disable=None):
        losses = token_losses(model, row[None].to(frozen.device), tensors)
        total, count = total + float(losses.double().sum()), count + losses.numel()
    return math.exp(min(total / count, 700))


def deleted(teacher: GraphModule, regions: list[Region]) -> GraphModule:
    """The original without the regions: each gives zero."""
    return _constant(teacher, {r.target: torch.zeros(()) for r in regions})


@torch.no_grad()
def mean_output(
    teacher: GraphModule, regions: list[Region], frozen: Frozen, text: Tensor
) -> GraphModule:
    """The original with every region's mean output on `text` [N, T] in its place."""
    names = tuple(dict.fromkeys(r.target for r in regions))
    piece = extract(teacher, inputs_of(teacher), names, (), frozen)
    sums: list[Any] = [0] * len(names)
    for row in text:
        made = piece(input_values(teacher, row[None].to(frozen.device)), {})
        sums = [s + v.flatten(0, -2).mean(0) for s, v in zip(sums, made, strict=True)]
    return _constant(teacher, {n: s / len(text) for n, s in zip(names, sums, strict=True)})


def windowed(teacher: GraphModule, regions: list[Region]) -> GraphModule | None:
    """The original with a window of 64 and 4 sinks in the regions; None: no attention there."""
    module, found = copy_module(teacher), False
    for node in module.graph.nodes:
        if node.target is ATTENTION and any(_inside(path_of(node), r.site) for r in regions):
            set_argument(node, "window", WINDOW)
            set_argument(node, "sinks", SINKS)
            found = True
    return module if found else None


def _inside(path: str, site: str) -> bool:
    return path == site or path.startswith(site + ".")


def _constant(teacher: GraphModule, values: dict[str, Tensor]) -> GraphModule:
    module = copy_module(teacher)
    for node in list(module.graph.nodes):
        if node.name not in values:
            continue
        name = f"constant.{node.name}"
        value = values[node.name]
        place(module, name, nn.Parameter(value.cpu(), requires_grad=False))
        with module.graph.inserting_after(node):
            zero = module.graph.call_function(aten.zeros_like.default, (node,))
        with module.graph.inserting_after(zero):
            constant = module.graph.get_attr(name)
        with module.graph.inserting_after(constant):
            made = module.graph.call_function(aten.add.Tensor, (zero, constant))
        node.replace_all_uses_with(made, delete_user_cb=lambda user, zero=zero: user is not zero)
    module.recompile()
    return module
