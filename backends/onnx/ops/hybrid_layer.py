"""One layer of a hybrid attention as ONNX nodes; see `hybrid_attention`.

Every graph here is written with the operators of the standard, for one form of the file and the
other, and for a batch whose rows have different lengths.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.backends.onnx.nodes import Nodes, rows_of, static
from rewriter.backends.onnx.ops.attention import HIDDEN
from rewriter.backends.onnx.ops.hybrid_plan import Blocks, Options, Step

TINY = 1e-30  # stands for the mass of a feature that no key has


class Layer:
    """Both branches return y [B, L, H, Dv] and the new states, but the count."""

    def __init__(self, node: ir.Node, options: Options) -> None:
        given: list[Any] = list(node.inputs)
        self.query, self.key, self.value, self.features, self.key_features, self.gate = given[:6]
        self.rings, (self.far_value, self.far_mass) = given[7:9], given[9:11]
        self.options, self.logits = options, bool(node.attributes["logits"].as_int())
        self.heads, self.groups = (static(t, 1) for t in (self.query, self.key))
        self.parts, self.size = (static(self.far_value, i) for i in (1, 2))
        self.width, self.depth = (static(t, 3) for t in (self.query, self.value))
        self.kind = self.query.dtype

    def _wide(self, op: Nodes, value: ir.Value) -> ir.Value:
        return value if self.kind is ir.DataType.FLOAT else op.Cast(value, to=ir.DataType.FLOAT)

    def _narrow(self, op: Nodes, value: ir.Value) -> ir.Value:
        return value if self.kind is ir.DataType.FLOAT else op.Cast(value, to=self.kind)

    def _of(self, op: Nodes, value: ir.Value, root: ir.Value, here: ir.Value) -> ir.Value:
        """`value` computed from `here` as it is from `root`, float32."""
        known = {root: here}

        def follows(v: ir.Value) -> bool:
            made = v.producer()
            return v is root or (made is not None and any(follows(i) for i in made.inputs if i))

        def copy(v: ir.Value | None) -> ir.Value | None:
            if v is None or v in known or not follows(v):
                return known.get(v, v)  # type: ignore[arg-type]
            made: Any = v.producer()
            inputs = [copy(i) for i in made.inputs]
            count = len(made.outputs)
            new = op.call(
                made.op_type, *inputs, domain=made.domain, outputs=count, **made.attributes
            )
            known.update(zip(made.outputs, [new] if count == 1 else new, strict=True))
            return known[v]

        return self._wide(op, copy(value))  # type: ignore[arg-type]

    @staticmethod
    def _rows(op: Nodes, value: ir.Value) -> ir.Value:
        """[B, h, n, D] as [B, n, h D]."""
        columns = static(value, 1) * static(value, 3)
        return op.Reshape(op.Transpose(value, perm=[0, 2, 1, 3]), [0, 0, columns])

    @staticmethod
    def _heads(op: Nodes, rows: ir.Value, count: int, width: int) -> ir.Value:
        """And back."""
        return op.Transpose(op.Reshape(rows, [0, 0, count, width]), perm=[0, 2, 1, 3])

    # ---- one token -----------------------------------------------------------------------------

    def decode(self, op: Nodes, step: Step) -> list[ir.Value]:
        rings = []
        for past, new in zip(self.rings, (self.key, self.value), strict=True):
            if self.options.sinks:
                new = op.Concat(new, new, axis=2)
            at = op.Expand(step.slots, op.Shape(new))
            rings.append(op.ScatterElements(past, at, new, axis=2))
        far = self.far_value, op.Unsqueeze(self.far_mass, [3])
        y = self._attend(op, self.query, rings, step, far, 1)
        y = op.Reshape(self._narrow(op, y), [0, 1, self.heads, self.depth])
        then, other = op.inner(), op.inner()
        number = self.options.window if self.options.block_aligned else 1
        left = []
        for ring, depth in zip(rings, (self.width, self.depth), strict=True):
            sizes = then.shape(then.size(self.query, 0), self.groups, number, depth)
            left.append(then.GatherElements(ring, then.Expand(step.leaving, sizes), axis=2))
        features = self._features(then, left[0], step.adds)
        grown = self._grown(
            then, features, left[1], (self.far_value, then.Unsqueeze(self.far_mass, [3]))
        )
        branches = {
            "then_branch": then.graph("leaves", [], [grown[0], then.Squeeze(grown[1], [3])]),
            "else_branch": other.graph(
                "stays", [], [other.Identity(t) for t in (self.far_value, self.far_mass)]
            ),
        }
        return [y, *rings, *op.If(step.some, outputs=2, **branches)]

    # ---- many tokens ---------------------------------------------------------------------------

    def prefill(self, op: Nodes, blocks: Blocks) -> list[ir.Value]:
        flat, rings = [], []
        for past, new in zip(self.rings, (self.key, self.value), strict=True):
            depth = static(new, 3)
            joined = op.Concat(self._rows(op, past), rows_of(op, new), axis=1)
            flat.append(op.Reshape(joined, [-1, self.groups * depth]))
            rings.append(self._heads(op, op.Gather(flat[-1], blocks.state), self.groups, depth))
        query = op.Reshape(rows_of(op, self.query), [-1, self.heads * self.width])
        names = ["query", "pair", "bias", "cap", "adds"]
        names += ["seen"] if self.options.reference == "mean" else []
        body = self._block(op.inner(), query, flat, names)
        scanned = [getattr(blocks, n) for n in names]
        mass = op.Unsqueeze(self.far_mass, [3])
        far_value, mass, y = op.Scan(
            self.far_value, mass, *scanned, num_scan_inputs=len(names), body=body, outputs=3
        )
        y = op.Gather(op.Reshape(y, [-1, self.heads * self.depth]), blocks.back)
        y = op.Reshape(y, [0, 0, self.heads, self.depth])
        return [y, *rings, far_value, op.Squeeze(mass, [3])]

    def _block(
        self, op: Nodes, query: ir.Value, flat: list[ir.Value], names: list[str]
    ) -> ir.Graph:
        """The Scan's body: y of a block of queries, then the block before enters the state."""
        w, sinks = self.options.window, self.options.sinks
        far = [ir.val(f"{op.prefix}/{n}", ir.DataType.FLOAT) for n in ("far_value", "far_mass")]
        now = {
            n: ir.val(
                f"{op.prefix}/{n}",
                ir.DataType.INT64 if n in ("query", "pair") else ir.DataType.FLOAT,
            )
            for n in names
        }
        rows = self._heads(op, op.Gather(query, now["query"]), self.heads, self.width)
        key, value = (
            self._heads(op, op.Gather(t, now["pair"]), self.groups, n)
            for t, n in zip(flat, (self.width, self.depth), strict=True)
        )
        place = np.arange(w)
        after = place[None] > place[:, None]
        behind = np.zeros_like(after) if self.options.block_aligned else ~after
        hidden = np.concatenate([np.zeros((w, sinks), dtype=bool), behind, after], 1)
        near = SimpleNamespace(
            bias=op.Unsqueeze(op.Add(now["bias"], np.where(hidden, HIDDEN, 0.0)), [1, 2]),
            cap=now["cap"],
            seen=now.get("seen"),
        )
        before = [op.Slice(t, [sinks], [sinks + w], [2]) for t in (key, value)]
        features = self._features(op, before[0], now["adds"])
        inside = None if self.options.block_aligned else (features, before[1], ~after)
        y = self._attend(op, rows, [key, value], near, far, w, inside)
        y = op.Transpose(self._narrow(op, y), perm=[0, 2, 1, 3])
        y = op.Reshape(y, [0, 0, self.heads * self.depth])
        grown = self._grown(op, features, before[1], far)
        return op.graph("block", [*far, *now.values()], [*grown, y])

    # ---- what both compute ---------------------------------------------------------------------

    def _features(self, op: Nodes, key: ir.Value, adds: ir.Value) -> ir.Value:
        """φ_k of keys [B, Hk, n, D], zero where adds [B, n] is: [B, G, n, F]."""
        found = self._of(op, self.key_features, self.key, key)
        return op.Mul(found, op.Unsqueeze(adds, [1, 3]))

    def _repeated(self, op: Nodes, value: ir.Value) -> ir.Value:
        """[B, Hk, n, Dv] as [B, G, n, Dv], float32."""
        value, each = self._wide(op, value), self.parts // self.groups
        if each == 1:
            return value
        value = op.Concat(*[op.Unsqueeze(value, [2])] * each, axis=2)
        return op.Reshape(value, [0, self.parts, -1, self.depth])

    def _grown(self, op: Nodes, features: ir.Value, value: ir.Value, far: Any) -> list[ir.Value]:
        turned = op.Transpose(features, perm=[0, 1, 3, 2])
        return [
            op.Add(far[0], op.MatMul(turned, self._repeated(op, value))),
            op.Add(far[1], op.ReduceSum(turned, [3])),
        ]

    def _attend(
        self,
        op: Nodes,
        query: ir.Value,
        pair: list[ir.Value],
        near: Any,
        far: Any,
        length: int,
        inside: Any = None,
    ) -> ir.Value:
        """y [B, H, l, Dv] of queries [B, H, l, D]; pair: keys and values [B, Hk, s + n, D(v)].

        near: bias [B, 1, 1, 1 or l, s + n], cap and seen [B, 1, l, 1]. far: the state's matrix
        [B, G, F, Dv] and masses [B, G, F, 1]. inside: features, values and visibility [l, n] of
        keys that are neither in the state nor near every query.
        """
        options, each = self.options, self.heads // self.groups

        def by(value: ir.Value, parts: int, width: int) -> ir.Value:  # [B, parts, … l, width]
            return op.Reshape(value, [0, parts, self.heads // parts * length, width])

        count = options.sinks + (options.ring if length == 1 else 2 * options.window)
        asks = by(op.Mul(self._wide(op, query), options.scale), self.groups, self.width)
        logits = op.MatMul(asks, op.Transpose(self._wide(op, pair[0]), perm=[0, 1, 3, 2]))
        logits = op.Reshape(logits, [0, self.groups, each, length, count])
        logits = op.Add(logits, near.bias)
        gate = op.Unsqueeze(self._of(op, self.gate, self.query, query), [-1])
        gate = op.Add(gate, near.cap)  # [B, H, l, 1]
        if options.reference != "none":
            window = op.Slice(logits, [options.sinks], [count], [4])
            level = (
                op.ReduceMax(window, [4])
                if options.reference == "max"
                else op.Sub(op.ReduceLogSumExp(window, [4]), op.Unsqueeze(near.seen, [1]))
            )
            gate = op.Add(gate, op.Reshape(level, [0, self.heads, length, 1]))
        exact, values = by(logits, self.groups, count), self._wide(op, pair[1])
        features = self._of(op, self.features, self.query, query)
        if self.logits:
            y = self._as_tokens(op, exact, values, op.Add(features, gate), far, by)
        else:
            y = self._as_sum(op, exact, values, features, gate, far, by, length, inside)
        return op.Reshape(y, [0, self.heads, length, self.depth])

    def _as_tokens(
        self, op: Nodes, exact: ir.Value, values: ir.Value, logits: ir.Value, far: Any, by: Any
    ) -> ir.Value:
        """One softmax over keys and features; [B, Hk, n, Dv] or [B, G, n, Dv]."""
        mass = op.Max(far[1], op.constant(TINY))
        mean = op.Div(far[0], mass)
        logits = op.Add(
            by(logits, self.parts, self.size), op.Transpose(op.Log(mass), perm=[0, 1, 3, 2])
        )
        logits = by(logits, self.groups, self.size)
        weights = op.Softmax(op.Concat(exact, logits, axis=-1), axis=-1)
        if self.parts == self.groups:
            return op.MatMul(weights, op.Concat(values, mean, axis=2))
        count = -self.size
        last = np.iinfo(np.int64).max
        near = op.MatMul(op.Slice(weights, [0], [count], [3]), values)
        distant = by(op.Slice(weights, [count], [last], [3]), self.parts, self.size)
        return op.Add(by(near, self.parts, self.depth), op.MatMul(distant, mean))

    def _as_sum(
        self,
        op: Nodes,
        exact: ir.Value,
        values: ir.Value,
        features: ir.Value,
        gate: ir.Value,
        far: Any,
        by: Any,
        length: int,
        inside: Any,
    ) -> ir.Value:
        """Numerators and normalisers apart; [B, G, n, Dv]."""
        grouped = by(gate, self.groups, 1)
        top = op.Max(op.ReduceMax(exact, [3]), grouped)
        weights = op.Exp(op.Sub(exact, top))
        factor = by(op.Exp(op.Sub(grouped, top)), self.parts, 1)
        distant = op.Mul(by(features, self.parts, self.size), factor)
        y, total = op.MatMul(distant, far[0]), op.MatMul(distant, far[1])
        if inside is not None:
            known, before, shown = inside
            each, count = self.heads // self.parts, len(shown)
            share = op.MatMul(distant, op.Transpose(known, perm=[0, 1, 3, 2]))
            share = op.Reshape(share, [0, self.parts, each, length, count])
            share = by(op.Mul(share, shown.astype(np.float32)), self.parts, count)
            y = op.Add(y, op.MatMul(share, self._repeated(op, before)))
            total = op.Add(total, op.ReduceSum(share, [3]))
        y = op.Add(y, by(op.MatMul(weights, values), self.parts, self.depth))
        total = op.Add(total, by(op.ReduceSum(weights, [3]), self.parts, 1))
        return op.Div(y, total)
