"""`rewriter::ssd`: com.microsoft LinearAttention, or one masked matrix product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

import rewriter.kernels.ssd  # noqa: F401  registers the op
from rewriter.backends.onnx.registry import Context, emit, lowers
from rewriter.graph import argument


@lowers(torch.ops.rewriter.ssd.default)
def lower(node: Node, context: Context) -> None:
    if context.fused and context.can.linear_attention:
        state = argument(node, "state")
        turned = context.turn_state(state, node, 1)
        if turned:
            context.share(state)
        context.replace(node, linear_attention_turned if turned else linear_attention)
        return
    if context.fused:
        context.fall_back(
            f"ssd: standard operators, onnxruntime {context.can.version} has no LinearAttention"
        )
    context.replace(node, as_matrix)


def linear_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """Arguments and results as in the op."""
    state = args[6]
    y, present = linear_attention_turned(  # type: ignore[call-arg]
        *args[:6], None if state is None else state.transpose(2, 3), *args[7:]
    )
    return y, present.transpose(2, 3)


def linear_attention_turned(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As in the op, but for the state, [B, H, N, P] as the operator has it.

    query = C, key = B, value = dt x, decay = dt A, scale 1. The operator shares a *state* between
    the heads of a group, which SSD does not: B and C are repeated to all heads. With dt = 0 a
    padded token neither writes nor decays.
    """
    batch, length, heads, width = x.shape
    size = B.shape[3]
    if mask is not None:
        dt = torch.where(mask.bool()[..., None], dt, 0.0)
    each = lambda t: (  # noqa: E731  [B, L, G, N] -> [B, L, H N]
        t[:, :, :, None, :]
        .expand(-1, -1, -1, heads // t.shape[2], -1)
        .reshape(batch, length, heads * size)
    )
    kind = torch.float32  # the operator has no other type on the CPU
    dt = dt.to(kind)
    write = (dt[..., None] * x.to(kind)).reshape(batch, length, heads * width)
    past = x.new_zeros((batch, heads, size, width), dtype=kind) if state is None else state.to(kind)
    y, present = emit(
        "LinearAttention",
        [each(C).to(kind), each(B).to(kind), write, past, dt * A.to(kind)],
        {"q_num_heads": heads, "kv_num_heads": heads, "update_rule": "gated", "scale": 1.0},
        [(kind, (batch, length, heads * width)), (kind, (batch, heads, size, width))],
    )
    y = y.reshape(batch, length, heads, width)
    if D is not None:
        y = y + D.to(kind)[:, None] * x.to(kind)
    if mask is not None:
        y = torch.where(mask.bool()[..., None, None], y, 0.0)
    return y.to(x.dtype), present


def as_matrix(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same in standard operators: a [L, L] matrix for each head, quadratic in L."""
    batch, length, heads, width = x.shape
    each = lambda t: (  # noqa: E731  [B, L, G, N] -> [B, H, L, N]
        t[:, :, :, None, :]
        .expand(-1, -1, -1, heads // t.shape[2], -1)
        .reshape(batch, length, heads, t.shape[3])
        .transpose(1, 2)
        .to(torch.float32)
    )
    if mask is not None:
        dt = torch.where(mask.bool()[..., None], dt, 0.0)
        x, B, C = (torch.where(mask.bool()[..., None, None], t, 0.0) for t in (x, B, C))
    dt = dt.to(torch.float32)
    decay = (dt * A.to(torch.float32)).transpose(1, 2).cumsum(2)  # [B, H, L], log
    write = (dt[..., None] * x.to(torch.float32)).transpose(1, 2)  # [B, H, L, P]
    key, query = each(B), each(C)
    step = torch.arange(length, device=x.device)
    between = decay[..., :, None] - decay[..., None, :]
    between = torch.where(step[:, None] >= step[None, :], between, float("-inf"))
    y = ((query @ key.transpose(2, 3)) * torch.exp(between)) @ write
    left = torch.exp(decay[..., -1:] - decay)[..., None]
    present = (write * left).transpose(2, 3) @ key  # [B, H, P, N]
    if state is not None:
        state = state.to(torch.float32)
        y = y + torch.exp(decay)[..., None] * (query @ state.transpose(2, 3))
        present = present + torch.exp(decay[..., -1])[..., None, None] * state
    y = y.transpose(1, 2)
    if D is not None:
        y = y + D.to(torch.float32)[:, None] * x.to(torch.float32)
    return y.to(x.dtype), present
