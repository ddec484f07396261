"""What each op of the dialect becomes in ONNX: torch functions that emit contrib operators.

They are traced by `torch.export` as they stand, so that one function is both the lowering and
its shape rule. RoPE stays outside of attention: the graph rotates keys before they are cached.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Stands for the logit of a hidden key: finite, so that a row of padding is no NaN; in float16 too.
HIDDEN = -3e4


def _emit(
    op: str,
    inputs: list[Tensor | None],
    attributes: dict[str, object],
    outputs: list[tuple[torch.dtype, tuple[object, ...]]],
) -> list[Tensor]:
    """One node of ONNX Runtime's contrib domain with the given output types and shapes."""
    return list(
        torch.onnx.ops.symbolic_multi_out(
            f"com.microsoft::{op}",
            inputs,
            attrs=attributes,  # type: ignore[arg-type]
            dtypes=[dtype for dtype, _ in outputs],
            shapes=[shape for _, shape in outputs],  # type: ignore[misc]
            version=1,
        )
    )


def attention_bias(mask: Tensor, query: Tensor, window: int, sinks: int) -> Tensor:
    """Additive mask [B, 1, L, T] of left padding and of a window with sinks.

    Args:
        mask: [B, T], non-zero for real tokens.
        query: [B, H, L, D], only for L; its tokens are the last L of T.
        window, sinks: as in `rewriter::attention`; 0 for a window that the operator does itself.
    """
    length, total = query.shape[2], mask.shape[1]
    real = mask.bool()
    keep = real[:, None, :].expand(-1, length, -1)
    if window > 0:
        key = torch.arange(total, device=mask.device)
        asks = torch.arange(length, device=mask.device) + (total - length)
        near = (asks[:, None] - key[None, :]) < window
        first = real & (real.to(torch.int64).cumsum(-1) <= sinks)
        keep = keep & (near[None] | first[:, None, :])
    return torch.where(keep, 0.0, HIDDEN).to(query.dtype)[:, None]


def group_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    bias: Tensor | None,
    sink_logits: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention as com.microsoft GroupQueryAttention.

    Args:
        query: [B, H, L, D]; key, value: [B, Hk, L, D], the new tokens only.
        past_key, past_value: [B, Hk, P, D]; P may be 0. The operator appends to them.
        bias: [B or 1, H or 1, L, P + L] or None.

    Returns: output [B, L, H, D], present_key and present_value [B, Hk, P + L, D].
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    rows = lambda t: t.transpose(1, 2).reshape(batch, length, -1)  # noqa: E731
    total = past_key.shape[2] + length
    last = torch.full((batch,), total - 1, dtype=torch.int32)  # padding is in the bias
    count = torch.full((1,), total, dtype=torch.int32)
    present = (batch, groups, total, width)
    inputs = [rows(query), rows(key), rows(value), past_key, past_value, last, count]
    inputs += [None, None, None, bias, sink_logits]
    while inputs[-1] is None:
        inputs.pop()
    attributes: dict[str, object] = {
        "num_heads": heads,
        "kv_num_heads": groups,
        "scale": float(scale),
        "do_rotary": 0,
        "local_window_size": window if window > 0 else -1,
    }
    if softcap > 0:
        attributes["softcap"] = float(softcap)
    kind = query.dtype
    output, keys, values = _emit(
        "GroupQueryAttention",
        inputs,
        attributes,
        [(kind, (batch, length, heads * width)), (kind, present), (kind, present)],
    )
    return output.reshape(batch, length, heads, width), keys, values


def standard_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sink_logits: Tensor | None,
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
    keep = visible(length, total, mask, None, causal, window, chunk, sinks, query.device)
    if keep is not None:
        logits = torch.where(keep, logits, HIDDEN)
    if sink_logits is not None:
        extra = sink_logits.to(logits.dtype)[None, :, None, None].expand(batch, -1, length, 1)
        weights = torch.softmax(torch.cat([logits, extra], -1), -1)[..., :total]
    else:
        weights = torch.softmax(logits, -1)
    weights = weights.reshape(batch, groups, (heads // groups) * length, total)
    return (weights @ value).reshape(batch, heads, length, -1).transpose(1, 2)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`rewriter::ssd` as com.microsoft LinearAttention; shapes as in the op.

    query = C, key = B, value = dt x, decay = dt A, scale 1. The operator shares a *state*
    between the heads of a group, which SSD does not: B and C are repeated to all heads.
    Its state is [B, H, N, P], ours [B, H, P, N].
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
    past = (
        x.new_zeros((batch, heads, size, width), dtype=kind)
        if state is None
        else state.to(kind).transpose(2, 3)
    )
    y, present = _emit(
        "LinearAttention",
        [each(C).to(kind), each(B).to(kind), write, past, dt * A.to(kind)],
        {"q_num_heads": heads, "kv_num_heads": heads, "update_rule": "gated", "scale": 1.0},
        [(kind, (batch, length, heads * width)), (kind, (batch, heads, size, width))],
    )
    y = y.reshape(batch, length, heads, width)
    if D is not None:
        y = y + D.to(kind)[:, None] * x.to(kind)
    return y.to(x.dtype), present.transpose(2, 3)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """`rewriter::causal_conv1d` as com.microsoft CausalConvWithState; shapes as in the op."""
    batch, length, channels = x.shape
    tail = weight.shape[1] - 1
    if mask is not None:
        x = torch.where(mask.bool()[..., None], x, 0.0)
    past = x.new_zeros((batch, channels, tail)) if state is None else state.to(x.dtype)
    y, present = _emit(
        "CausalConvWithState",
        [x.transpose(1, 2), weight[:, None, :].to(x.dtype), bias, past],
        {"activation": activation, "ndim": 1},
        [(x.dtype, (batch, channels, length)), (x.dtype, (batch, channels, tail))],
    )
    return y.transpose(1, 2), present
