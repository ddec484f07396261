"""RMS normalisation, recognised in the graph: one operator, with the residual sum before it."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Node

from rewriter.backends.onnx.nodes import DOMAIN, MICROSOFT, Nodes
from rewriter.backends.onnx.registry import Context, emit, expands, fuses
from rewriter.graph import aten

MUL, ADD = aten.mul.Tensor, aten.add.Tensor


@fuses
def fuse(node: Any, context: Context) -> bool:
    """weight * (x * rsqrt(mean(x², -1) + eps)), in one precision, at its `rsqrt`.

    A weight of another shape than [D] stays a product of its own.
    """
    if node.target is not aten.rsqrt.default or node.args[0].target is not ADD:
        return False
    mean, eps = node.args[0].args[:2]
    if mean.target is not aten.mean.dim or list(mean.args[1]) != [-1] or mean.args[2:] != (True,):
        return False
    square, scaled = mean.args[0], _only(node.users)
    x = square.args[0]
    squared = {aten.pow.Tensor_Scalar: (x, 2), MUL: (x, x)}.get(square.target)
    if squared is None or squared != square.args or not isinstance(eps, float):
        return False
    if scaled is None or scaled.target is not MUL or set(scaled.args) != {x, node}:
        return False
    product = _only(scaled.users)
    if product is None or product.target is not MUL:
        return False
    weight = next((a for a in product.args if a is not scaled), None)
    if not isinstance(weight, Node) or weight.name not in context.values:
        return False
    width = context.value(x).shape[-1:]
    if context.value(weight).dtype != torch.float32:
        return False
    if context.value(weight).shape != width:  # one for each head
        if not context.fused:
            return False
        made = context.call(rms_norm, x, None, eps, True)
        context.values[made.name] = context.value(scaled)
        scaled.replace_all_uses_with(made)
        for old in (scaled, node):
            context.graph.erase_node(old)
        return True
    with context.graph.inserting_before(product):
        made = context.call(rms_norm, x, weight, eps, context.fused)
    context.values[made.name] = context.value(product)
    product.replace_all_uses_with(made)
    for old in (product, scaled, node):
        context.graph.erase_node(old)
    return True


def _only(users: dict[Node, None]) -> Any:
    return next(iter(users)) if len(users) == 1 else None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, fused: bool) -> Tensor:
    """x: [..., D], weight: [D] or None for ones; stands for the operators below."""
    if weight is None:
        weight = x.new_ones(x.shape[-1])
    attributes = {"eps": eps, "fused": int(fused)}
    return emit("RMSNorm", [x, weight], attributes, [(x.dtype, tuple(x.shape))], DOMAIN)[0]


@expands("RMSNorm")
def expand(node: ir.Node, op: Nodes, memo: dict[Any, Any]) -> list[ir.Value]:
    x, weight = (t for t in node.inputs if t is not None)
    eps = node.attributes["eps"].as_float()
    if not node.attributes["fused"].as_int():
        mean = op.ReduceMean(op.Mul(x, x), [-1])
        return [op.Mul(op.Div(x, op.Sqrt(op.Add(mean, eps))), weight)]
    added = x.producer()
    if added is None or added.op_type != "Add" or not _same_rows(*added.inputs):
        # Registered by ONNX Runtime in the standard's domain, for any opset.
        return [op.SimplifiedLayerNormalization(x, weight, epsilon=eps, axis=-1)]
    made, _, _, total = op.SkipSimplifiedLayerNormalization(
        *added.inputs, weight, epsilon=eps, domain=MICROSOFT, outputs=4
    )
    total.shape, total.type = x.shape, x.type
    ir.convenience.replace_all_uses_with(x, total, replace_graph_outputs=True)
    return [made]


def _same_rows(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Two values [B, L, D] that an Add does not broadcast."""
    return a is not None and b is not None and len(a.shape or ()) == 3 and a.shape == b.shape
