"""`rewriter::attention` over a growing cache: GroupQueryAttention, or MatMul and Softmax.

RoPE stays outside of attention: the graph rotates keys before they are cached.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Node

from rewriter.backends.onnx.nodes import DOMAIN, MICROSOFT, Nodes, rows_of, static
from rewriter.backends.onnx.registry import Context, emit, expands, lowers
from rewriter.graph import ATTENTION, argument
from rewriter.state import update_kv

#: Stands for the logit of a hidden key: finite, so that a row of padding is no NaN; in float16 too.
HIDDEN = -3e4


# ---- traced functions ------------------------------------------------------------------------


def grouped_query(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    mask: Tensor | None,
    sink_logits: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    lengths: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention as com.microsoft GroupQueryAttention, which appends to its cache.

    Args:
        query: [B, H, L, D]; key, value: [B, Hk, L, D], the new tokens only.
        past_key, past_value: [B, Hk, P, D]; P may be 0, or more than what was written, if the
            same buffer is bound to the output. With a window, P is the window.
        mask: [B, T], non-zero for real tokens; the new ones are the last L.
        lengths: whether the operator takes the number of new tokens of each row.

    Returns: output [B, L, H, D], present_key and present_value [B, Hk, P + L, D] (or the window).
    """
    batch, heads, length, width = query.shape
    kept = past_key.shape[2] if window > 0 else past_key.shape[2] + length
    present = (batch, key.shape[1], kept, width)
    output, keys, values = emit(
        "GroupedQuery",
        [query, key, value, past_key, past_value, mask, sink_logits],
        {"scale": float(scale), "window": window, "softcap": softcap, "lengths": int(lengths)},
        [(query.dtype, (batch, length, heads, width))] + [(query.dtype, present)] * 2,
        domain=DOMAIN,
    )
    return output, keys, values


def standard_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sink_logits: Tensor | None,
    key_positions: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    sinks: int,
    softcap: float,
) -> Tensor:
    """`rewriter::attention` in standard operators (MatMul, Softmax): any batch, any option."""
    from rewriter.kernels.attention.reference import visible

    batch, heads, length, width = query.shape
    groups, total = key.shape[1], key.shape[2]
    # Heads of one group are rows of one matrix: keys are not repeated.
    folded = query.reshape(batch, groups, (heads // groups) * length, width)
    logits = (folded @ key.transpose(-1, -2)) * scale
    logits = logits.reshape(batch, heads, length, total)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    keep = visible(length, total, mask, key_positions, causal, window, chunk, sinks, query.device)
    if keep is not None:
        logits = torch.where(keep, logits, HIDDEN)
    if sink_logits is not None:
        extra = sink_logits.to(logits.dtype)[None, :, None, None].expand(batch, -1, length, 1)
        weights = torch.softmax(torch.cat([logits, extra], -1), -1)[..., :total]
    else:
        weights = torch.softmax(logits, -1)
    weights = weights.reshape(batch, groups, (heads // groups) * length, total)
    return (weights @ value).reshape(batch, heads, length, -1).transpose(1, 2)


# ---- lowerings -------------------------------------------------------------------------------


@lowers(ATTENTION)
def lower_attention(node: Node, context: Context) -> None:
    """Attention without a cache, or over one that an update has joined."""
    context.replace(node, standard_attention)


@lowers(update_kv)
def lower_growing(update: Any, context: Context) -> None:
    """A cache that keeps every token, and the attention that reads it."""
    key, value, mask = update.args[1:4]
    pasts = past_key_value(update, 0, context, grows=2)
    attention = reader(update)
    why = "standard operators were asked for"
    if context.fused:
        why = not_fusable(attention, mask, context)
        if why:
            context.fall_back(f"{name_of(update)}: standard operators, {why}")
    if why:
        joined = [
            context.call(torch.cat, [past, new], 2)
            for past, new in zip(pasts, (key, value), strict=True)
        ]
        replace_update(update, [*joined, mask, None])
        for past, new in zip(pasts, joined, strict=True):
            context.present(past, new)
    else:
        lower_fused(update, attention, pasts, 0, context)


def lower_fused(
    update: Any, attention: Any, pasts: list[Node], window: int, context: Context
) -> None:
    """Update and attention as one GroupQueryAttention."""
    key, value, mask = update.args[1:4]
    get = lambda name: argument(attention, name)  # noqa: E731
    lengths = context.can.query_lengths
    if mask is not None and not lengths:
        context.fall_back(
            f"GroupQueryAttention of onnxruntime {context.can.version} takes several new tokens "
            "after a past for batch 1 only: prefill a batch in one call, or export with "
            "attention='standard'"
        )
    arguments = [get("query"), key, value, *pasts, mask, get("sink_logits")]
    with context.graph.inserting_before(attention):
        made = context.call(
            grouped_query, *arguments, get("scale"), window, get("softcap"), lengths
        )
        output, *presents = context.outputs_of(made, 3)
    attention.replace_all_uses_with(output)
    context.graph.erase_node(attention)
    replace_update(update, [])
    for past, new in zip(pasts, presents, strict=True):
        context.present(past, new)
        context.share(past)


# ---- the subgraph of a fused attention ---------------------------------------------------------


@dataclass
class Order:
    """Where each row's real tokens go, so that they come first and its cache has no holes.

    GroupQueryAttention knows padding on the right only. There and back are places in a row, int64
    [B, L, 1]; last int32 [B] is the number of real tokens so far, less one; count int32 [B] that
    of real new tokens; total int32 [1] the number of columns.
    """

    there: ir.Value
    back: ir.Value
    last: ir.Value
    count: ir.Value
    total: ir.Value


def token_order(op: Nodes, mask: ir.Value, length: ir.Value) -> Order:
    """mask: [B, T], non-zero for real tokens; the new ones are the last `length` [1]."""
    total = op.size(mask, 1)
    real = op.Cast(op.Cast(mask, to=ir.DataType.BOOL), to=ir.DataType.INT64)
    new = op.Slice(real, op.Sub(total, length), total, [1])
    count = op.ReduceSum(new, [1])  # [B, 1]
    after = op.Add(count, op.CumSum(op.Sub(1, new), 1))
    fresh = op.Greater(new, 0)
    place = op.Sub(op.Where(fresh, op.CumSum(new, 1), after), 1)  # [B, L]
    zero, one = op.constant(np.int64(0)), op.constant(np.int64(1))
    columns = op.Expand(op.Range(zero, op.Squeeze(length), one), op.Shape(new))
    seen = op.ReduceSum(real, [1], keepdims=0)
    # A row of padding alone must hold something: the next real token takes its place.
    count = op.Where(op.Greater(seen, 0), op.Squeeze(count, [1]), 1)
    whole = lambda value: op.Cast(value, to=ir.DataType.INT32)  # noqa: E731
    return Order(
        there=op.Unsqueeze(op.ScatterElements(columns, place, columns, axis=1), [2]),
        # The operator leaves rows past `count` unwritten: padding reads a row that it wrote.
        back=op.Unsqueeze(op.Where(fresh, place, 0), [2]),
        last=whole(op.Sub(op.Max(seen, one), 1)),
        count=whole(count),
        total=whole(total),
    )


@expands("GroupedQuery")
def expand(node: ir.Node, op: Nodes, memo: dict[Any, Any]) -> list[ir.Value]:
    given: list[Any] = [*node.inputs, None, None][:7]
    query, key, value, *pasts = given[:5]
    mask, sink_logits = given[5:]
    heads, groups, width = static(query, 1), static(key, 1), static(query, 3)
    window = node.attributes["window"].as_int()
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": groups,
        "scale": node.attributes["scale"].as_float(),
        "do_rotary": 0,
        "local_window_size": window or -1,
    }
    if window:
        attributes["sliding_window_cache"] = 1
    if softcap := node.attributes["softcap"].as_float():
        attributes["softcap"] = softcap
    tokens = [rows_of(op, t) for t in (query, key, value)]  # [B, L, H D]
    lengths = node.attributes["lengths"].as_int() and mask is not None
    count = bias = None
    if lengths:
        known = ("order", mask)
        if known not in memo:
            memo[known] = token_order(op, mask, op.size(tokens[0], 1))
        order = memo[known]
        last, count, total = order.last, order.count, order.total
        tokens = [op.GatherND(t, order.there, batch_dims=1) for t in tokens]
    else:
        bias, last, total = _padding_bias(op, mask, tokens[0], pasts[0], memo)
    inputs = [*tokens, *pasts, last, total, None, None, None, bias, sink_logits]
    inputs += [None, None, None, None, count]
    while inputs[-1] is None:
        inputs.pop()
    output, *presents = op.GroupQueryAttention(*inputs, domain=MICROSOFT, outputs=3, **attributes)
    if lengths:
        output = op.GatherND(output, order.back, batch_dims=1)
    return [op.Reshape(output, [0, 0, heads, width]), *presents]


def _padding_bias(
    op: Nodes, mask: ir.Value | None, tokens: ir.Value, past: Any, memo: dict[Any, Any]
) -> tuple[ir.Value | None, ir.Value, ir.Value]:
    """Additive mask [B, 1, L, T] of padding, last and total, for an operator without lengths."""
    known = ("bias", mask)
    if known not in memo:
        length = op.size(tokens, 1)
        total = op.Add(op.size(past, 2), length) if mask is None else op.size(mask, 1)
        bias = None
        if mask is not None:
            keep = op.Unsqueeze(op.Cast(mask, to=ir.DataType.BOOL), [1, 2])
            sizes = op.Concat(op.size(mask, 0), op.constant([1]), length, total, axis=0)
            bias = op.Expand(op.Where(keep, 0.0, HIDDEN), sizes)
            if tokens.dtype is not ir.DataType.FLOAT:
                bias = op.Cast(bias, to=tokens.dtype)
        last = op.Expand(op.Sub(total, [1]), op.size(tokens, 0))
        whole = lambda value: op.Cast(value, to=ir.DataType.INT32)  # noqa: E731
        memo[known] = bias, whole(last), whole(total)
    return memo[known]


# ---- shared with the windowed cache ------------------------------------------------------------


def past_key_value(
    update: Any, slots: int, context: Context, grows: int | None = None
) -> list[Node]:
    """Inputs for the cached keys and values [B, Hk, slots, D] of an update."""
    index = str(update.args[0].target).removeprefix("state_")
    made = []
    for name, new in zip(("key", "value"), update.args[1:3], strict=True):
        _, groups, _, width = context.value(new).shape
        dtype = context.value(new).dtype
        made.append(context.state(f"{name}_{index}", (groups, slots, width), dtype, grows))
    return made


def reader(update: Node) -> Any:
    """The attention node that reads an update, if it alone does."""
    users = {u for item in update.users for u in item.users}
    attention = [u for u in users if u.target is ATTENTION]
    return attention[0] if len(attention) == 1 == len(users) else None


def not_fusable(node: Any, mask: Any, context: Context) -> str:
    """Why GroupQueryAttention cannot say what this node says; '' if it can."""
    if not context.can.grouped_query:
        return f"onnxruntime {context.can.version} has no GroupQueryAttention"
    if node is None:
        return "something else than attention reads the cache"
    if not argument(node, "causal"):
        return "the attention is not causal"
    if argument(node, "chunk"):
        return "the attention is chunked"
    if argument(node, "bias") is not None:
        return "the logits have a bias"
    if mask is not None and context.value(mask).dim() != 2:
        return "the mask is dense"
    if argument(node, "sinks") and argument(node, "window"):
        return "it knows windows, but no sink tokens"
    if argument(node, "window") and not context.can.window_cache:
        return f"onnxruntime {context.can.version} has no window-sized cache with padding"
    query, value = (context.value(argument(node, n)) for n in ("query", "value"))
    if query.shape[-1] != value.shape[-1]:
        return "values are not as wide as keys"
    return ""


def replace_update(update: Any, values: list[Any]) -> None:
    """Give the readers of an update's results `values` instead, and remove the update."""
    for item in list(update.users):
        assert item.target is operator.getitem
        if values:
            item.replace_all_uses_with(values[item.args[1]])
        item.graph.erase_node(item)
    update.graph.erase_node(update)


def name_of(node: Node) -> str:
    return node.meta.get("path") or node.name
