"""The part of a graph around one attention: from its hidden state to its output projection."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from rewriter.graph import SHAPE_OPS, Attention, Graph, Linear, argument, aten

ROLES = ("query", "key", "value")


@dataclass(frozen=True)
class Region:
    """Causal self-attention between two linears, ready to be replaced as a whole.

    hidden: [B, L, inputs], what the three projections read.
    output: [B, L, outputs], what the output projection makes.
    rows: for query, key and value, the rows of its projection that make it, head by head:
        [heads * width]; this is what tells a fused projection apart.
    """

    attention: Attention
    hidden: Node
    output: Node
    rows: dict[str, Tensor]
    heads: int
    kv_heads: int
    width: int
    inputs: int
    outputs: int

    def projection(self, role: str) -> Linear:
        return getattr(self.attention, f"{role}_projection")

    def weight(self, graph: Graph, role: str) -> Tensor:
        """[heads * width, inputs]."""
        linear = self.projection(role)
        weight = graph.tensor(linear.weight)
        return (weight.t() if linear.transposed else weight)[self.rows[role].to(weight.device)]

    def bias(self, graph: Graph, role: str) -> Tensor:
        """[heads * width]; zeros where the projection has none."""
        linear, rows = self.projection(role), self.rows[role]
        if linear.bias is None:
            return graph.tensor(linear.weight).new_zeros(len(rows))
        bias = graph.tensor(linear.bias)
        return bias[rows.to(bias.device)]

    def tensors(self) -> set[str]:
        """Names of the tensors that may have no user once the region is gone."""
        a = self.attention
        linears = [*(self.projection(r) for r in ROLES), a.output_projection]
        names = {str(n.target) for x in linears if x for n in (x.weight, x.bias) if n is not None}
        extra = [argument(a.node, n) for n in ("bias", "sink_logits")]
        stack = [*a.position_table, *(n for n in extra if n is not None)]
        seen: set[Node] = set()
        while stack:  # rotary frequencies, position biases: the last layer takes them along
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            stack += node.all_input_nodes
            if node.op == "get_attr":
                names.add(str(node.target))
        return names


def find_region(a: Attention) -> Region | str:
    """The region of an attention, or one sentence on why it cannot be replaced by a recurrence."""
    get = lambda name: argument(a.node, name)  # noqa: E731
    if not get("causal"):
        return "bidirectional: a recurrent mixer sees only the past"
    if a.dense_mask:
        return "its mask is a dense [L, S] tensor, not a padding mask of tokens"
    for role in ROLES:
        if getattr(a, f"{role}_projection") is None:
            return f"its {role} does not come from a linear inside {a.path or 'the model'}"
    if a.output_projection is None:
        return "its output does not go straight into a linear"
    query, key, value = (getattr(a, f"{role}_projection") for role in ROLES)
    if _unflattened(key.input) is not _unflattened(query.input):
        return "cross-attention: key and query are projections of different values"
    if _unflattened(value.input) is not _unflattened(query.input):
        return "its value is a projection of another tensor than its query"
    hidden, output = _unflattened(query.input), _restored(a.output_projection.node)
    if any(_dims(n) != 3 for n in (hidden, output)):
        return "its hidden state has no dimensions [batch, length, features]"

    width = int(get("query").meta["val"].shape[3])
    if int(get("value").meta["val"].shape[3]) != width:
        return "its value heads are not as wide as its key heads"
    rows: dict[str, Tensor] = {}
    starts = (a.query_before_rotary, a.key_before_rotary, get("value"))
    for role, start in zip(ROLES, starts, strict=True):
        found = _rows(getattr(a, f"{role}_projection"), start, width)
        if isinstance(found, Node):
            op = str(found.target).removeprefix("aten.").removesuffix(".default")
            where = "its use" if role == "value" else "the rotary embedding"
            return f"between the {role}'s projection and {where} there is {op} (a norm or scale)"
        rows[role] = found
    heads, kv_heads = len(rows["query"]) // width, len(rows["key"]) // width
    if len(rows["value"]) != len(rows["key"]) or heads % kv_heads:
        return "its key and value heads do not divide its query heads"
    inputs, outputs = (int(n.meta["val"].shape[2]) for n in (hidden, output))
    return Region(a, hidden, output, rows, heads, kv_heads, width, inputs, outputs)


def _dims(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0


def _unflattened(node: Node) -> Node:
    """The [B, L, D] value behind the [B L, D] that GPT-2's linears read."""
    flat = node.target in (aten.view.default, aten.reshape.default) and _dims(node) == 2
    return node.args[0] if flat else node  # type: ignore[return-value]


def _restored(node: Node) -> Node:
    """The [B, L, D] value made from a linear's [B L, D]."""
    users = list(node.users)
    if (
        _dims(node) == 2
        and len(users) == 1
        and users[0].target
        in (
            aten.view.default,
            aten.reshape.default,
        )
    ):
        return users[0]
    return node


def _rows(linear: Linear, value: Node, width: int) -> Tensor | Node:
    """Which outputs of `linear` make `value`: its shape ops, run on the outputs' numbers.

    Returns [heads * width] int64, or the first op that does more than move elements.
    """
    if not isinstance(value.meta.get("val"), Tensor):
        return value
    # A partial rotary splits every head first: step back to the whole head.
    while value.target is aten.slice.Tensor and value.meta["val"].shape[-1] != width:
        value = value.args[0]  # type: ignore[assignment]
    known: dict[Node, Any] = {}
    try:
        numbers = _evaluate(value, linear.node, known)
    except _Blocked as blocked:
        return blocked.node
    numbers = numbers[0]
    if numbers.dim() == 3:  # [H, L, d] or [L, H, d], the same for every position
        numbers = numbers[:, 0] if bool((numbers == numbers[:, :1]).all()) else numbers[0]
    elif numbers.dim() == 2:
        numbers = numbers[0]
    return numbers.reshape(-1)


class _Blocked(Exception):
    def __init__(self, node: Node) -> None:
        self.node = node


def _evaluate(node: Node, source: Node, known: dict[Node, Any]) -> Any:
    if node in known:
        return known[node]
    value: Any = node.meta.get("val")
    if node is source:
        sizes = [_size(s) for s in value.shape]
        result: Any = torch.arange(sizes[-1]).expand(sizes)
    elif isinstance(value, (int, torch.SymInt)):
        result = _size(value)
    elif node.target in SHAPE_OPS or node.target is operator.getitem:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: _evaluate(n, source, known))
        target: Any = node.target
        result = target(*args, **kwargs)
    else:
        raise _Blocked(node)
    known[node] = result
    return result


def _size(value: int | torch.SymInt) -> int:
    """A size with every symbol (batch, length) set to 1."""
    if isinstance(value, int):
        return value
    expression = value.node.expr
    return int(expression.subs({s: 1 for s in expression.free_symbols}))


class Caller:
    """Appends calls to a graph at its cursor, with fake values so that later passes see shapes."""

    def __init__(self, graph: Graph, path: str, like: Node) -> None:
        self.graph, self.path = graph, path
        self.mode = getattr(like.meta.get("val"), "fake_mode", None)

    def tensor(self, name: str, value: Tensor) -> Node:
        node = self.graph.add_tensor(f"{self.path}.{name}", value)
        if self.mode is not None:
            node.meta["val"] = self.mode.from_tensor(self.graph.tensor(node), static_shapes=True)
        return node

    def __call__(self, target: Any, *args: Any) -> Node:
        node = self.graph.call(target, *args, path=self.path)
        if self.mode is not None:
            with self.mode, torch.no_grad():
                node.meta["val"] = target(*map_arg(node.args, lambda n: n.meta["val"]))
        return node
