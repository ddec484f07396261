"""Windowed attention over a cache of fixed size, from one call to the next.

A window without sink tokens is GroupQueryAttention's own `sliding_window_cache` where the
runtime has it. With sinks, and on other runtimes, it is written in standard operators over the
ring of `rewriter.state.Ring`: the first `sinks` real tokens of each row, then column c in slot
c % window. What a slot holds follows from the padding mask, so that keys and values are the
only state. One token writes its slot and reads the ring; a longer call is cut into blocks of
queries, each against the keys that its window reaches: time and memory grow with the length.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from rewriter.backends.onnx.nodes import DOMAIN, Nodes, static
from rewriter.backends.onnx.ops.attention import (
    HIDDEN,
    lower_fused,
    name_of,
    not_fusable,
    past_key_value,
    reader,
    replace_update,
)
from rewriter.backends.onnx.registry import Context, emit, expands, lowers
from rewriter.errors import RewriterError
from rewriter.graph import argument
from rewriter.state import update_ring

#: Queries in a block, at most: of a few hundred keys each, its logits stay in the L2 cache.
BLOCK = 128


@lowers(update_ring)
def lower_ring(update: Any, context: Context) -> None:
    _, key, value, mask, window, sinks = update.args
    attention = reader(update)
    why = not_fusable(attention, mask, context) if context.fused else "standard"
    if not why:
        lower_fused(update, attention, past_key_value(update, window, context), window, context)
        return
    if attention is None or context.value(mask).dim() != 2:
        raise RewriterError(
            f"{name_of(update)}: no ONNX lowering of this windowed cache",
            "something else than one attention with a padding mask reads it",
        )
    if context.fused:
        context.fall_back(f"windows with a cache of fixed size: standard operators, {why}")
    pasts = past_key_value(update, window + sinks, context)
    get = lambda name: argument(attention, name)  # noqa: E731
    with context.graph.inserting_before(attention):
        made = context.call(
            ring_attention,
            *(get("query"), key, value, *pasts, mask, get("sink_logits")),
            *(get("scale"), window, sinks, get("softcap")),
        )
        output, *presents = context.outputs_of(made, 3)
    attention.replace_all_uses_with(output)
    context.graph.erase_node(attention)
    replace_update(update, [])
    for past, new in zip(pasts, presents, strict=True):
        context.present(past, new)
        context.align(past)  # a slot is a column's


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    mask: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    window: int,
    sinks: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stands for the subgraph below.

    Args:
        query: [B, H, L, D]; key, value: [B, Hk, L, D(v)], the new tokens only.
        past_key, past_value: [B, Hk, sinks + window, D(v)].
        mask: [B, T], non-zero for real tokens; the new ones are the last L.

    Returns: output [B, L, H, Dv], present_key, present_value.
    """
    batch, heads, length, _ = query.shape
    kind = query.dtype
    attributes = {"window": window, "sinks": sinks, "scale": float(scale), "softcap": softcap}
    output, keys, values = emit(
        "RingAttention",
        [query, key, value, past_key, past_value, mask, sink_logits],
        attributes,
        [
            (kind, (batch, length, heads, value.shape[3])),
            (kind, tuple(past_key.shape)),
            (kind, tuple(past_value.shape)),
        ],
        domain=DOMAIN,
    )
    return output, keys, values


# ---- the subgraph --------------------------------------------------------------------------------


@expands("RingAttention")
def expand(node: ir.Node, op: Nodes, memo: dict[Any, Any]) -> list[ir.Value]:
    window, sinks = (node.attributes[n].as_int() for n in ("window", "sinks"))
    known = ("ring", node.inputs[5], window, sinks)
    if known not in memo:
        memo[known] = _Plan(op, node.inputs[0], node.inputs[5], window, sinks)  # type: ignore[arg-type]
    ring = _Ring(node, memo[known])
    branches = {}
    for name, write in (("then_branch", ring.decode), ("else_branch", ring.prefill)):
        inner = op.inner()
        branches[name] = inner.graph(name, [], write(inner))
    return op.If(memo[known].one, outputs=3, **branches)


class _Plan:
    """What every layer of one window and one mask shares. T columns so far, L of them new."""

    def __init__(self, op: Nodes, query: ir.Value, mask: ir.Value, window: int, sinks: int) -> None:
        total, self.length = op.size(mask, 1), op.size(query, 2)
        start = op.Sub(total, self.length)
        self.one = op.Squeeze(op.Equal(self.length, [1]))
        real = op.Cast(op.Cast(mask, to=ir.DataType.BOOL), to=ir.DataType.INT64)
        rank = op.CumSum(real, 1)  # [B, T]: how many real tokens up to here
        ordinary = op.And(op.Greater(real, 0), op.Greater(rank, sinks))
        slots = np.arange(window)
        # Column that each slot of the window holds after this call, and before it in order.
        last = op.Sub(total, [1])
        holds = op.Sub(last, op.Mod(op.Sub(last, slots), window))
        self.order = op.Add(op.Mod(op.Add(start, slots), window), [sinks])
        self.place = op.Add(op.Sub(holds, start), [window])  # in the keys of the ring and the call
        reached = op.Range(
            op.Squeeze(op.Sub(start, [window])), op.Squeeze(total), op.constant(np.int64(1))
        )
        self.reached = self._real(op, ordinary, reached)  # [B, W + L]
        new = op.Slice(rank, start, total, [1])  # [B, L]
        fresh = op.Greater(op.Slice(real, start, total, [1]), 0)
        first = op.Unsqueeze(np.arange(1, sinks + 1), [0])  # [1, S]
        if sinks:
            # Where in this call the sinks are, if they are in it. [B, S, L]
            hits = op.And(
                op.Unsqueeze(fresh, [1]),
                op.Equal(op.Unsqueeze(new, [1]), op.Unsqueeze(first, [2])),
            )
            self.hits = op.Unsqueeze(op.Cast(hits, to=ir.DataType.FLOAT), [1])  # [B, 1, S, L]
            self.found = op.Cast(op.ReduceMax(self.hits, [3]), to=ir.DataType.BOOL)
            seen = op.GreaterOrEqual(op.Unsqueeze(new, [2]), op.Unsqueeze(first, [1]))
            self.sink_bias = op.Where(seen, 0.0, HIDDEN)  # [B, L, S]
        filled = op.GreaterOrEqual(op.Gather(rank, [-1], axis=1), first)  # [B, S]
        now = self._real(op, ordinary, holds)
        self.bias = op.Where(op.Concat(filled, now, axis=1), 0.0, HIDDEN)  # [B, S + W]
        # The slot of one new token: its own if it is a sink.
        slot = op.Add(op.Mod(last, window), [sinks])
        early = op.And(fresh, op.Less(new, sinks + 1))
        self.slot = op.Unsqueeze(op.Where(early, op.Sub(new, 1), slot), [1, 2])  # [B, 1, 1, L]

    @staticmethod
    def _real(op: Nodes, ordinary: ir.Value, columns: ir.Value) -> ir.Value:
        """Of each column [N]: whether it is a real token and no sink. [B, N]"""
        there = op.Gather(ordinary, op.Max(columns, op.constant(np.int64(0))), axis=1)
        return op.And(there, op.GreaterOrEqual(columns, 0))


class _Ring:
    """One layer. Both branches return output [B, L, H, Dv] and the new ring."""

    def __init__(self, node: ir.Node, plan: _Plan) -> None:
        given: list[Any] = [*node.inputs, None][:7]
        self.query, self.key, self.value, self.past_key, self.past_value = given[:5]
        self.logits: ir.Value | None = given[6]
        self.plan = plan
        read = node.attributes
        self.window, self.sinks = read["window"].as_int(), read["sinks"].as_int()
        self.scale, self.softcap = read["scale"].as_float(), read["softcap"].as_float()
        self.heads, self.groups = (static(t, 1) for t in (self.query, self.key))
        self.width, self.depth = (static(t, 3) for t in (self.query, self.value))
        self.kind = self.query.dtype

    def _like(self, op: Nodes, value: ir.Value) -> ir.Value:
        return value if self.kind is ir.DataType.FLOAT else op.Cast(value, to=self.kind)

    def _attend(
        self, op: Nodes, query: ir.Value, key: ir.Value, value: ir.Value, bias: ir.Value, new: Any
    ) -> ir.Value:
        """query [B, Hk, G, l, D], key and value [B, Hk, s, D], bias [B, 1, 1, l, s]."""
        each = self.heads // self.groups
        rows = op.Reshape(query, op.shape(0, self.groups, -1, self.width))
        logits = op.MatMul(rows, op.Transpose(key, perm=[0, 1, 3, 2]))
        keys = op.size(key, 2)
        logits = op.Reshape(logits, op.shape(0, self.groups, each, new, keys))
        logits = op.Mul(logits, self._like(op, op.constant(self.scale)))
        if self.softcap > 0:
            cap = self._like(op, op.constant(self.softcap))
            logits = op.Mul(op.Tanh(op.Div(logits, cap)), cap)
        logits = op.Add(logits, self._like(op, bias))
        if self.logits is not None:
            extra = op.Reshape(self.logits, [1, self.groups, each, 1, 1])
            sizes = op.Concat(op.Shape(logits, start=0, end=4), op.constant([1]), axis=0)
            extra = op.Expand(self._like(op, extra), sizes)
            weights = op.Softmax(op.Concat(logits, extra, axis=-1), axis=-1)
            weights = op.Slice(weights, [0], keys, [4])
        else:
            weights = op.Softmax(logits, axis=-1)
        weights = op.Reshape(weights, op.shape(0, self.groups, -1, keys))
        made = op.MatMul(weights, value)
        return op.Reshape(made, op.shape(0, self.groups, each, new, self.depth))

    def decode(self, op: Nodes) -> list[ir.Value]:
        """One token: write its slot, then read the ring."""
        rings: list[Any] = []
        for past, new in ((self.past_key, self.key), (self.past_value, self.value)):
            at = op.Expand(self.plan.slot, op.Shape(new))
            rings.append(op.ScatterElements(past, at, new, axis=2))
        query = op.Reshape(
            self.query, op.shape(0, self.groups, self.heads // self.groups, 1, self.width)
        )
        bias = op.Unsqueeze(self.plan.bias, [1, 2, 3])
        made = self._attend(op, query, rings[0], rings[1], bias, 1)
        return [op.Reshape(made, op.shape(0, 1, self.heads, self.depth)), *rings]

    def prefill(self, op: Nodes) -> list[ir.Value]:
        """Many tokens: block after block, then fill the ring anew."""
        plan, pieces, rings = self.plan, [], []
        for past, new in ((self.past_key, self.key), (self.past_value, self.value)):
            joined = op.Concat(op.Gather(past, plan.order, axis=2), new, axis=2)
            ring = op.Gather(joined, plan.place, axis=2)
            sinks = None
            if self.sinks:
                sinks = op.Slice(past, [0], [self.sinks], [2])
                sinks = op.Where(plan.found, op.MatMul(self._like(op, plan.hits), new), sinks)
                ring = op.Concat(sinks, ring, axis=2)
            pieces.append((joined, sinks))
            rings.append(ring)
        blocks = op.Div(op.Add(plan.length, [BLOCK - 1]), [BLOCK])
        block = op.Div(op.Add(plan.length, op.Sub(blocks, [1])), blocks)  # even ones
        padded = op.Mul(blocks, block)
        more = op.Sub(padded, plan.length)
        zeros = op.constant([0, 0, 0, 0, 0, 0])
        query = op.Pad(self.query, op.Concat(zeros, more, op.constant([0]), axis=0))
        query = op.Reshape(
            query, op.shape(0, self.groups, self.heads // self.groups, padded, self.width)
        )
        starts = op.Mul(
            op.Range(op.constant(np.int64(0)), op.Squeeze(blocks), op.constant(np.int64(1))), block
        )
        sink_bias = None
        if self.sinks:
            sides = op.Concat(op.constant([0, 0, 0, 0]), more, op.constant([0]), axis=0)
            sink_bias = op.Pad(plan.sink_bias, sides)
        body = self._block(op.inner(), query, pieces, block, sink_bias)
        made = op.Scan(starts, num_scan_inputs=1, body=body)  # [N, B, Hk, G, block, Dv]
        made = op.Transpose(made, perm=[1, 0, 4, 2, 3, 5])
        made = op.Reshape(made, op.shape(0, padded, self.heads, self.depth))
        return [op.Slice(made, [0], plan.length, [1]), *rings]

    def _block(
        self,
        op: Nodes,
        query: ir.Value,
        pieces: list[Any],
        block: ir.Value,
        sink_bias: ir.Value | None,
    ) -> ir.Graph:
        """Queries [start, start + block) see the keys start + 1 … start + block + W - 1."""
        start = ir.val(f"{op.prefix}/start", ir.DataType.INT64, [])
        low = op.Unsqueeze(start, [0])
        high = op.Add(low, block)
        after = op.Add(high, [self.window])
        rows = op.Slice(query, low, high, [3])
        low = op.Add(low, [1])
        real = op.Slice(self.plan.reached, low, after, [1])  # [B, s]
        # Query j of the block sees keys j … j + W - 1 of the slice.
        one, zero = op.constant(np.int64(1)), op.constant(np.int64(0))
        asks = op.Unsqueeze(op.Range(zero, op.Squeeze(block), one), [1])
        keys = op.Range(zero, op.Squeeze(op.size(real, 1)), one)
        near = op.And(
            op.GreaterOrEqual(keys, asks), op.Less(keys, op.Add(asks, self.window))
        )  # [block, s]
        bias = op.Where(op.And(op.Unsqueeze(real, [1]), near), 0.0, HIDDEN)
        parts = []
        for joined, sinks in pieces:
            part = op.Slice(joined, low, after, [2])
            parts.append(part if sinks is None else op.Concat(sinks, part, axis=2))
        if sink_bias is not None:
            bias = op.Concat(op.Slice(sink_bias, op.Sub(low, [1]), high, [1]), bias, axis=2)
        made = self._attend(op, rows, parts[0], parts[1], op.Unsqueeze(bias, [1, 2]), block)
        return op.graph("block", [start], [made])
