"""How a file in `ops/` says what an op of the dialect becomes in ONNX.

Three tables. A *fusion* recognises a few ATen operators as one. A *lowering* replaces a
`rewriter::` op of the fx graph by a torch function that `torch.export` can trace; the function
may emit contrib operators, or an operator of the domain `rewriter` that stands for a subgraph
which is easier to write in ONNX than to trace. An *expansion* writes that subgraph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Node

from rewriter.backends.onnx.capabilities import Capabilities
from rewriter.backends.onnx.nodes import Nodes
from rewriter.errors import RewriterError
from rewriter.plugins import discover


@dataclass(frozen=True)
class StateTensor:
    """One tensor that an exported file takes from its last call.

    input, output: names. shape: without the batch, which comes first; 0 where it grows.
    grows: the dimension (batch counted) that is the number of past tokens, or None.
    dtype: numpy's name. shared: whether the operator extends or overwrites the past in place, if
    one buffer is bound to both and has room. aligned: whether where it keeps a token depends on
    the padding before it, so that rows of different sequences cannot be put into one batch. A
    sequence starts with zeros.
    """

    input: str
    output: str
    shape: tuple[int, ...]
    grows: int | None
    dtype: str
    shared: bool = False
    aligned: bool = False

    def start(self, batch: int) -> Tensor:
        return torch.zeros((batch, *self.shape), dtype=getattr(torch, self.dtype))

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"shape": list(self.shape)}


@dataclass
class Context:
    """What a lowering may look at and edit.

    graph: the fx graph. values: shapes and types of its nodes, as meta tensors by name.
    style: "fused" or "standard". can: what the installed runtime does.
    """

    graph: torch.fx.Graph
    values: dict[str, Any]
    style: str
    can: Capabilities
    fallbacks: list[str] = field(default_factory=list)
    states: dict[str, StateTensor] = field(default_factory=dict)
    outputs: dict[str, Node] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def fused(self) -> bool:
        return self.style == "fused"

    def value(self, node: Any) -> Tensor:
        return self.values[node.name]

    def fall_back(self, reason: str) -> None:
        """Record why something is not what it could be, once."""
        if reason not in self.fallbacks:
            self.fallbacks.append(reason)

    def call(self, function: Any, *args: Any) -> Node:
        return self.graph.call_function(function, args)

    def outputs_of(self, node: Node, count: int) -> list[Node]:
        return [self.call(operator.getitem, node, i) for i in range(count)]

    def replace(self, node: Node, function: Any) -> None:
        """Call `function` with the op's arguments, in the order of its schema."""
        from rewriter.graph import argument

        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        node.args, node.kwargs = tuple(argument(node, n) for n in names), {}
        node.target = function

    def state(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, grows: int | None = None
    ) -> Node:
        """A new input of the graph, `past_name`; its output is `present_name`."""
        kind = str(dtype).removeprefix("torch.")
        tensor = StateTensor(f"past_{name}", f"present_{name}", shape, grows, kind)
        self.states[tensor.input] = tensor
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            return self.graph.placeholder(tensor.input)

    def present(self, past: Node, new: Node) -> None:
        """`new` is what the next call gets for `past`."""
        self.outputs[self.states[str(past.target)].output] = new

    def turn_state(self, past: Any, node: Node, output: int) -> bool:
        """Keep the state that only `node` reads, and makes as its `output`, with its last two
        dimensions exchanged; whether it could be. (It starts with zeros: no layout is its own.)
        """
        name = str(getattr(past, "target", None))
        if not self.alone(past, node, output):
            return False
        *first, m, n = self.states[name].shape
        self.states[name] = replace(self.states[name], shape=(*first, n, m))
        return True

    def alone(self, past: Any, node: Node, output: int) -> bool:
        """Whether only `node` reads this state, and makes the next one as its `output`."""
        name = str(getattr(past, "target", None))
        made = [u for u in node.users if u.target is operator.getitem and u.args[1] == output]
        return name in self.states and len(past.users) == len(made) == 1 and not made[0].users

    def share(self, past: Node) -> None:
        """The operator extends this state, or writes the next one over it, in place."""
        self._say(past, shared=True)

    def align(self, past: Node) -> None:
        """Where the operator keeps a token in this state depends on the padding before it."""
        self._say(past, aligned=True)

    def _say(self, past: Node, **how: bool) -> None:
        name = str(past.target)
        self.states[name] = replace(self.states[name], **how)  # type: ignore[arg-type]


Lowering = Callable[[Node, Context], None]
Expansion = Callable[[ir.Node, Nodes, dict[Any, Any]], list[ir.Value]]

Fusion = Callable[[Node, Context], bool]

FUSIONS: list[Fusion] = []
LOWERINGS: dict[Any, Lowering] = {}
EXPANSIONS: dict[str, Expansion] = {}


def fuses(function: Fusion) -> Fusion:
    """Register a function that is shown every node and may replace a pattern that ends at it."""
    FUSIONS.append(function)
    return function


def lowers(target: Any) -> Callable[[Lowering], Lowering]:
    """Register a function that replaces every node that calls `target`."""

    def register(function: Lowering) -> Lowering:
        LOWERINGS[target] = function
        return function

    return register


def expands(op_type: str) -> Callable[[Expansion], Expansion]:
    """Register a function that writes what `rewriter::op_type` stands for."""

    def register(function: Expansion) -> Expansion:
        EXPANSIONS[op_type] = function
        return function

    return register


def lower_nodes(context: Context) -> None:
    """Apply fusions, then lowerings. Raises RewriterError for an op of the dialect without one."""
    discover("rewriter.backends.onnx.ops")
    for node in list(context.graph.nodes):
        if node.op == "call_function" and not node._erased:
            with context.graph.inserting_before(node):
                any(fusion(node, context) for fusion in FUSIONS)
    for node in list(context.graph.nodes):
        if node.op != "call_function" or node._erased:
            continue
        if (lowering := LOWERINGS.get(node.target)) is not None:
            with context.graph.inserting_before(node):
                lowering(node, context)
        elif getattr(node.target, "namespace", "") == "rewriter":
            raise RewriterError(
                f"{node.target} has no ONNX lowering",
                f"add backends/onnx/ops/{node.target._schema.name.split('::')[-1]}.py",
            )


def expand_nodes(model: ir.Model) -> None:
    """Write what nodes of the domain `rewriter` stand for."""
    memo: dict[Any, Any] = {}
    for node in list(model.graph):
        if node.domain != "rewriter":
            continue
        op = Nodes(node.name or node.outputs[0].name or node.op_type)
        outputs = EXPANSIONS[node.op_type](node, op, memo)
        for old, new in zip(node.outputs, outputs, strict=True):
            new.name, new.shape, new.type = old.name, old.shape, old.type
        model.graph.insert_before(node, op.made)
        ir.convenience.replace_all_uses_with(node.outputs, outputs, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
    model.graph.sort()  # a fused node may come after a reader of what it replaced


def emit(
    op: str,
    inputs: list[Tensor | None],
    attributes: dict[str, object],
    outputs: list[tuple[torch.dtype, tuple[object, ...]]],
    domain: str = "com.microsoft",
) -> list[Tensor]:
    """In a traced function: one ONNX node with these output types and shapes."""
    while inputs[-1] is None:
        inputs = inputs[:-1]
    return list(
        torch.onnx.ops.symbolic_multi_out(
            f"{domain}::{op}",
            inputs,
            attrs=attributes,  # type: ignore[arg-type]
            dtypes=[dtype for dtype, _ in outputs],
            shapes=[shape for _, shape in outputs],  # type: ignore[misc]
            version=1,
        )
    )
