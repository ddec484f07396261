"""`rewriter::hybrid_attention` in standard operators: a Scan over blocks of queries, or one step.

A block of queries sees itself and the block before exactly; the state, a matrix a head, holds
everything older and grows by one block after each. What a position alone decides (feature maps,
gates) is computed block by block too: nothing of it is as long as the sequence.

With features that are a softmax of logits x (`centroid`), feature f is one more token to attend
to: its logit is x_f + gate + log m_f for its mass m_f, its value the mean of its keys' values.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Node

import rewriter.kernels.hybrid_attention  # noqa: F401  registers the op
from rewriter.backends.onnx.nodes import DOMAIN, Nodes
from rewriter.backends.onnx.ops.attention import name_of
from rewriter.backends.onnx.ops.hybrid_layer import Layer
from rewriter.backends.onnx.ops.hybrid_plan import Blocks, Options, Ranks, Step
from rewriter.backends.onnx.registry import Context, emit, expands, lowers
from rewriter.errors import RewriterError
from rewriter.graph import argument, aten
from rewriter.kernels.hybrid_attention.op import STATE

HYBRID = torch.ops.rewriter.hybrid_attention.default
#: States of the file. Sinks lie before the rings; features of their keys follow from the keys.
HELD = ("ring_key", "ring_value", "far_value", "far_mass", "count")
#: ATen operators that look at one position at a time, as they are used in feature maps.
LOCAL = {
    *(aten.matmul.default, aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default),
    *(aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, aten.softmax.int),
    *(aten.logsumexp.default, aten.exp.default, aten.tanh.default, aten.elu.default),
    *(aten.clamp.default, aten.relu.default, aten.cat.default, aten.to.dtype),
    *(aten.repeat_interleave.self_int,),
}

# ---- lowering --------------------------------------------------------------------------------


@lowers(HYBRID)
def lower(node: Node, context: Context) -> None:
    get = lambda name: argument(node, name)  # noqa: E731
    query, key, gate = get("query"), get("key"), _unexpanded(get("gate"))
    features = get("query_features")
    logits = _softmax_of(features) if get("block_aligned") else None
    if logits is not None and (rest := _without(gate, logits, context)) is not None:
        features, gate = logits, rest
    for value, root in ((features, query), (gate, query), (get("key_features"), key)):
        if not _local(value, root):
            raise RewriterError(
                f"{name_of(node)}: no ONNX lowering of this hybrid attention, its "
                f"{value.name} is not computed from {root.name} position by position",
                "report this model",
            )
    sinks = get("sinks")
    pasts, mask = {n: get(n) for n in HELD}, _whole(get("mask"), query)
    given = dict(pasts)
    if given["count"] is not None:  # the same in all layers of one mask
        given["count"] = context.memo.setdefault(("hybrid count", mask), given["count"])
    made = context.call(
        hybrid_attention,
        *(query, key, get("value"), features, get("key_features"), gate, mask, *given.values()),
        *(get(name) for name in ("scale", "window", "block_aligned", "sinks", "reference")),
        get("far_cap"),
        features is logits,
    )
    outputs = dict(zip(("y", *HELD), context.outputs_of(made, 1 + len(HELD)), strict=True))
    items = {("y", *STATE)[u.args[1]]: u for u in node.users}  # type: ignore[index]
    items["y"].replace_all_uses_with(outputs["y"])
    dropped = [get(n) for n in STATE if n not in HELD] + [
        past for name, past in pasts.items() if past is not given[name]
    ]
    for item in [*items.values(), node]:
        context.graph.erase_node(item)
    for name, past in pasts.items():
        if past is not None:
            context.present(past, outputs[name])
    for past in dropped:
        if past is not None:
            del context.outputs[context.states.pop(str(past.target)).output]
            context.graph.erase_node(past)
    for past in (pasts["ring_key"], pasts["ring_value"]):
        if past is not None:
            tensor = context.states[str(past.target)]
            groups, slots, width = tensor.shape
            shape = (groups, sinks + slots, width)
            context.states[str(past.target)] = replace(tensor, shape=shape, shared=True)


def _softmax_of(features: Node) -> Node | None:
    """x, if these are softmax(x)."""
    while features.target is aten.to.dtype:
        features = features.args[0]  # type: ignore[assignment]
    return features.args[0] if features.target is aten.softmax.int else None  # type: ignore


def _unexpanded(gate: Node) -> Node:
    return gate.args[0] if gate.target is aten.expand.default else gate  # type: ignore


def _without(gate: Any, logits: Node, context: Context) -> Node | None:
    """The gate less its term logsumexp(logits), which normalised φ_q; None if it has none."""
    if gate.target is not aten.add.Tensor:
        return None
    for term, other in (gate.args, gate.args[::-1]):
        if term.target is aten.logsumexp.default and term.args[0] is logits:
            return other
        if (rest := _without(term, logits, context)) is not None:
            return context.call(aten.add.Tensor, rest, other)
    return None


def _local(value: Any, root: Node) -> bool:
    """Whether a value follows from `root`, position by position, and from weights."""
    if value is root or value.op == "get_attr":
        return True
    return value.target in LOCAL and all(_local(n, root) for n in value.all_input_nodes)


def _whole(mask: Any, query: Node) -> Node | None:
    """The mask of all columns, if this is its last L columns."""
    if mask is None or mask.target is not aten.slice.Tensor or mask.args[1] != 1:
        return mask
    start = mask.args[2]
    if isinstance(start, Node) and start.target is operator.neg:
        size: Any = start.args[0]
        if size.target is aten.sym_size.int and size.args == (query, 2):
            return mask.args[0]
    return mask


def hybrid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    features: Tensor,
    key_features: Tensor,
    gate: Tensor,
    mask: Tensor | None,
    ring_key: Tensor | None,
    ring_value: Tensor | None,
    far_value: Tensor | None,
    far_mass: Tensor | None,
    count: Tensor | None,
    scale: float,
    window: int,
    block_aligned: bool,
    sinks: int,
    reference: str,
    far_cap: float,
    logits: bool,
) -> tuple[Tensor, ...]:
    """Stands for the subgraph below. Shapes as in the op, and:

    features: φ_q, or with `logits` what it is the softmax of; the gate then lacks their logsumexp.
    gate: [B, H, L] or [H, 1]. mask: [B, T], whose last L columns are these tokens.
    """
    batch, heads, length, width = query.shape
    groups, depth = key.shape[1], value.shape[3]
    size, parts = key_features.shape[3], key_features.shape[1]
    slots = sinks + (2 * window if block_aligned else window)
    shapes: list[Any] = [
        (batch, groups, slots, width),
        (batch, groups, slots, depth),
        (batch, parts, size, depth),
        (batch, parts, size),
        (batch,),
    ]
    pasts = [ring_key, ring_value, far_value, far_mass, count]
    kinds = [query.dtype] * 2 + [torch.float32] * 2 + [torch.int64]
    before = [
        query.new_zeros(shape, dtype=kind) if past is None else past
        for past, shape, kind in zip(pasts, shapes, kinds, strict=True)
    ]
    return tuple(
        emit(
            "HybridAttention",
            [query, key, value, features, key_features, gate, mask, *before],
            {
                "scale": float(scale),
                "window": window,
                "block_aligned": int(block_aligned),
                "sinks": sinks,
                "reference": reference,
                "far_cap": float(far_cap),
                "logits": int(logits),
            },
            [(query.dtype, (batch, length, heads, depth)), *zip(kinds, shapes, strict=True)],
            domain=DOMAIN,
        )
    )


# ---- the subgraph ------------------------------------------------------------------------------


@expands("HybridAttention")
def expand(node: ir.Node, op: Nodes, memo: dict[Any, Any]) -> list[ir.Value]:
    read = node.attributes
    options = Options(
        scale=read["scale"].as_float(),
        window=read["window"].as_int(),
        block_aligned=bool(read["block_aligned"].as_int()),
        sinks=read["sinks"].as_int(),
        reference=read["reference"].as_string(),
        far_cap=read["far_cap"].as_float(),
    )
    query, mask, count = node.inputs[0], node.inputs[6], node.inputs[11]
    known = ("hybrid", mask, count, options)
    if known not in memo:
        ranks = Ranks(op, query, mask, count, options)  # type: ignore[arg-type]
        memo[known] = ranks, Blocks(op, ranks), Step(op, ranks)
    ranks, blocks, step = memo[known]
    layer = Layer(node, options)
    branches = {}
    for name, write in (
        ("then_branch", lambda inner: layer.decode(inner, step)),
        ("else_branch", lambda inner: layer.prefill(inner, blocks)),
    ):
        inner = op.inner()
        branches[name] = inner.graph(name, [], write(inner))
    made = op.If(ranks.one, outputs=5, **branches)
    return [*made, op.Identity(ranks.total)]  # it gets the name of this output
