"""An encoder-decoder is captured as one graph; here it is cut into what runs when.

    encoder   its inputs to the last hidden states, once for an input
    memory    hidden states to all that the decoder reads of them: the keys and values of every
              cross attention and their mask, once for a sequence
    decoder   tokens, memory and states to the outputs, at every call

The cut follows the dataflow, so it is the same for every architecture, and whatever a pass has
done to the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node

from rewriter.graph import Graph, aten
from rewriter.lift.matching import expression
from rewriter.state import dependents

#: Key of transformers' output classes for what the encoder has made.
HIDDEN = "encoder_last_hidden_state"


@dataclass(frozen=True)
class Part:
    """A piece of a graph that runs on the whole graph's tensors: `part.run(root, *values)`."""

    inputs: list[str]
    outputs: list[str]
    graph: FxGraph
    run: Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Parts:
    """The three parts; inputs of `decoder` are its own, then the memory's outputs, then states."""

    encoder: Part
    memory: Part
    decoder: Part


def hidden_states(graph: Graph) -> Node | None:
    """The encoder's last hidden states, of a graph that has an encoder and a decoder."""
    if HIDDEN not in graph.outputs:
        return None
    output = next(n for n in graph.nodes if n.op == "output")
    return output.args[0][graph.outputs.index(HIDDEN)]  # type: ignore[index,return-value]


def _ancestors(nodes: list[Node], stop: list[Node]) -> set[Node]:
    """Everything that the nodes are computed from, themselves included; not beyond `stop`."""
    found: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [] if node in stop else node.all_input_nodes
    return found


def _sides(graph: Graph, hidden: Node) -> tuple[list[Node], list[Node]]:
    """Placeholders that the encoder reads, and the others."""
    read = _ancestors([hidden], [])
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    return [p for p in placeholders if p in read], [p for p in placeholders if p not in read]


def memory_nodes(graph: Graph) -> list[Node]:
    """What the decoder reads of the encoded input: nodes before any token, used by later ones."""
    hidden = hidden_states(graph)
    if hidden is None:
        return []
    encoder, decoder = _sides(graph, hidden)
    late = dependents(graph, decoder)
    encoded = dependents(graph, encoder)
    return [
        n
        for n in graph.nodes
        if n in encoded and n not in late and any(u in late and u.op != "output" for u in n.users)
    ]


def split(graph: Graph) -> Parts:
    """Cut a graph with an encoder; the parts share its tensors."""
    hidden = hidden_states(graph)
    assert hidden is not None, "the graph has no encoder"
    encoder, decoder = _sides(graph, hidden)
    own = [p for p in decoder if p.target in graph.inputs]
    states = [p for p in decoder if p.target not in graph.inputs]
    memory = memory_nodes(graph)
    output = next(n for n in graph.nodes if n.op == "output")
    values: Any = output.args[0]
    results = [n for n in values if n is not hidden]
    late = dependents(graph, decoder)
    effects = [n for n in graph.nodes if n.op == "call_function" and n.is_impure()]
    hidden_effects = [n for n in effects if n not in late]
    return Parts(
        _part(graph, encoder, [hidden], hidden_effects),
        _part(graph, [hidden, *encoder], memory, []),
        _part(graph, [*own, *memory, *states], results, [n for n in effects if n in late]),
    )


def _part(graph: Graph, inputs: list[Node], outputs: list[Node], effects: list[Node]) -> Part:
    needed = _ancestors([*outputs, *effects], inputs)
    made = FxGraph()
    copies: dict[Node, Node] = {n: made.placeholder(n.name, default_value=None) for n in inputs}
    for node in graph.nodes:
        if node in needed and node not in copies:
            copies[node] = made.node_copy(node, copies.__getitem__)
    made.output(tuple(copies[n] for n in outputs))
    made.lint()
    run = type(GraphModule(graph.module, made)).forward
    names = [str(n.target) if n.op == "placeholder" else n.name for n in inputs]
    return Part(names, [n.name for n in outputs], made, run)


def own_sizes(graph: Graph) -> None:
    """After the encoder, take sizes from its output or from the decoder's inputs.

    Export takes every size from the first input that has it, so the decoder's batch is read off
    the encoder's tokens, which no later call has.
    """
    hidden = hidden_states(graph)
    if hidden is None:
        return
    order = {n: i for i, n in enumerate(graph.nodes)}
    encoder, decoder = _sides(graph, hidden)
    sees_tokens = dependents(graph, decoder, sizes=False)
    early = dependents(graph, encoder) - sees_tokens
    made: dict[tuple[Node, int], Node] = {}

    def size(source: Node, after: Node, value: Any) -> Node | None:
        shape = [expression(s) for s in source.meta["val"].shape]
        if value not in shape:
            return None
        key = (source, shape.index(value))
        if key not in made:
            with graph.module.graph.inserting_after(after):
                made[key] = graph.call(aten.sym_size.int, *key)
            made[key].meta["val"] = source.meta["val"].shape[key[1]]
        return made[key]

    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    for node in list(order):
        value = node.meta.get("val")
        if node not in early or isinstance(value, Tensor) or value is None:
            continue
        for user in list(node.users):
            if order.get(user, -1) <= order[hidden]:
                continue
            sources = [(p, last) for p in decoder] if user in sees_tokens else []
            for source, after in [*sources, (hidden, hidden)]:
                if (found := size(source, after, expression(value))) is not None:
                    user.replace_input_with(node, found)
                    break
