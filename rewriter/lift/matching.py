"""Small helpers of the lifter: naming, looking and inserting in an exported graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

aten = torch.ops.aten

#: A value at or below this hides a position in a softmax.
HIDDEN = -1e4
#: Ops that pass their first input on, at inference.
NOISE = {"to", "_to_copy", "clone", "contiguous", "dropout", "detach", "alias", "lift_fresh_copy"}
RESHAPES = {"view", "reshape", "_unsafe_view"}
#: Ops whose output shares storage with their first input.
VIEWS = {
    "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "slice", "select",
    "expand", "broadcast_to", "alias", "detach", "unflatten", "flatten", "numpy_T", "t", "narrow",
}  # fmt: skip


class NotLifted(Exception):
    """Why a subgraph that looks like attention stays as it is: one sentence."""


def op_name(node: Any) -> str:
    """ATen name without overload and in-place underscore: `masked_fill`; '' for no ATen op."""
    if not isinstance(node, Node) or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    name = node.target._schema.name.split("::")[1]
    return name if name.startswith("__") else name.removesuffix("_")


def is_mutation(node: Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def argument(node: Node, name: str) -> Any:
    """Argument by schema name, with the schema's default."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    for position, entry in enumerate(schema):
        if entry.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, entry.default_value)
    raise KeyError(name)


def shape(node: Node) -> list[Any]:
    """Shape as ints and sympy expressions, comparable with ==; [] when not a tensor."""
    value = node.meta.get("val")
    return [expression(d) for d in value.shape] if isinstance(value, Tensor) else []


def expression(size: Any) -> Any:
    """A size as an int where it is static, else its sympy expression."""
    if isinstance(size, torch.SymInt):
        size = size.node.expr
        return int(size) if size.is_number else size
    return size


def module_path(node: Node) -> str:
    """Path of the module whose forward made this node."""
    if "path" in node.meta:
        return node.meta["path"]
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return path.removeprefix("L['self']").removeprefix(".")


class Editor:
    """Inserts nodes before one node of the graph, with values and the module path."""

    def __init__(self, module: GraphModule, before: Node, like: Node) -> None:
        self.module, self.before, self.like = module, before, like

    def call(self, target: Any, *args: Any) -> Node:
        with self.module.graph.inserting_before(self.before):
            node = self.module.graph.call_function(target, args)
        node.meta["path"] = module_path(self.like)
        if "nn_module_stack" in self.like.meta:
            node.meta["nn_module_stack"] = self.like.meta["nn_module_stack"]
        values = map_arg(args, lambda n: n.meta["val"])
        fake = next((n.meta["val"] for n in node.all_input_nodes if _fake(n)), None)
        if fake is not None:
            with fake.fake_mode, torch.no_grad():
                node.meta["val"] = target(*values)
        return node

    def swap(self, node: Node, first: int, second: int) -> Node:
        """Transpose two dimensions, cancelling a transpose that is already there."""
        rank = len(shape(node))
        pair = {first % rank, second % rank}
        source = through_noise(node)
        if op_name(source) == "transpose":
            if {d % rank for d in source.args[1:3]} == pair:  # type: ignore[operator]
                return source.args[0]  # type: ignore[return-value]
        return self.call(aten.transpose.int, node, first, second)

    def permute(self, node: Node, order: list[int]) -> Node:
        """Permute; a swap of two dimensions becomes a transpose."""
        moved = [i for i, d in enumerate(order) if i != d]
        if not moved:
            return node
        if len(moved) == 2:
            return self.swap(node, *moved)
        return self.call(aten.permute.default, node, order)


def _fake(node: Node) -> bool:
    return isinstance(node.meta.get("val"), FakeTensor)


def through_noise(node: Node) -> Node:
    while op_name(node) in NOISE:
        node = node.args[0]  # type: ignore[assignment]
    return node


def tainted_nodes(module: GraphModule) -> set[Node]:
    """Nodes whose content another node changes in place, so that dataflow does not show it."""
    order = {n: i for i, n in enumerate(module.graph.nodes)}
    tainted: set[Node] = set()
    for node in module.graph.nodes:
        if not is_mutation(node) or not isinstance(node.args[0], Node):
            continue
        base, seen = node.args[0], [node.args[0]]
        while op_name(base) in VIEWS and isinstance(base.args[0], Node):
            base = base.args[0]
            seen.append(base)
        later = any(order[u] > order[node] for n in seen for u in n.users)
        if len(seen) > 1 or later:
            tainted.update(seen)
    return tainted


def active_nodes(module: GraphModule) -> set[Node]:
    """Nodes whose values depend on the model's tensor inputs: activations."""
    active: set[Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            if isinstance(node.meta.get("val"), Tensor):
                active.add(node)
        elif isinstance(node.meta.get("val"), Tensor | tuple | list) and any(
            p in active for p in node.all_input_nodes
        ):
            active.add(node)
    return active


def erase(node: Node) -> None:
    """Erase a node that nothing uses and then its inputs that only it used.

    fx's own sweep keeps dropout, in-place ops and metadata assertions; here they go with
    the computation that they belong to.
    """
    for user in list(node.users):
        if op_name(user).startswith("_assert"):
            user.graph.erase_node(user)
    if node.users or node.op != "call_function":
        return
    if is_mutation(node):
        base = node.args[0]
        if not isinstance(base, Node) or base.op != "call_function" or len(base.users) > 1:
            return
        if op_name(base) in VIEWS:
            return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for parent in inputs:
        if parent.graph is not None and not parent._erased:
            erase(parent)
