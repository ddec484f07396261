"""What mixers carry from one call to the next, and the pass that threads it through a graph.

The graph only names the state; the functions here decide how it is stored: appended in
place into a growing buffer, a ring of sinks and window, or fixed recurrent tensors. With
no state (training, scoring) each function passes its input through, so one graph does
everything.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import has_side_effect
from transformers import Cache

from rewriter.calibration import copy_module
from rewriter.graph import ATTENTION, Graph, argument, aten, set_argument
from rewriter.kernels.mixer import MIXERS, StateTensor


class KeyValue:
    """Keys and values [B, Hk, S, D] in buffers that double, written in place."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        new = self.length + key.shape[2]
        self.key, self.value = (
            _reserve(buffer, item, self.length, new)
            for buffer, item in ((self.key, key), (self.value, value))
        )
        self.key[:, :, self.length : new] = key
        self.value[:, :, self.length : new] = value
        self.length = new
        return self.key[:, :, :new], self.value[:, :, :new]

    def tensors(self) -> dict[str, Tensor]:
        return {k: t for k in ("key", "value") if (t := getattr(self, k)) is not None}


def _reserve(buffer: Tensor | None, item: Tensor, used: int, needed: int) -> Tensor:
    if buffer is not None and buffer.shape[2] >= needed:
        return buffer
    capacity = max(needed, 64) if buffer is None else max(needed, 2 * buffer.shape[2])
    grown = item.new_empty((item.shape[0], item.shape[1], capacity, item.shape[3]))
    if buffer is not None:
        grown[:, :, :used] = buffer[:, :, :used]
    return grown


class Ring:
    """The first `sinks` real tokens of each row and the latest `window` columns.

    Buffers have `sinks + window` slots: the sinks first, then column c in slot c % window.
    """

    def __init__(self, window: int, sinks: int) -> None:
        self.window, self.sinks = window, sinks
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.position: Tensor | None = None  # [B, slots] column of each slot, -1: empty
        self.real: Tensor | None = None  # [B, slots] false: empty, padding, or also a sink
        self.length = 0

    def append(
        self, key: Tensor, value: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Write new tokens [B, Hk, L, D]; `mask` [B, total] says which columns are real.

        Returns keys, values, mask and key positions of all that the queries may need.
        """
        batch, _, new, _ = key.shape
        slots = self.sinks + self.window
        if self.key is None:
            self.key, self.value = (
                t.new_zeros((batch, t.shape[1], slots, t.shape[3])) for t in (key, value)
            )
            self.position = torch.full((batch, slots), -1, device=key.device)
            self.real = torch.zeros((batch, slots), dtype=torch.bool, device=key.device)
        assert self.value is not None and self.position is not None and self.real is not None
        real = mask[:, -new:].bool()
        rank = mask.long().cumsum(-1)[:, -new:] - 1
        column = torch.arange(self.length, self.length + new, device=key.device)
        sink = real & (rank < self.sinks)
        if bool(sink.any()):
            row, token = sink.nonzero(as_tuple=True)
            slot = rank[row, token]
            self.key[row, :, slot] = key[row, :, token]
            self.value[row, :, slot] = value[row, :, token]
            self.position[row, slot] = column[token]
            self.real[row, slot] = True
        ordinary = real & ~sink  # a sink is read from its own slot only
        position = column.expand(batch, new)
        if new == 1:
            self._write(key, value, position, ordinary)
            result = (self.key, self.value, self.real, self.position)
        else:  # queries of this call may need keys that are about to be overwritten
            result = (
                torch.cat([self.key, key], 2),
                torch.cat([self.value, value], 2),
                torch.cat([self.real, ordinary], 1),
                torch.cat([self.position, position], 1),
            )
            self._write(key, value, position, ordinary)
        self.length += new
        return result

    def _write(self, key: Tensor, value: Tensor, position: Tensor, real: Tensor) -> None:
        assert self.key is not None and self.value is not None
        assert self.position is not None and self.real is not None
        keep = slice(-min(self.window, key.shape[2]), None)
        slot = self.sinks + position[0, keep] % self.window
        self.key[:, :, slot] = key[:, :, keep]
        self.value[:, :, slot] = value[:, :, keep]
        self.position[:, slot] = position[:, keep]
        self.real[:, slot] = real[:, keep]

    def tensors(self) -> dict[str, Tensor]:
        names = ("key", "value", "position", "real")
        return {k: t for k in names if (t := getattr(self, k)) is not None}


class Recurrent:
    """Named tensors of fixed size, batch first: `conv` [B, C, k-1], `ssm` [B, H, P, N] fp32."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.length = 0

    def tensors(self) -> dict[str, Tensor]:
        return self.values


MixerState = KeyValue | Ring | Recurrent


def make_state(spec: dict[str, Any]) -> MixerState:
    """The empty state of one specification in `graph.states`."""
    if spec["kind"] == "kv":
        return KeyValue()
    if spec["kind"] == "ring":
        return Ring(spec["window"], spec["sinks"])
    return Recurrent()


# ---- functions that the threaded graph calls ------------------------------------------------


def update_kv(
    state: KeyValue | None, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Append to a growing cache; returns keys, values, mask and key positions (None)."""
    if state is None:
        return key, value, mask, None
    return (*state.append(key, value), mask, None)


def update_ring(
    state: Ring | None, key: Tensor, value: Tensor, mask: Tensor | None, window: int, sinks: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Append to sinks + window; returns keys, values, mask and key positions."""
    if state is None:
        return key, value, mask, None
    assert mask is not None, "a windowed cache needs the padding mask"
    return state.append(key, value, mask)


def read(state: Recurrent | None, name: str) -> Tensor | None:
    """The recurrent tensor of this name; None at the start of a sequence."""
    return None if state is None else state.values.get(name)


@has_side_effect
def write(state: Recurrent | None, name: str, value: Tensor) -> Tensor:
    """Keep a recurrent tensor for the next call."""
    if state is not None:
        state.values[name] = value
    return value


#: Functions of this file that may appear in a graph, by the name they are saved under.
FUNCTIONS = {f.__name__: f for f in (update_kv, update_ring, read, write)}


# ---- the pass -------------------------------------------------------------------------------


def dependents(graph: Graph, sources: Iterable[Node], sizes: bool = True) -> set[Node]:
    """The sources and all nodes computed from them; `sizes=False`: not from their shape alone."""
    found = set(sources)
    for node in graph.nodes:
        if node.target is aten.sym_size.int and not sizes:
            continue
        if any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def token_input(graph: Graph) -> str:
    """Name of the input that generation appends to."""
    return "decoder_input_ids" if "decoder_input_ids" in graph.inputs else "input_ids"


def carriers(graph: Graph) -> list[Node]:
    """Mixers that carry something from token to token, in order of execution.

    Not those of an encoder or of an image, nor cross attention: their keys see no token.
    """
    tokens = graph.placeholder(token_input(graph))
    if tokens is None:
        return []
    seen = dependents(graph, [tokens], sizes=False)
    return [
        n
        for n in graph.nodes
        if (n.target is ATTENTION and argument(n, "key") in seen)
        or (n.target is not ATTENTION and n in seen and n.target in MIXERS)
    ]


def thread_state(graph: Graph) -> Graph:
    """Give every mixer that carries state a state input, in order of execution."""
    owners: dict[str, Node] = {}
    for node in carriers(graph):
        if node.target is ATTENTION:
            state = _placeholder(graph, attention_spec(node))
            _thread_attention(graph, node, state)
        elif (spec := MIXERS[node.target]).state:
            path = node.meta.get("path", "")
            if path not in owners:  # the convolution and the recurrence of a layer share one
                owners[path] = _placeholder(graph, {"kind": "recurrent"})
            for tensor in spec.state:
                _thread_recurrent(graph, node, owners[path], tensor)
    graph.recompile()
    return graph


def decodes_alike(graph: Graph, inputs: list[Tensor]) -> bool:
    """Whether a prefill, a step and a chunk give what one call gives.

    Not where something that mixes positions carries no state that we know: a Mamba layer of the
    model's own, for example. `inputs` are an example of the graph's, in order.
    """
    module = copy_module(graph.module)
    threaded = thread_state(replace(graph, module=module, states=[]))
    state = State(threaded.states)
    tokens = token_input(graph)
    mask = inputs[graph.inputs.index(tokens.replace("input_ids", "attention_mask"))]
    own = (tokens, tokens.replace("input_ids", "position_ids"))
    length, parts, past = mask.shape[1], [], 0
    try:
        with torch.no_grad():
            whole = graph.module(*inputs)[0]
            for cut in (length - 3, length - 2, length):
                now = [
                    t[:, past:cut] if n in own else t[:, :cut] if t is mask else t
                    for n, t in zip(graph.inputs, inputs, strict=True)
                ]
                parts.append(threaded.module(*now, *state.mixers)[0])
                past = cut
    except (RuntimeError, IndexError, ValueError, AssertionError):
        return False  # it ties the length, or takes an image with the first tokens only
    whole, ours = (t[mask.bool()].float() for t in (whole, torch.cat(parts, 1)))
    bound = 1e-3 if mask.device.type == "cpu" and parts[0].dtype.itemsize >= 4 else 5e-2
    return bool((whole - ours).abs().max() <= bound * whole.abs().max())


def _thread_recurrent(graph: Graph, node: Node, state: Node, tensor: StateTensor) -> None:
    """Read one tensor before the op, write the op's new one after it."""
    fx = graph.module.graph
    with fx.inserting_before(node):
        set_argument(node, tensor.argument, graph.call(read, state, tensor.name))
    which = (operator.getitem, (node, tensor.output))
    last = next((u for u in node.users if (u.target, u.args) == which), None)
    if last is None:
        with fx.inserting_after(node):
            last = graph.call(operator.getitem, node, tensor.output)
    with fx.inserting_after(last):
        graph.call(write, state, tensor.name, last)


def attention_spec(node: Node) -> dict[str, Any]:
    """Specification of an attention's state: a ring where the kept keys suffice, else all."""
    window = argument(node, "window")
    bounded = window and argument(node, "causal") and not argument(node, "chunk")
    if bounded and argument(node, "bias") is None and argument(node, "mask") is not None:
        return {"kind": "ring", "window": window, "sinks": argument(node, "sinks")}
    return {"kind": "kv"}


def _placeholder(graph: Graph, spec: dict[str, Any]) -> Node:
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    name = f"state_{len(graph.states)}"
    graph.states.append(spec)
    with graph.module.graph.inserting_after(last):
        return graph.module.graph.placeholder(name, default_value=None)


def _thread_attention(graph: Graph, node: Node, state: Node) -> None:
    spec = graph.states[-1]
    key, value, mask = (argument(node, n) for n in ("key", "value", "mask"))
    path = node.meta.get("path", "")
    with graph.module.graph.inserting_before(node):
        if spec["kind"] == "ring":
            made = graph.call(
                update_ring, state, key, value, mask, spec["window"], spec["sinks"], path=path
            )
        else:
            made = graph.call(update_kv, state, key, value, mask, path=path)
        for index, name in enumerate(("key", "value", "mask", "key_positions")):
            set_argument(node, name, graph.call(operator.getitem, made, index, path=path))


# ---- the cache that generate() carries --------------------------------------------------------


class State(Cache):
    """All mixers' states of one batch, as the cache that `generate` carries along.

    mixers: one state for every specification. memory: of an encoder-decoder, what the decoder
    reads of the encoded input (cross-attention keys and values, its mask), computed once for a
    sequence; None before the first call. seen: tokens so far, padding included.
    """

    def __init__(self, specs: list[dict[str, Any]]) -> None:
        super().__init__(layers=[])
        self.mixers = [make_state(s) for s in specs]
        self.memory: list[Any] | None = None  # tensors, batch first, and sizes
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep row `beam_idx[i]` as row i, in every state."""
        for mixer in self.mixers:
            for name, tensor in mixer.tensors().items():
                chosen = tensor.index_select(0, beam_idx.to(tensor.device))
                if isinstance(mixer, Recurrent):
                    mixer.values[name] = chosen
                else:
                    setattr(mixer, name, chosen)
        self.memory = self.memory and [
            t.index_select(0, beam_idx.to(t.device)) if isinstance(t, Tensor) else t
            for t in self.memory
        ]

    def bytes(self) -> int:
        """Bytes resident in the states' tensors."""
        kept = [t for m in self.mixers for t in m.tensors().values()]
        kept += [t for t in self.memory or () if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in kept)
