"""One decode step as a fixed program: states in buffers that never move, sizes that never change.

A CUDA graph replays the launches of one step with the addresses and sizes it had when it was
captured. So a growing cache becomes a buffer of fixed capacity, a ring is written by an index on
the device, and a recurrent state is copied in place. The graph takes the last column of the mask
for the newest token, so the buffer's last column holds that token, the columns before it the
past, and the mask hides what is not written yet. When the buffer is full its capacity doubles and
the step is captured again.

On a CPU the same step runs without a capture, which is how it is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import pad

from rewriter.graph import ATTENTION, Graph, argument, aten
from rewriter.state import KeyValue, MixerState, Recurrent, Ring, State, update_kv, update_ring

#: Smallest capacity in columns; it grows by doubling.
CAPACITY = 256


class FixedKeyValue(KeyValue):
    """A cache [B, Hk, capacity, D]; the next token goes to `column` and to the last column."""

    def __init__(self, old: KeyValue, decoder: Decoder) -> None:
        super().__init__()
        assert old.key is not None and old.value is not None
        room = decoder.capacity - old.length
        self.key, self.value = (
            pad(t[:, :, : old.length], (0, 0, 0, room)) for t in (old.key, old.value)
        )
        self.decoder, self.length = decoder, old.length

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        assert self.key is not None and self.value is not None
        for buffer, item in ((self.key, key), (self.value, value)):
            buffer.index_copy_(2, self.decoder.column, item)
            buffer[:, :, -1:] = item
        return self.key, self.value

    def thawed(self) -> KeyValue:
        made = KeyValue()
        assert self.key is not None and self.value is not None
        made.key, made.value = (t[:, :, : self.length] for t in (self.key, self.value))
        made.length = self.length
        return made


class FixedRing(Ring):
    """A ring that is written at a column on the device."""

    def __init__(self, old: Ring, decoder: Decoder) -> None:
        super().__init__(old.window, old.sinks)
        for name, tensor in old.tensors().items():
            setattr(self, name, tensor.clone())
        self.decoder, self.length = decoder, old.length

    def append(
        self, key: Tensor, value: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert self.key is not None and self.value is not None
        assert self.position is not None and self.real is not None
        column, real = self.decoder.column, mask[:, -1:].bool()
        rank = mask.long().sum(-1, keepdim=True) - 1
        slot = torch.where(real & (rank < self.sinks), rank, self.sinks + column % self.window)
        for buffer, item in ((self.key, key), (self.value, value)):
            buffer.scatter_(2, slot[:, None, :, None].expand_as(item), item)
        self.position.scatter_(1, slot, column.expand_as(slot))
        self.real.scatter_(1, slot, real)
        return self.key, self.value, self.real, self.position

    def thawed(self) -> Ring:
        made = Ring(self.window, self.sinks)
        for name, tensor in self.tensors().items():
            setattr(made, name, tensor)
        made.length = self.length
        return made


class FixedRecurrent(Recurrent):
    """Named tensors that are copied in place."""

    def __init__(self, old: Recurrent, decoder: Decoder) -> None:
        super().__init__()
        self.values = _InPlace({k: t.clone() for k, t in old.values.items()})
        self.decoder, self.length = decoder, old.length

    def thawed(self) -> Recurrent:
        made = Recurrent()
        made.values, made.length = dict(self.values), self.length
        return made


class _InPlace(dict[str, Tensor]):
    def __setitem__(self, name: str, value: Tensor) -> None:
        self[name].copy_(value)


FIXED = {KeyValue: FixedKeyValue, Ring: FixedRing, Recurrent: FixedRecurrent}


class Decoder:
    """The step of one sequence batch. `column` [1]: where the token goes, on the device."""

    def __init__(self, inputs: list[str], body: Callable[..., Any], state: State) -> None:
        self.names, self.body, self.seen = inputs, body, state.seen
        self.capacity = max(CAPACITY, 1 << (state.seen + 1).bit_length())
        device = next(t for m in state.mixers for t in m.tensors().values()).device
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.mixers: list[MixerState] = [FIXED[type(m)](m, self) for m in state.mixers]
        self.inputs: dict[str, Tensor] = {}
        self.outputs: tuple[Tensor, ...] = ()
        self.replay: Callable[[], None] | None = None

    def step(self, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Outputs of the graph for one more token of every row."""
        past, newest = values["attention_mask"].split([self.seen, 1], 1)
        hidden = self.capacity - 1 - self.seen
        values = values | {"attention_mask": torch.cat([pad(past, (0, hidden)), newest], 1)}
        if not self.inputs:
            self.inputs = {k: v.clone() for k, v in values.items()}
        for name, buffer in self.inputs.items():
            buffer.copy_(values[name])
        self.column.fill_(self.seen)
        if self.replay is None:
            self.replay = self._capture() if self.column.is_cuda else self._run
        self.replay()
        self.seen += 1
        for mixer in self.mixers:
            mixer.length = self.seen
        return tuple(t.clone() for t in self.outputs)

    def _run(self) -> None:
        self.outputs = self.body(*(self.inputs[n] for n in self.names), *self.mixers)

    def _tensors(self) -> list[Tensor]:
        return [t for m in self.mixers for t in m.tensors().values()]

    def _capture(self) -> Callable[[], None]:
        before = [t.clone() for t in self._tensors()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles and tunes outside of the capture
            for _ in range(2):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            self._run()
        for tensor, old in zip(self._tensors(), before, strict=True):  # undo the warm-up
            tensor.copy_(old)
        return captured.replay


def fix(state: State, inputs: list[str], body: Callable[..., Any]) -> None:
    """Give `state` fixed buffers, with room for at least one more token."""
    decoder = getattr(state.mixers[0], "decoder", None)
    if decoder is not None and state.seen + 1 < decoder.capacity:
        return
    thaw(state)
    state.mixers = Decoder(inputs, body, state).mixers


def thaw(state: State) -> None:
    """Give `state` ordinary buffers again."""
    state.mixers = [m.thawed() if hasattr(m, "thawed") else m for m in state.mixers]


def can_be_fixed(graph: Graph) -> bool:
    """Whether one program can do every step.

    Attention over a whole cache must see all that is written: with a window, a chunk or a bias
    it would have to know how far back a column is. A ring keeps its positions, so it may.
    """
    if not graph.states or not {"input_ids", "attention_mask"} <= set(graph.inputs):
        return False
    mask = graph.placeholder("attention_mask")
    for node in graph.nodes:
        if node.target is not ATTENTION:
            continue
        update = argument(node, "key").args[0]
        if not isinstance(update, Node) or update.target not in (update_kv, update_ring):
            return False
        if update.target is update_kv:
            plain = not argument(node, "window") and not argument(node, "chunk")
            plain = plain and argument(node, "causal") and argument(node, "bias") is None
            if not plain or not _is(update.args[3], mask):
                return False
    return True


def _is(node: Any, wanted: Node | None) -> bool:
    """Whether a mask is the graph's own, in another shape or type."""
    same = (
        aten.view.default,
        aten.reshape.default,
        aten.to.dtype,
        aten.to.device,
        aten.ne.Scalar,
    )
    while isinstance(node, Node) and node is not wanted and node.target in same:
        node = node.args[0]
    return isinstance(node, Node) and node is wanted
