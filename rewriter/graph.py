"""The captured model: an fx graph over ATen and `rewriter::` ops, and views of its parts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

import rewriter.kernels  # noqa: F401  registers the dialect
from rewriter.errors import VerifyError

aten = torch.ops.aten
ATTENTION = torch.ops.rewriter.attention.default
ATTENTION_ARGS = [a.name for a in ATTENTION._schema.arguments]
LINEAR = aten.linear.default

#: Ops that only move elements; looked through when following a value.
SHAPE_OPS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.contiguous.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.unflatten.int,
    aten.flatten.using_ints,
    aten.slice.Tensor,
    aten.clone.default,
    aten.expand.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.select.int,
}


def place(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a parameter or buffer under a dotted name, making the modules on the way."""
    *folders, leaf = name.split(".")
    for part in folders:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(leaf, tensor)
    else:
        root.register_buffer(leaf, tensor)


def on_device(value: Any, device: torch.device) -> Any:
    """`value` (arguments of a node) with `device` wherever it names one.

    A graph names the device that it was captured on; its tensors may be on another now.
    """
    return map_aggregate(value, lambda v: device if isinstance(v, torch.device) else v)


def follow_device(module: GraphModule) -> bool:
    """Let a graph name the device that its tensors are on; whether it named another."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    device = next((t.device for t in tensors), None)
    if device is None:
        return False
    changed = False
    for node in module.graph.nodes:
        old = node.args, node.kwargs
        new = on_device(old, device)
        if repr(new) != repr(old):
            node.args, node.kwargs = new
            changed = True
    if changed:
        module.recompile()
    return changed


def path_of(node: Node) -> str:
    """Dotted path of the module whose forward made this node ('' for the model itself)."""
    return node.meta.get("path", "")


def layer_of(path: str) -> int | None:
    """Index of the layer that a module path lies in: its first number."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(found.group(1)) if found else None


def argument(node: Node, name: str) -> Any:
    """Argument of an ATen or dialect node by its schema name, with the schema's default."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    names = [a.name for a in schema]
    position = names.index(name)
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, schema[position].default_value)


def set_argument(node: Node, name: str, value: Any) -> None:
    """Set an argument of a node by its schema name."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


@dataclass(frozen=True)
class Linear:
    """One affine map `y = x Wᵀ + b` of the graph."""

    node: Node
    input: Node
    weight: Node  # get_attr
    bias: Node | None
    transposed: bool  # GPT-2's Conv1D stores Wᵀ

    @property
    def name(self) -> str:
        """Module path, from the name of the weight: `model.layers.0.mlp.up_proj`."""
        return str(self.weight.target).removesuffix(".weight")

    @property
    def layer(self) -> int | None:
        return layer_of(self.name)


@dataclass(frozen=True)
class Attention:
    """One attention node with the taps of its region, found by dataflow.

    A tap is None where the model has no such value. `query_projection` and the others are
    the linears that the values come from; a fused projection is the same one three times.
    """

    node: Node
    index: int
    path: str
    hidden: Node | None = None
    query_projection: Linear | None = None
    key_projection: Linear | None = None
    value_projection: Linear | None = None
    output_projection: Linear | None = None
    query_before_rotary: Node | None = None
    key_before_rotary: Node | None = None
    position_table: tuple[Node, ...] = ()

    @property
    def layer(self) -> int | None:
        return layer_of(self.path)

    @property
    def mask(self) -> Node | None:
        return argument(self.node, "mask")

    @property
    def kind(self) -> str:
        """Readable kind: `causal window 8 softcap 30`."""
        get = lambda name: argument(self.node, name)  # noqa: E731
        words = ["causal" if get("causal") else "bidirectional"]
        words += [f"{n} {get(n)}" for n in ("window", "chunk", "sinks") if get(n)]
        words += [f"softcap {get('softcap'):g}"] if get("softcap") else []
        words += ["bias"] if get("bias") is not None else []
        words += ["sink_logits"] if get("sink_logits") is not None else []
        words += ["dense mask"] if self.dense_mask else []
        return " ".join(words)

    @property
    def dense_mask(self) -> bool:
        value = self.mask.meta.get("val") if self.mask is not None else None
        return value is not None and value.dim() == 4


@dataclass
class Graph:
    """A model between two passes.

    Attributes:
        module: the fx module; parameters keep their original dotted names.
        config: the transformers config of the original, or None for a plain module.
        model_class: name of the class it was captured from.
        inputs: names of the graph's inputs that a caller gives, in order.
        outputs: keys of the original's output class that the graph returns, in order.
        output_class: import path of that class, or '' when the graph returns a bare tensor.
        decodes: a decoder whose padding mask has a length of its own, so that it can take a past.
        states: one specification for every state that `thread_state` added, in order.
        near_misses: attention-shaped subgraphs that were not lifted: (path, reason).
        dropped: names of original tensors that passes declared as dropped.
        untied: names of tensors split from a tie.
    """

    module: GraphModule
    config: Any = None
    model_class: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    output_class: str = ""
    decodes: bool = False
    default_positions: str = "column"  # or "mask": what forward without position_ids does
    states: list[dict[str, Any]] = field(default_factory=list)
    near_misses: list[tuple[str, str]] = field(default_factory=list)
    dropped: set[str] = field(default_factory=set)
    source_tensors: set[str] = field(default_factory=set)

    # ---- looking -----------------------------------------------------------------------

    @property
    def nodes(self) -> list[Node]:
        return list(self.module.graph.nodes)

    @property
    def attention(self) -> list[Attention]:
        """One entry for every attention node, in order of execution, with its taps."""
        found = [n for n in self.nodes if n.target is ATTENTION]
        return [_attention(n, i) for i, n in enumerate(found)]

    @property
    def linears(self) -> list[Linear]:
        """Every linear whose weight is a parameter, in order of execution."""
        return [x for n in self.nodes if (x := as_linear(n)) is not None]

    def placeholder(self, name: str) -> Node | None:
        return next((n for n in self.nodes if n.op == "placeholder" and n.target == name), None)

    def tensor(self, name: str | Node) -> Tensor:
        """Parameter or buffer by its dotted name (or its get_attr node)."""
        target = str(name.target) if isinstance(name, Node) else name
        owner, _, leaf = target.rpartition(".")
        return getattr(self.module.get_submodule(owner), leaf)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor the graph uses, once: name, tensor."""
        seen: set[str] = set()
        for node in self.nodes:
            if node.op == "get_attr" and str(node.target) not in seen:
                seen.add(str(node.target))
                yield str(node.target), self.tensor(node)

    # ---- editing -----------------------------------------------------------------------

    def add_tensor(self, name: str, value: Tensor, trainable: bool = True) -> Node:
        """Register `value` under a dotted name and return its get_attr node at the cursor."""
        value = value.detach().clone()
        trains = trainable and value.is_floating_point()
        place(self.module, name, nn.Parameter(value) if trains else value)
        node = self.module.graph.get_attr(name)
        node.meta["path"] = name.rpartition(".")[0]
        return node

    def call(self, target: Any, *args: Any, path: str = "", **kwargs: Any) -> Node:
        """Append a call at the cursor, stamped with the module path that it serves."""
        node = self.module.graph.call_function(target, args, kwargs)
        node.meta["path"] = path
        return node

    def sweep(self, declared: set[str] | None = None) -> set[str]:
        """Remove dead nodes and the tensors only they used; returns the dropped names.

        Only tensors in `declared` (names or prefixes) may be dropped; all, if it is None.
        """
        before = dict(self.parameters())
        self.module.graph.eliminate_dead_code()
        gone = set(before) - {name for name, _ in self.parameters()}
        for name in gone:
            if declared is not None and not any(
                name == d or name.startswith(d + ".") for d in declared
            ):
                raise VerifyError(f"the pass dropped {name} without declaring it")
            owner, _, leaf = name.rpartition(".")
            delattr(self.module.get_submodule(owner), leaf)
        self.dropped |= gone
        self.recompile()
        return gone

    def recompile(self) -> None:
        self.module.graph.lint()
        self.module.recompile()

    # ---- printing ----------------------------------------------------------------------

    def __str__(self) -> str:
        """The graph as text: one line a node, parameters by name, grouped by module path."""
        lines = [f"graph {self.model_class}({', '.join(self.inputs)})"]
        path = None
        for node in self.nodes:
            if node.op in ("placeholder", "get_attr"):
                continue
            if path_of(node) != path:
                path = path_of(node)
                lines.append(f"  # {path or 'model'}")
            if node.op == "output":
                lines.append(f"  return {_text(node.args[0])}")
                continue
            target = str(node.target) if node.op == "call_function" else f"{node.op} {node.target}"
            if not isinstance(node.target, torch._ops.OpOverload):
                target = getattr(node.target, "__name__", target)
            args = [_text(a) for a in node.args] + [
                f"{k}={_text(v)}" for k, v in node.kwargs.items()
            ]
            lines.append(f"  {node.name} = {target.removesuffix('.default')}({', '.join(args)})")
        return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, Node):
        return str(value.target) if value.op == "get_attr" else value.name
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_text(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_text(v)}" for k, v in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_linear(node: Node) -> Linear | None:
    """This node as a linear with parameters for weights, or None."""
    if node.target is LINEAR:
        weight, bias = argument(node, "weight"), argument(node, "bias")
        transposed, value = False, argument(node, "input")
    elif node.target is aten.addmm.default:  # transformers' Conv1D
        bias, value, weight = (argument(node, n) for n in ("self", "mat1", "mat2"))
        transposed = True
    else:
        return None
    if not isinstance(weight, Node) or weight.op != "get_attr":
        return None
    if bias is not None and (not isinstance(bias, Node) or bias.op != "get_attr"):
        return None
    return Linear(node, value, weight, bias, transposed)


def _inside(node: Node, path: str) -> bool:
    return node.op == "call_function" and (
        path_of(node) == path or path_of(node).startswith(path + ".")
    )


def _source(start: Node, path: str) -> tuple[Linear | None, Node | None, tuple[Node, ...]]:
    """Follow a value up to its projection: the linear, the value before rotary, the tables.

    Rotary is recognised by dataflow: the first combination with a value computed outside
    the region. The value before it is the last one that depends on the projection alone.
    """
    seen: list[Node] = []
    stack, linear = [start], None
    tables: list[Node] = []
    while stack:
        node = stack.pop(0)
        if node in seen:
            continue
        seen.append(node)
        if (found := as_linear(node)) is not None:
            linear = linear or found
            continue
        for parent in node.all_input_nodes:
            if parent.op == "get_attr":
                continue
            if _inside(parent, path):
                stack.append(parent)
            elif isinstance(parent.meta.get("val"), Tensor):
                tables.append(parent)
    if linear is None:
        return None, None, tuple(dict.fromkeys(tables))
    if tables:
        # Walk up from the attention until nothing below depends on the tables.
        tainted: set[Node] = set()
        reached = set(seen)
        for node in start.graph.nodes:
            if node in tables or (
                node in reached and any(p in tainted for p in node.all_input_nodes)
            ):
                tainted.add(node)
        used = {n for n in seen if any(u in tainted and u in seen for u in n.users)} - tainted
        before = next((n for n in start.graph.nodes if n in used), linear.node)
    else:
        before = start
    return linear, before, tuple(dict.fromkeys(tables))


def _sink(start: Node) -> Linear | None:
    """The first linear that an attention output flows into."""
    frontier, seen = [start], set()
    while frontier:
        node = frontier.pop(0)
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            if (found := as_linear(user)) is not None:
                return found if found.input is node or node.target in SHAPE_OPS else None
            if user.target in SHAPE_OPS or user.target in (aten.to.dtype, aten.dropout.default):
                frontier.append(user)
    return None


def _attention(node: Node, index: int) -> Attention:
    path = path_of(node)
    query, q_before, q_tables = _source(argument(node, "query"), path)
    key, k_before, k_tables = _source(argument(node, "key"), path)
    value, _, _ = _source(argument(node, "value"), path)
    return Attention(
        node=node,
        index=index,
        path=path,
        hidden=query.input if query else None,
        query_projection=query,
        key_projection=key,
        value_projection=value,
        output_projection=_sink(node),
        query_before_rotary=q_before,
        key_before_rotary=k_before,
        position_table=tuple(dict.fromkeys(q_tables + k_tables)),
    )
