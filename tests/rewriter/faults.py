"""Wrong rewrites to plant: each takes (graph, site, made) and spoils what a pass has made."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from rewriter.graph import Graph, argument, as_linear, aten, set_argument
from rewriter.passes._mamba2_mixer import CONV, SSD
from rewriter.passes.low_rank import LowRank
from rewriter.passes.mamba2 import Mamba2
from rewriter.passes.sliding_window import SlidingWindow
from rewriter.protocol import Made, Pass, Site

LENGTH, HEADS, WIDTH = 24, 4, 8
PASSES: dict[str, type[Pass]] = {
    "sliding_window": SlidingWindow,
    "low_rank": LowRank,
    "mamba2": Mamba2,
}


Fault = Callable[[Graph, Site, Made], None]


def insert(graph: Graph, node: Node, make: Callable[[Callable, Node], Node]) -> Node:
    """Put something between a node and all of its users."""
    new: set[Node] = set()
    users = list(node.users)

    def call(target, *args):
        made = graph.call(target, *args)
        new.add(made)
        return made

    with graph.module.graph.inserting_after(node):
        marker = graph.call(aten.clone.default, node)
    with graph.module.graph.inserting_before(marker):
        result = make(call, node)
    for user in users:
        user.replace_input_with(node, result)
    graph.module.graph.erase_node(marker)
    return result


def feed(graph: Graph, user: Node, name: str, make: Callable[[Callable, Node], Node]) -> None:
    """Change one argument of one node."""
    with graph.module.graph.inserting_before(user):
        made = make(lambda target, *args: graph.call(target, *args), argument(user, name))
    set_argument(user, name, made)


def times(factor: float):
    return lambda call, x: call(aten.mul.Tensor, x, factor)


def roll(amount: int, dim: int):
    return lambda call, x: call(aten.roll.default, x, [amount], [dim])


def flip(dim: int):
    return lambda call, x: call(aten.flip.default, x, [dim])


def swap_heads(call, x):
    """The first two heads of [B, L, H d] trade places."""
    cut = [call(aten.slice.Tensor, x, 2, i * WIDTH, (i + 1) * WIDTH) for i in (1, 0)]
    return call(aten.cat.default, [*cut, call(aten.slice.Tensor, x, 2, 2 * WIDTH, 2**63 - 1)], 2)


def swap_rows(call, x):
    cut = [call(aten.slice.Tensor, x, 1, i, i + 1) for i in (1, 0)]
    return call(aten.cat.default, [*cut, call(aten.slice.Tensor, x, 1, 2, 2**63 - 1)], 1)


def last(graph: Graph, target) -> Node:
    return [n for n in graph.nodes if n.target is target][-1]


def mixer_node(graph: Graph, site: Site, target) -> Node:
    return next(
        n for n in graph.nodes if n.target is target and n.meta["path"] == f"{site.name}.mamba2"
    )


def attention_of(graph: Graph, layer: int) -> Node:
    return next(a.node for a in graph.attention if a.layer == layer)


def literal(name: str, change):
    return lambda g, s, m: set_argument(m.output, name, change(argument(m.output, name)))


def before_rotary(g, s, m):
    a = next(a for a in g.attention if a.node is m.output)
    set_argument(m.output, "query", a.query_before_rotary)


def projection_bias(role: str) -> Fault:
    def drop(g, s, m):
        linear = getattr(next(a for a in g.attention if a.node is m.output), f"{role}_projection")
        set_argument(linear.node, "bias", None)

    return drop


def stale_table(g, s, m):
    """The cosines of position 0 for every position, in this query only."""
    a = next(a for a in g.attention if a.node is m.output)
    node = argument(a.node, "query")
    rotated = next(n for n in node.all_input_nodes if n.target is aten.mul.Tensor)
    feed(g, rotated, "other", roll(1, -2))


def elsewhere(g, s, m):
    """The window of this site lands in the last layer, and this one keeps its own."""
    other = attention_of(g, 2)
    for name, back in (("window", 0), ("sinks", 0)):
        set_argument(other, name, argument(m.output, name))
        set_argument(m.output, name, back)


def also_elsewhere(g, s, m):
    set_argument(attention_of(g, 2), "window", 5)


def other_site(g, s, m):
    m.output = attention_of(g, 2)
    set_argument(m.output, "window", 5)


def output(make) -> Fault:
    return lambda g, s, m: setattr(m, "output", insert(g, m.output, make))


def after_output(make) -> Fault:
    return lambda g, s, m: insert(g, m.output, make) and None


def argument_of(target, name, make) -> Fault:
    return lambda g, s, m: feed(g, mixer_node(g, s, target), name, make)


def drop_of(target, name) -> Fault:
    return lambda g, s, m: set_argument(mixer_node(g, s, target), name, None)


def without_bias(g, s, m):
    """The bias is added last in the pivot form: the sum's input takes its place."""
    if m.output.target is aten.add.Tensor:
        inner = m.output.args[0]
        m.output.replace_all_uses_with(inner)
        m.output = inner
    else:
        set_argument(m.output, "bias", None)
    m.dropped.add(f"{s.name}.bias")


def out_bias(g, s, m):
    set_argument(m.output, "bias", None)
    m.dropped.add(f"{s.name}.mamba2.out_proj.bias")


def other_hidden(g, s, m):
    """Read the hidden state of the layer after the embedding."""
    first = next(n for n in g.nodes if n.target is aten.embedding.default)
    start = g.nodes
    for node in start:
        linear = as_linear(node)
        own = ".low_rank." in str(linear.weight.target) if linear else False
        mine = linear is not None and (
            (own and str(linear.weight.target).startswith(s.name + ".low_rank."))
            or node.meta["path"] == f"{s.name}.mamba2"
        )
        if mine and (own or "in_proj" in str(linear.weight.target)):
            set_argument(node, "input", first)
            return
    raise AssertionError


def other_factors(g, s, m):
    other = s.name.replace("layers.0", "layers.9").replace("layers.1", "layers.0")
    other = other.replace("layers.9", "layers.1")
    for name in ("pivot", "rest", "order", "a", "b"):
        try:
            mine, theirs = (g.tensor(f"{n}.low_rank.{name}") for n in (s.name, other))
        except AttributeError:
            continue
        mine.data.copy_(theirs)


FAULTS: list[tuple[str, str, Fault]] = [
    ("sliding_window", "scale", literal("scale", lambda x: x * 1.02)),
    ("sliding_window", "scale gone", literal("scale", lambda x: 1.0)),
    ("sliding_window", "mask dropped", literal("mask", lambda x: None)),
    ("sliding_window", "causal flipped", literal("causal", lambda x: not x)),
    ("sliding_window", "window + 1", literal("window", lambda x: x + 1)),
    ("sliding_window", "window - 1", literal("window", lambda x: x - 1)),
    ("sliding_window", "window not set", literal("window", lambda x: 0)),
    ("sliding_window", "sinks + 1", literal("sinks", lambda x: x + 1)),
    ("sliding_window", "softcap", literal("softcap", lambda x: 5.0)),
    ("sliding_window", "heads", lambda g, s, m: feed(g, m.output, "query", swap_rows)),
    ("sliding_window", "kv heads", lambda g, s, m: feed(g, m.output, "key", swap_rows)),
    ("sliding_window", "heads after", after_output(roll(1, 2))),
    ("sliding_window", "query bias", projection_bias("query")),
    ("sliding_window", "value bias", projection_bias("value")),
    ("sliding_window", "output bias", projection_bias("output")),
    ("sliding_window", "before rotary", before_rotary),
    ("sliding_window", "stale table", stale_table),
    ("sliding_window", "stale key", lambda g, s, m: feed(g, m.output, "key", roll(1, 2))),
    ("sliding_window", "wrong layer", elsewhere),
    ("sliding_window", "one layer too many", also_elsewhere),
    ("sliding_window", "another site", other_site),
    ("low_rank", "scale", output(times(1.01))),
    ("low_rank", "scale after", after_output(times(1.01))),
    ("low_rank", "heads", output(swap_heads)),
    ("low_rank", "bias", without_bias),
    ("low_rank", "stale", output(roll(1, 1))),
    ("low_rank", "direction", output(flip(1))),
    ("low_rank", "wrong layer", other_factors),
    ("low_rank", "wrong input", other_hidden),
    ("low_rank", "mask of another", lambda g, s, m: set_argument(attention_of(g, 2), "mask", None)),
    ("mamba2", "scale", argument_of(SSD, "C", times(1.02))),
    ("mamba2", "mask", lambda g, s, m: [drop_of(t, "mask")(g, s, m) for t in (SSD, CONV)]),
    ("mamba2", "direction", argument_of(SSD, "x", flip(1))),
    ("mamba2", "off by one", argument_of(CONV, "weight", roll(1, 1))),
    ("mamba2", "heads", argument_of(SSD, "C", roll(1, 2))),
    ("mamba2", "decay", argument_of(SSD, "A", times(1.05))),
    ("mamba2", "steps of heads", argument_of(SSD, "dt", roll(1, 2))),
    ("mamba2", "bias", out_bias),
    ("mamba2", "stale", argument_of(SSD, "B", roll(1, 1))),
    ("mamba2", "wrong layer", other_hidden),
]


def plant(monkeypatch, name: str, fault: Fault) -> None:
    cls = PASSES[name]
    original = cls.rewrite

    def wrong(self, graph: Graph, site: Site) -> Made:
        made = original(self, graph, site)
        if site.layer == 1:
            fault(graph, site, made)
        return made

    monkeypatch.setattr(cls, "rewrite", wrong)
