"""Where tokens lie in blocks and rings: what all layers of one hybrid attention share.

Tokens are counted by rank, the number of real tokens before them in their row, so that a block of
queries holds no padding whatever the rows' lengths are. The two classes write integers and biases
for a call of many tokens and for one token; `rewriter.kernels.hybrid_attention` says what they
mean. B rows, L new tokens, w the window, C blocks of queries, R slots of a ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.backends.onnx.nodes import Nodes
from rewriter.backends.onnx.ops.attention import HIDDEN


@dataclass(frozen=True)
class Options:
    """Attributes of the op. ring: slots of a ring; a state holds the sinks before them."""

    scale: float
    window: int
    block_aligned: bool
    sinks: int
    reference: str
    far_cap: float

    @property
    def ring(self) -> int:
        return 2 * self.window if self.block_aligned else self.window


class Ranks:
    """What both kinds of call need. real: [B, L] 0 or 1; count: [B], real tokens before."""

    def __init__(
        self, op: Nodes, query: ir.Value, mask: ir.Value | None, count: ir.Value, options: Options
    ) -> None:
        self.options, self.count = options, count
        self.batch, self.length = op.size(query, 0), op.size(query, 2)
        self.one = op.Squeeze(op.Equal(self.length, [1]))
        if mask is None:
            sizes = op.Concat(self.batch, self.length, axis=0)
            self.real = op.Expand(op.constant([1]), sizes)
        else:
            columns = op.size(mask, 1)
            latest = op.Slice(mask, op.Sub(columns, self.length), columns, [1])
            self.real = op.Cast(op.Cast(latest, to=ir.DataType.BOOL), to=ir.DataType.INT64)
        self.new = op.ReduceSum(self.real, [1], keepdims=0)
        self.total = op.Add(count, self.new)

    def start(self, op: Nodes, rank: ir.Value) -> ir.Value:
        """First rank of a query's window; may be negative."""
        w = self.options.window
        if self.options.block_aligned:
            return op.Mul(op.Sub(op.Div(rank, w), 1), w)
        return op.Sub(rank, w - 1)

    def far(self, op: Nodes, rank: ir.Value, start: ir.Value) -> list[ir.Value]:
        """For queries of these ranks [...]: log of what their far mass is multiplied by, and of
        the number of tokens in their window."""
        cap, log = self.options.far_cap, op.constant(0.0)
        far = op.Cast(op.Sub(start, self.options.sinks), to=ir.DataType.FLOAT)
        if cap:
            log = op.Log(op.Min(op.Div(op.constant(cap), op.Max(far, op.constant(1.0))), 1.0))
        one = op.constant(np.int64(1))
        seen = op.Max(op.Sub(op.Add(rank, 1), op.Max(start, op.Sub(one, 1))), one)
        return [
            op.Where(op.Greater(far, 0.0), log, HIDDEN),
            op.Log(op.Cast(seen, to=ir.DataType.FLOAT)),
        ]

    def shown(self, op: Nodes, start: ir.Value) -> ir.Value:
        """Bias [..., sinks] of the sinks: they are in the window first."""
        before = op.Less(op.constant(np.arange(self.options.sinks)), op.Unsqueeze(start, [-1]))
        return op.Where(before, 0.0, HIDDEN)


class Blocks:
    """A call of many tokens. Values of each block, C first:

    query, pair: rows of the flattened queries [C, B, w], and of a state with the new tokens behind
        it [C, B, s + 2 w]: the sinks, then the keys of the block before and of the block.
    bias: [C, B, 1 or w, s + 2 w], of these keys. cap, seen: [C, B, 1, w, 1]; see `far`.
    adds: [C, B, w], 1 where a key of the block before becomes far for the next block.

    state [B, s + R], back [B, L]: rows for the new state, and of the blocks' outputs [C, B, w] for
    each column.
    """

    def __init__(self, op: Nodes, ranks: Ranks) -> None:
        options, count, total = ranks.options, ranks.count, ranks.total
        w, sinks, ring = options.window, options.sinks, options.ring
        zero, one = op.constant(np.int64(0)), op.constant(np.int64(1))
        length, real = ranks.length, ranks.real
        column = lambda t: op.Unsqueeze(t, [1])  # noqa: E731
        rows = column(op.Range(zero, op.Squeeze(ranks.batch), one))  # [B, 1]
        upto = op.CumSum(real, 1)
        after = op.Add(column(ranks.new), op.CumSum(op.Sub(1, real), 1))
        place = op.Sub(op.Where(op.Greater(real, 0), upto, after), 1)
        columns = op.Expand(op.Range(zero, op.Squeeze(length), one), op.Shape(place))
        order = op.ScatterElements(place, place, columns, axis=1)  # columns of the real tokens

        def fresh(rank: ir.Value) -> ir.Value:  # column of new tokens, [B, n]
            nearest = op.Max(op.Sub(rank, column(count)), zero)
            return op.GatherElements(order, op.Min(nearest, op.Sub(length, 1)), axis=1)

        def joined(rank: ir.Value) -> ir.Value:
            return place_of(rank, op.Add(op.Mod(rank, ring), sinks))

        def place_of(rank: ir.Value, slot: ir.Value) -> ir.Value:
            behind = op.Add(fresh(rank), sinks + ring)
            found = op.Where(op.Less(rank, column(count)), slot, behind)
            return op.Add(found, op.Mul(rows, op.Add(length, sinks + ring)))

        offset = op.Mod(count, w) if options.block_aligned else op.Sub(count, count)
        origin = op.Sub(count, offset)
        ended = op.Div(op.Sub(total, origin), w)  # [B] blocks that are full after this call
        blocks = op.Add(op.ReduceMax(ended, keepdims=0), 1)
        tokens = op.Range(zero, op.Mul(op.Add(blocks, 1), w), one)
        rank = op.Sub(op.Add(column(origin), tokens), w)  # [B, (C + 1) w]
        last = op.constant([np.iinfo(np.int64).max])
        split = lambda t: op.Reshape(t, op.shape(0, -1, w))  # noqa: E731
        early = lambda t: op.Slice(t, [0], [-1], [1])  # noqa: E731
        late = lambda t: op.Slice(t, [1], last, [1])  # noqa: E731
        pairs = lambda t: op.Concat(early(split(t)), late(split(t)), axis=2)  # noqa: E731

        own = late(split(rank))
        self.query = late(split(op.Add(fresh(rank), op.Mul(rows, length))))
        self.pair = pairs(joined(rank))
        bias = op.Unsqueeze(pairs(op.Where(op.GreaterOrEqual(rank, 0), 0.0, HIDDEN)), [2])
        start = ranks.start(op, own)
        self.cap, self.seen = (op.Unsqueeze(t, [2, 4]) for t in ranks.far(op, own, start))
        latest = column(op.Sub(total, 1))
        held = op.Sub(latest, op.Mod(op.Sub(latest, op.constant(np.arange(ring))), ring))
        self.state = joined(held)
        if sinks:
            every = op.constant(np.arange(sinks))
            wide = op.Expand(every, op.Concat(ranks.batch, op.constant([sinks]), axis=0))
            first = place_of(wide, wide)
            self.state = op.Concat(first, self.state, axis=1)
            each = op.Expand(op.Unsqueeze(first, [1]), op.shape(1, op.size(own, 1), 1))
            self.pair = op.Concat(each, self.pair, axis=2)
            shown = ranks.shown(op, start)  # [B, C, w, s]
            if options.block_aligned:  # the same for all queries of a block
                shown = op.Slice(shown, [0], [1], [2])
            else:
                bias = op.Expand(bias, op.shape(1, 1, w, 1))
            bias = op.Concat(shown, bias, axis=3)
        self.bias = bias
        before, number = early(split(rank)), op.Unsqueeze(op.Range(zero, blocks, one), [0, 2])
        full = op.Unsqueeze(ended, [1, 2])
        counted = op.GreaterOrEqual(before, sinks)
        if options.block_aligned:
            counted = op.And(counted, op.Less(number, full))
        else:
            rest_of = op.Unsqueeze(op.Mod(op.Sub(total, origin), w), [1, 2])
            some = op.GreaterOrEqual(rest_of, op.constant(np.arange(w)))
            some = op.And(op.Equal(number, full), some)
            counted = op.And(counted, op.Or(op.Less(number, full), some))
            gone = op.Unsqueeze(op.Sub(count, w), [1, 2])  # in the state already
            counted = op.And(counted, op.Greater(before, gone))
        self.adds = op.Cast(counted, to=ir.DataType.FLOAT)
        for name, rank_of in (("query", 3), ("pair", 3), ("adds", 3), ("bias", 4)):
            perm = [1, 0, 2, 3][:rank_of]
            setattr(self, name, op.Transpose(getattr(self, name), perm=perm))
        self.cap, self.seen = (op.Transpose(t, perm=[1, 0, 2, 3, 4]) for t in (self.cap, self.seen))
        here = op.Max(op.Sub(op.Add(column(op.Sub(count, origin)), upto), 1), zero)
        self.back = op.Add(
            op.Mul(op.Add(op.Mul(op.Div(here, w), ranks.batch), rows), w), op.Mod(here, w)
        )


class Step:
    """A call of one token a row, of rank `count`.

    slots: [B, 1, 1 or 2, 1] of the state where it goes. bias: [B, 1, 1, 1, s + R] of the slots.
    cap, seen: [B, 1, 1, 1]; see `far`. leaving: [B, 1, n, 1] slots whose tokens the next one may
    see as far, adds: [B, n] 1 where it does, some: whether any.
    """

    def __init__(self, op: Nodes, ranks: Ranks) -> None:
        options, count = ranks.options, ranks.count
        w, sinks, ring = options.window, options.sinks, options.ring
        zero = op.constant(np.int64(0))
        rank, start = op.Unsqueeze(count, [1]), ranks.start(op, count)
        slot = op.Add(op.Mod(rank, ring), sinks)
        held = op.Sub(rank, op.Mod(op.Sub(rank, op.constant(np.arange(ring))), ring))
        inside = op.GreaterOrEqual(held, op.Unsqueeze(op.Max(start, zero), [1]))
        bias = op.Where(inside, 0.0, HIDDEN)
        if sinks:  # a sink goes into the ring too
            slot = op.Concat(slot, op.Where(op.Less(rank, sinks), rank, slot), axis=1)
            bias = op.Concat(ranks.shown(op, start), bias, axis=1)
        self.slots, self.bias = op.Unsqueeze(slot, [1, 3]), op.Unsqueeze(bias, [1, 2, 3])
        self.cap, self.seen = (op.Unsqueeze(t, [1, 2, 3]) for t in ranks.far(op, count, start))
        after = op.Add(rank, 1)
        oldest = op.Sub(after, ring)  # [B, 1]
        left = op.Add(oldest, op.constant(np.arange(w if options.block_aligned else 1)))
        self.leaving = op.Unsqueeze(op.Add(op.Mod(left, ring), sinks), [1, 3])
        real = op.Greater(op.Gather(ranks.real, [0], axis=1), 0)
        counted = op.And(op.GreaterOrEqual(left, sinks), real)
        if options.block_aligned:
            counted = op.And(counted, op.Equal(op.Mod(after, w), 0))
        self.adds = op.Cast(counted, to=ir.DataType.FLOAT)
        most = op.ReduceMax(self.adds, keepdims=0)
        self.some: Any = op.Cast(most, to=ir.DataType.BOOL)
