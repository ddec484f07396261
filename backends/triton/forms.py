"""The graph as Triton runs it: one kernel for every op of the dialect, low-rank linears packed."""

from __future__ import annotations

import importlib
import importlib.util
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from rewriter.calibration import copy_module
from rewriter.errors import RewriterError
from rewriter.graph import Graph, argument, as_linear, aten, path_of
from rewriter.kernels.autograd import TRITON

LOW_RANK = torch.ops.rewriter.low_rank_linear.default
SIBLINGS = 4


def dialect(module: GraphModule) -> list[Node]:
    """Nodes of `rewriter::` ops, in order."""
    return [
        n
        for n in module.graph.nodes
        if isinstance(n.target, torch._ops.OpOverload) and n.target.namespace == "rewriter"
    ]


def form_of(target: Any) -> Callable[..., Any] | None:
    """`forward` of the Triton form of an op of the dialect, or None."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "rewriter":
        return None
    module = TRITON.get(target._schema.name.removeprefix("rewriter::"))
    if module is None or importlib.util.find_spec(module) is None:
        return None
    return getattr(importlib.import_module(module), "forward", None)


def require_forms(module: GraphModule) -> None:
    """Raises RewriterError that names every op without a Triton form, and where it stands."""
    lacking: dict[str, list[str]] = {}
    for node in dialect(module):
        if form_of(node.target) is None:
            lacking.setdefault(str(node.target).removesuffix(".default"), []).append(
                path_of(node) or node.name
            )
    if lacking:
        raise RewriterError(
            "no Triton form of "
            + "; ".join(f"{op} (at {', '.join(places[:3])})" for op, places in lacking.items()),
            "export to another backend, or leave out the step that makes it",
        )


class Interpreted(torch.fx.Interpreter):
    """Runs a graph with the Triton forms, on whatever device its tensors are."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        form = form_of(target)
        if form is None:
            return super().call_function(target, args, kwargs)
        schema = target._schema.arguments
        rest = [kwargs.get(a.name, a.default_value) for a in schema[len(args) :]]
        return form(*args, *rest)


# ---- low rank ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Match:
    """Nodes of one factored linear; what the low_rank pass writes."""

    x: Node
    first: Node  # get_attr
    second: Node | None  # get_attr; None: the pivot form at full rank
    bias: Node | None
    order: Node | None
    start: Node
    output: Node


def pack_low_rank(graph: Graph) -> Graph:
    """A copy in which factored linears are `low_rank_linear`, those of one input stacked.

    Exact up to the order of sums (specs/compress.md §2.5, `lowrank_packed`).
    """
    made = replace(graph, module=copy_module(graph.module))
    groups: dict[tuple[Node, bool], list[_Match]] = {}
    for node in made.nodes:
        if (match := _match(node)) is not None:
            groups.setdefault((match.x, match.order is not None), []).append(match)
    for (_, pivot), matches in groups.items():
        for start in range(0, len(matches), SIBLINGS):
            _pack(made, matches[start : start + SIBLINGS], pivot)
    made.module.graph.eliminate_dead_code()
    made.recompile()
    _forget_unused(made)
    return made


def _match(node: Node) -> _Match | None:
    """The factored linear that ends at this node."""
    outer = as_linear(node)
    if outer is not None and not outer.transposed:
        inner = as_linear(outer.input) if isinstance(outer.input, Node) else None
        if inner is None or inner.transposed or inner.bias is not None:
            return None
        if len(inner.node.users) != 1 or not str(inner.weight.target).endswith(".low_rank.b"):
            return None
        return _Match(inner.input, inner.weight, outer.weight, outer.bias, None, inner.node, node)
    if node.target is not aten.index_select.default:
        return None
    value, order = argument(node, "self"), argument(node, "index")
    if order.op != "get_attr" or not str(order.target).endswith(".low_rank.order"):
        return None
    second = None
    if value.target is aten.cat.default:
        value, rest = value.args[0]
        outer = as_linear(rest)
        assert outer is not None
        second = outer.weight
    inner = as_linear(value)
    assert inner is not None
    bias, output = None, node
    users = list(node.users)
    if len(users) == 1 and users[0].target is aten.add.Tensor:
        other = users[0].args[1]
        if isinstance(other, Node) and other.op == "get_attr":
            bias, output = other, users[0]
    return _Match(inner.input, inner.weight, second, bias, order, inner.node, output)


def _pack(graph: Graph, matches: list[_Match], pivot: bool) -> None:
    """One call for the matches, which read one input, in place of the first of them."""
    fx, tensor = graph.module.graph, graph.tensor
    ranks = [tensor(m.first).shape[0] for m in matches]
    factors = [
        tensor(m.first).new_empty(0, r) if m.second is None else tensor(m.second)
        for m, r in zip(matches, ranks, strict=True)
    ]
    widths = [f.shape[0] + (r if pivot else 0) for f, r in zip(factors, ranks, strict=True)]
    name = str(matches[0].first.target).rpartition(".")[0]
    starts = {m.start for m in matches}
    with fx.inserting_before(next(n for n in fx.nodes if n in starts)):

        def stacked(what: str, nodes: list[Node], values: list[Tensor]) -> Node:
            if len(values) == 1 and len(nodes) == 1:  # again: it may stand further down
                return fx.get_attr(str(nodes[0].target))
            return graph.add_tensor(f"{name}.{what}", torch.cat(values))

        first = stacked("first", [m.first for m in matches], [tensor(m.first) for m in matches])
        second = [
            graph.add_tensor(f"{name}.rest_{i}", factors[i])
            if m.second is None
            else fx.get_attr(str(m.second.target))
            for i, m in enumerate(matches)
        ]
        bias = order = None
        biases = [m.bias for m in matches if m.bias is not None]
        if biases:
            zeros = [factors[0].new_zeros(w) for w in widths]
            values = [
                z if m.bias is None else tensor(m.bias) for m, z in zip(matches, zeros, strict=True)
            ]
            bias = stacked("biases", biases, values)
        orders = [m.order for m in matches if m.order is not None]
        if orders:
            before = [sum(widths[:i]) for i in range(len(widths))]
            moved = [tensor(o) + s for o, s in zip(orders, before, strict=True)]
            order = stacked("orders", orders, moved)
        path = path_of(matches[0].output)
        call = graph.call(LOW_RANK, matches[0].x, first, second, bias, order, path=path)
        outputs = [call]
        if len(matches) > 1:
            split = graph.call(aten.split_with_sizes.default, call, widths, -1, path=path)
            count = range(len(matches))
            outputs = [graph.call(operator.getitem, split, i, path=path) for i in count]
    for match, output in zip(matches, outputs, strict=True):
        output.meta["val"] = match.output.meta.get("val")
        match.output.replace_all_uses_with(output)


def _forget_unused(graph: Graph) -> None:
    """`copy_module` shares tensors; drop the names that no node reads any more."""
    used = {name for name, _ in graph.parameters()}
    for name, _ in [*graph.module.named_parameters(), *graph.module.named_buffers()]:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(graph.module.get_submodule(owner), leaf)
