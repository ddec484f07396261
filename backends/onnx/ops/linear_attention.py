"""`rewriter::linear_attention`: com.microsoft LinearAttention, or a Scan over the tokens."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Node

from rewriter.backends.onnx.nodes import DOMAIN, MICROSOFT, Nodes, static
from rewriter.backends.onnx.registry import Context, emit, expands, lowers
from rewriter.errors import RewriterError

KIND = torch.float32  # the operator has no other type on the CPU


@lowers(torch.ops.rewriter.linear_attention.default)
def lower(node: Node, context: Context) -> None:
    fused = context.fused and context.can.linear_attention
    if context.fused and not fused:
        context.fall_back(
            f"linear_attention: a Scan over the tokens, onnxruntime {context.can.version} has no "
            "LinearAttention"
        )
    context.replace(node, with_operator if fused else with_scan)


def with_operator(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return linear_attention(MICROSOFT, *args)


def with_scan(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return linear_attention(DOMAIN, *args)


def linear_attention(
    domain: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    normalise: bool,
    state: Tensor | None,
    z: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in the op.

    The normaliser q·z is one more column of values, all ones, and z one more of the state.
    """
    if normalise and beta is not None:
        raise RewriterError(
            "linear_attention with a delta rule and a normaliser has no ONNX operator",
            "set normalise off, or leave beta out",
        )
    batch, length = v.shape[:2]
    states = max(t.shape[2] for t in (k, v, log_decay, beta) if t is not None)
    heads, depth, dtype = max(q.shape[2], states), v.shape[3], v.dtype

    def rows(t: Tensor | None, count: int = states) -> Tensor | None:
        """[B, T, h, …] with padding zeroed, heads repeated to `count`: [B, T, count …]."""
        if t is None:
            return None
        t = t.to(KIND)
        if mask is not None:
            t = torch.where(mask.bool().reshape(*mask.shape, *[1] * (t.dim() - 2)), t, 0.0)
        return t.repeat_interleave(count // t.shape[2], 2).reshape(batch, length, -1)

    value = v if not normalise else torch.cat([v, torch.ones_like(v[..., :1])], -1)
    width = value.shape[3]
    past = v.new_zeros((batch, states, k.shape[3], depth)) if state is None else state
    past = past.to(KIND)
    if normalise:
        mass = past.new_zeros(past.shape[:3]) if z is None else z.to(KIND)
        past = torch.cat([past, mass[..., None]], -1)
    rule = {(0, 0): "linear", (1, 0): "gated", (0, 1): "delta", (1, 1): "gated_delta"}
    y, present = emit(
        "LinearAttention",
        [rows(q, q.shape[2]), rows(k), rows(value), past, rows(log_decay), rows(beta)],
        {
            "q_num_heads": q.shape[2],
            "kv_num_heads": states,
            "update_rule": rule[int(log_decay is not None), int(beta is not None)],
            "scale": 1.0 if normalise else float(scale),
        },
        [(KIND, (batch, length, heads * width)), (KIND, tuple(past.shape))],
        domain,
    )
    y = y.reshape(batch, length, heads, width)
    if not normalise:
        return y.to(dtype), present, present.new_zeros((batch, states, 0))
    total = y[..., depth:]
    y = torch.where(total == 0, 0.0, y[..., :depth] / torch.where(total == 0, 1.0, total))
    return y.to(dtype), present[..., :depth], present[..., depth]


@expands("LinearAttention")
def expand(node: ir.Node, op: Nodes, memo: dict[Any, Any]) -> list[ir.Value]:
    """The recurrence, one token after another: S ← e^g S + k (β (v - e^g Sᵀk)), o = Sᵀq."""
    inputs: list[Any] = [*node.inputs, None, None][:6]
    query, key, value, past, decay, beta = inputs
    queries = node.attributes["q_num_heads"].as_int()
    states, size, width = (static(past, i) for i in (1, 2, 3))
    heads = max(queries, states)
    given = {"q": (query, (queries, size)), "k": (key, (states, size))}
    given["v"] = (value, (states, width))
    if decay is not None:
        given["g"] = (decay, (states, static(decay, 2) // states))
    if beta is not None:
        given["b"] = (beta, (states, 1))
    # [T, B, h, n]
    scanned = [
        op.Transpose(op.Reshape(t, [0, 0, *sizes]), perm=[1, 0, 2, 3])
        for t, sizes in given.values()
    ]
    body = op.inner()
    state = ir.val(f"{op.prefix}/state", ir.DataType.FLOAT)
    now = {name: ir.val(f"{op.prefix}/{name}", ir.DataType.FLOAT) for name in given}
    kept = state
    if "g" in now:
        kept = body.Mul(state, body.Unsqueeze(body.Exp(now["g"]), [3]))
    column = body.Unsqueeze(now["k"], [3])  # [B, S, K, 1]
    new = body.Unsqueeze(now["v"], [2])  # [B, S, 1, V]
    if "b" in now:
        known = body.MatMul(body.Transpose(column, perm=[0, 1, 3, 2]), kept)
        new = body.Mul(body.Unsqueeze(now["b"], [3]), body.Sub(new, known))
    after = body.Add(kept, body.Mul(column, new))
    asks = body.Unsqueeze(now["q"], [2])  # [B, Hq, 1, K]
    if queries > states:  # several queries read one state
        asks = body.Reshape(now["q"], [0, states, -1, size])
    made = body.Reshape(body.MatMul(asks, after), [0, heads, width])
    made = body.Mul(made, node.attributes["scale"].as_float())
    graph = body.graph("token", [state, *now.values()], [after, made])
    present, outputs = op.Scan(past, *scanned, num_scan_inputs=len(scanned), body=graph, outputs=2)
    outputs = op.Reshape(op.Transpose(outputs, perm=[1, 0, 2, 3]), [0, 0, heads * width])
    return [outputs, present]
