"""Rotary position embedding, recognised in the graph: one operator, one table for all layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor
from torch.fx import Node

from rewriter.backends.onnx.nodes import DOMAIN, MICROSOFT, Nodes, rows_of, static
from rewriter.backends.onnx.registry import Context, emit, expands, fuses
from rewriter.graph import argument, aten

MUL, ADD, SLICE, CAT = aten.mul.Tensor, aten.add.Tensor, aten.slice.Tensor, aten.cat.default


@fuses
def fuse(node: Any, context: Context) -> bool:
    """x cos + [-x₂, x₁] sin, x: [B, H, L, D], at its `add`."""
    if node.target is not ADD or not context.fused:
        return False
    terms = [a for a in node.args if isinstance(a, Node) and a.target is MUL]
    if len(terms) != 2 or len(node.args) != 2:
        return False
    for plain, turned in (terms, terms[::-1]):
        for rotated, sin in (turned.args, turned.args[::-1]):
            x = _half_turned(rotated, context)
            if x is None or x not in plain.args or not isinstance(sin, Node):
                continue
            cos = next((a for a in plain.args if a is not x), None)
            if isinstance(cos, Node) and _twice(cos) and _twice(sin):
                made = context.call(rotary, x, cos, sin)
                context.values[made.name] = context.value(node)
                node.replace_all_uses_with(made)
                context.graph.erase_node(node)
                return True
    return False


def _half_turned(node: Any, context: Context) -> Node | None:
    """x, if this is [-x₂, x₁] of its last dimension."""
    if not isinstance(node, Node) or node.target is not CAT or argument(node, "dim") != -1:
        return None
    parts: Any = node.args[0]
    if len(parts) != 2 or parts[0].target is not aten.neg.default:
        return None
    second, first = parts[0].args[0], parts[1]
    if second.target is not SLICE or first.target is not SLICE:
        return None
    x: Any = first.args[0]
    if second.args[0] is not x or context.value(x).dim() != 4:
        return None
    half = context.value(x).shape[-1] // 2
    spans = [tuple(argument(n, k) for k in ("start", "end")) for n in (first, second)]
    dims = {argument(n, "dim") for n in (first, second)}
    whole = spans[0] in ((0, half), (None, half)) and spans[1][0] == half
    return x if whole and spans[1][1] >= 2 * half and dims <= {3, -1} else None


def _twice(node: Any) -> bool:
    """Whether both halves of a table are equal by construction: cos(cat([f, f]))."""
    while node.target in (MUL, aten.unsqueeze.default, aten.to.dtype):
        if node.target is MUL and isinstance(node.args[1], Node):
            return False
        node = node.args[0]
    if node.target not in (aten.cos.default, aten.sin.default):
        return False
    joined: Any = node.args[0]
    if joined.target is not CAT:
        return False
    parts = joined.args[0]
    return len(parts) == 2 and parts[0] is parts[1]


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [B, H, L, D]; cos, sin: [B or 1, 1, L, D]; stands for the operators below."""
    return emit("Rotary", [x, cos, sin], {}, [(x.dtype, tuple(x.shape))], DOMAIN)[0]


@expands("Rotary")
def expand(node: ir.Node, op: Nodes, memo: dict[Any, Any]) -> list[ir.Value]:
    """RotaryEmbedding with a table of this call's positions, one row a token: no longest length."""
    x, cos, sin = (t for t in node.inputs if t is not None)
    heads, width = static(x, 1), static(x, 3)
    rows = rows_of(op, x)
    known = ("rotary", cos, sin)
    if known not in memo:
        tables = [
            op.Reshape(op.Slice(t, [0], [width // 2], [3]), [-1, width // 2]) for t in (cos, sin)
        ]
        there = op.Concat(op.size(cos, 0), op.size(cos, 2), axis=0)
        count = op.Squeeze(op.size(tables[0], 0))
        zero, one = op.constant(np.int64(0)), op.constant(np.int64(1))
        index = op.Reshape(op.Range(zero, count, one), there)
        memo[known] = [op.Expand(index, op.Shape(rows, start=0, end=2)), *tables]
    made = op.RotaryEmbedding(rows, *memo[known], domain=MICROSOFT)
    made.shape, made.type = ir.Shape([None, None, heads * width]), x.type
    return [op.Transpose(op.Reshape(made, [0, 0, heads, width]), perm=[0, 2, 1, 3])]
