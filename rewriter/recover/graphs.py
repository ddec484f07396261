"""Pieces of a graph as functions.

A piece has named values as inputs and outputs. Trained tensors are arguments of it, frozen ones
belong to it and keep their memory, so pieces of teacher and student share every frozen weight.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from rewriter import state
from rewriter.errors import RewriterError
from rewriter.graph import (
    LINEAR,
    Graph,
    argument,
    as_linear,
    aten,
    layer_of,
    on_device,
    path_of,
    place,
)
from rewriter.recover.fast import FORMS, cut


@dataclass
class Piece:
    """Part of a graph: `piece(values, tensors)`, both by name, gives its outputs in order."""

    module: GraphModule
    inputs: list[str]
    trained: list[str]
    outputs: list[str]

    def __call__(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
        given = [values[n] for n in self.inputs] + [tensors[n] for n in self.trained]
        return self.module(*given)


@dataclass
class Frozen:
    """Frozen tensors as pieces hold them: one copy each, on one device.

    half: linears of a float32 model run in bfloat16 (input, weight and bias; their result is
    float32 again), everything else stays as it is.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    half: bool = False
    _placed: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def tensor(self, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or value.dtype
        key = (value.data_ptr(), dtype)
        if key not in self._placed:  # the source is kept: its address stays its own
            self._placed[key] = value, value.detach().to(self.device, dtype)
        return self._placed[key][1]


def stateless(graph: Graph) -> GraphModule:
    """The graph without the state that `thread_state` added; names of other nodes stay."""
    from rewriter.calibration import copy_module

    module = copy_module(graph.module)
    drop: list[Node] = []
    for node in list(module.graph.nodes):
        if node.target in (state.update_kv, state.update_ring):
            key, value, mask = node.args[1:4]
            for user in list(node.users):
                index = user.args[1]
                user.replace_all_uses_with((key, value, mask, None)[index])  # type: ignore[index, arg-type]
                drop.append(user)
            drop.append(node)
        elif node.target is state.read:
            _replace_by_none(node)
            drop.append(node)
        elif node.target is state.write:
            drop.append(node)
    for node in drop:
        if not node.users:
            module.graph.erase_node(node)
    for node in reversed([n for n in module.graph.nodes if n.op == "placeholder"]):
        if str(node.target).startswith("state_") and not node.users:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    return module


def _replace_by_none(node: Node) -> None:
    for user in list(node.users):
        user.args = map_arg(user.args, lambda n: None if n is node else n)
        user.kwargs = map_arg(user.kwargs, lambda n: None if n is node else n)


def extract(
    module: GraphModule,
    inputs: Sequence[str],
    outputs: Sequence[str],
    trained: Iterable[str] = (),
    frozen: Frozen | None = None,
    fast: bool = True,
) -> Piece:
    """The part of a graph that computes `outputs` from `inputs` (names of nodes).

    Args:
        trained: names of tensors that become arguments.
        frozen: where the other tensors live, and in which precision linears run.
        fast: our ops run as plain differentiable torch on the CPU, which saves their second
            forward; they hold more memory until the piece's backward is done.

    Raises RewriterError: an output needs an input of the graph that is not among `inputs`.
    """
    frozen = frozen or Frozen()
    known = {n.name: n for n in module.graph.nodes}
    needed = needed_by([known[n] for n in outputs], {known[n] for n in inputs})
    wanted = set(trained)
    fx, root = FxGraph(), nn.Module()
    made: dict[Node, Node] = {known[n]: fx.placeholder(n) for n in inputs}
    order = [n for n in module.graph.nodes if n in needed and n not in made]
    used = list(
        dict.fromkeys(str(n.target) for n in order if n.op == "get_attr" and n.target in wanted)
    )
    arguments = {name: fx.placeholder(f"trained_{i}") for i, name in enumerate(used)}
    low: dict[Node, Node] = {}
    fast = fast and frozen.device.type == "cpu"
    cuts = _cuts(order) if fast else {}
    parts: dict[tuple[Node, int], Node] = {}
    attributes: dict[str, Node] = {}

    def attribute(name: str, value: Tensor) -> Node:
        if name not in attributes:
            place(root, name, value)
            attributes[name] = fx.get_attr(name)
        return attributes[name]

    for node in order:
        if node.op == "placeholder":
            raise RewriterError(f"{outputs[0]} needs the graph's input {node.name}")
        if node.op == "get_attr":
            name = str(node.target)
            if name in arguments:
                made[node] = arguments[name]
            elif not (frozen.half and all(_half_linear(u, wanted) for u in node.users)):
                made[node] = attribute(name, frozen.tensor(_tensor(module, name)))
            continue
        if frozen.half and node.target is LINEAR:
            if _half_linear(node, wanted):
                made[node] = _emit_half(fx, module, node, made, low, frozen, attribute)
            else:
                made[node] = _emit_trained_half(fx, node, made, low)
            continue
        if node in cuts:
            source, dim, sizes, index = cuts[node]
            if (source, dim) not in parts:
                parts[source, dim] = _extra(fx, cut, (made[source], dim, sizes))
            made[node] = _extra(fx, operator.getitem, (parts[source, dim], index))
            continue
        target = _plain(node.target) if fast else node.target
        args, kwargs = map_arg((node.args, node.kwargs), made.__getitem__)
        args, kwargs = on_device((args, kwargs), frozen.device)
        made[node] = fx.create_node("call_function", target, args, kwargs, node.name)
    fx.output(tuple(made[known[n]] for n in outputs))
    piece = GraphModule(root, fx)
    return Piece(piece, list(inputs), used, list(outputs))


def _extra(fx: FxGraph, target: Any, arguments: tuple[Any, ...]) -> Node:
    """A node of our own: the others keep their names."""
    return fx.create_node("call_function", target, arguments, {}, "extra")


def needed_by(outputs: list[Node], stop: set[Node]) -> set[Node]:
    seen: set[Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in stop:
            stack += node.all_input_nodes
    return seen


def _tensor(module: GraphModule, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def _half_linear(node: Node, trained: set[str]) -> bool:
    """A float32 linear whose weight and bias are frozen."""
    linear = as_linear(node)
    if linear is None or node.target is not LINEAR:
        return False
    return not {str(n.target) for n in (linear.weight, linear.bias) if n is not None} & trained


def _emit_half(
    fx: FxGraph,
    module: GraphModule,
    node: Node,
    made: dict[Node, Node],
    low: dict[Node, Node],
    frozen: Frozen,
    attribute: Callable[[str, Tensor], Node],
) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    if source not in low:
        low[source] = _extra(fx, aten.to.dtype, (made[source], torch.bfloat16))
    given = [low[source]]
    for name in ("weight", "bias"):
        tensor = argument(node, name)
        if tensor is not None:
            half = frozen.tensor(_tensor(module, str(tensor.target)), torch.bfloat16)
            given.append(attribute(f"{tensor.target}_bfloat16", half))
    result = _extra(fx, LINEAR, tuple(given))
    return fx.create_node("call_function", aten.to.dtype, (result, torch.float32), {}, node.name)


def _emit_trained_half(
    fx: FxGraph, node: Node, made: dict[Node, Node], low: dict[Node, Node]
) -> Node:
    """A trained linear: float32 weights, rounded for the product; float32 bias and result."""
    source, weight, bias = (argument(node, n) for n in ("input", "weight", "bias"))
    if source not in low:
        low[source] = _extra(fx, aten.to.dtype, (made[source], torch.bfloat16))
    rounded = _extra(fx, aten.to.dtype, (made[weight], torch.bfloat16))
    result = _extra(fx, LINEAR, (low[source], rounded))
    result = _extra(fx, aten.to.dtype, (result, torch.float32))
    if bias is None:
        return result
    return _extra(fx, aten.add.Tensor, (result, made[bias]))


def _plain(target: Any) -> Any:
    """The differentiable torch form behind an op of ours, or the target itself."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "rewriter":
        return target
    return FORMS.get(target._schema.name.split("::")[1], target)


def _cuts(nodes: list[Node]) -> dict[Node, tuple[Node, int, list[int], int]]:
    """Slices that lie end to end from 0: their source, dimension, all sizes, and own index.

    The gradient of every slice is as large as its source; that of one split is not.
    """
    groups: dict[tuple[Node, int], list[Node]] = {}
    for node in nodes:
        if node.target is aten.slice.Tensor and not node.kwargs and len(node.args) in (3, 4):
            source, dim = node.args[:2]
            plain = all(isinstance(a, int) and a >= 0 for a in node.args[1:])
            if isinstance(source, Node) and plain:
                groups.setdefault((source, dim), []).append(node)  # type: ignore[arg-type]
    found: dict[Node, tuple[Node, int, list[int], int]] = {}
    for (source, dim), parts in groups.items():
        parts.sort(key=lambda n: n.args[2])  # type: ignore[arg-type, return-value]
        ends: list[Any] = [n.args[3] if len(n.args) == 4 else 2**63 - 1 for n in parts]
        starts: list[Any] = [n.args[2] for n in parts]
        if len(parts) < 2 or starts != [0, *ends[:-1]]:
            continue
        sizes = [e - s for s, e in zip(starts, ends, strict=True)]
        if ends[-1] > 2**31:
            sizes.pop()
        for index, node in enumerate(parts):
            found[node] = source, dim, sizes, index
    return found


def release(modules: list[GraphModule], trained: set[str]) -> None:
    """Keep only bfloat16 of the weights that nothing but frozen linears read, in every graph.

    What else there is moves to memory of its own, so that a mapped file can be let go.
    """
    readers: dict[str, list[Node]] = {}
    for module in modules:
        for node in module.graph.nodes:
            if node.op == "get_attr":
                readers.setdefault(str(node.target), []).extend(node.users)
    for name, users in readers.items():
        low = name not in trained and all(_half_linear(u, trained) for u in users)
        owner, _, leaf = name.rpartition(".")
        moved: dict[int, tuple[Tensor, Tensor]] = {}  # the old one too: its address stays its own
        for module in modules:
            place_ = module.get_submodule(owner) if _has(module, owner) else None
            value = getattr(place_, leaf, None)
            if not isinstance(value, Tensor):
                continue
            dtype = torch.bfloat16 if low and value.dtype == torch.float32 else value.dtype
            if value.data_ptr() not in moved:
                moved[value.data_ptr()] = value, value.detach().to(dtype, copy=True)
            new = moved[value.data_ptr()][1]
            parameter = isinstance(value, nn.Parameter)
            place(module, name, nn.Parameter(new, False) if parameter else new)


def _has(module: nn.Module, path: str) -> bool:
    for part in path.split(".") if path else ():
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True


def segments(
    module: GraphModule, inputs: list[str], outputs: list[str], **options: Any
) -> list[Piece]:
    """The computation of `outputs` as a chain of pieces, one a layer (for checkpointing)."""
    known = {n.name: n for n in module.graph.nodes}
    given = {known[n] for n in inputs}
    needed = needed_by([known[n] for n in outputs], given) - given
    calls = [n for n in module.graph.nodes if n in needed and n.op == "call_function"]
    groups: list[list[Node]] = []
    current: Any = ()
    for node in calls:
        layer = layer_of(path_of(node))
        if not groups or layer != current:
            groups.append([])
            current = layer
        groups[-1].append(node)
    position = {n: i for i, group in enumerate(groups) for n in group}
    pieces = []
    for index, group in enumerate(groups):
        leaving = [
            n.name
            for n in group
            if n.name in outputs or any(position.get(u, -1) > index for u in n.users)
        ]
        entering = {
            p
            for n in group
            for p in n.all_input_nodes
            if p.op != "get_attr" and position.get(p, -1) != index
        }
        names = [n.name for n in module.graph.nodes if n in entering]
        if leaving:
            pieces.append(extract(module, names, leaving, **options))
    return pieces
