"""What `rewriter::attention` means."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    query_length: int,
    key_length: int,
    mask: Tensor | None,
    key_positions: Tensor | None,
    causal: bool,
    window: int,
    chunk: int,
    sinks: int,
    device: torch.device,
) -> Tensor | None:
    """Which key each query may see: bool, broadcastable to [B, H, L, S]; None means all.

    Positions are columns of the padded batch; the queries are the last `query_length` ones.
    """
    dense = mask if mask is not None and mask.dim() == 4 else None
    padding = mask.bool() if mask is not None and mask.dim() == 2 else None
    if key_positions is None:
        key = torch.arange(key_length, device=device)[None, :]
        last = torch.full((1, 1), key_length - 1, device=device)
    else:
        key, last = key_positions, key_positions.amax(-1, keepdim=True)
    query = last - query_length + 1 + torch.arange(query_length, device=device)[None, :]
    distance = query[:, :, None] - key[:, None, :]
    keep: Tensor | None = None
    if causal:
        keep = distance >= 0
    if window > 0:
        near = distance.abs() < window
        if sinks > 0:
            if key_positions is not None:  # a ring keeps its sinks in the first slots
                first = (torch.arange(key_length, device=device) < sinks)[None, :]
            elif padding is not None:  # the first real tokens of each row
                first = padding & (padding.long().cumsum(-1) <= sinks)
            else:
                first = key < sinks
            near = near | first[:, None, :]
        keep = near if keep is None else keep & near
    if chunk > 0:
        same = (query // chunk)[:, :, None] == (key // chunk)[:, None, :]
        keep = same if keep is None else keep & same
    if padding is not None:
        keep = padding[:, None, :] if keep is None else keep & padding[:, None, :]
    keep = None if keep is None else keep[:, None]
    if dense is not None:
        keep = dense.bool() if keep is None else keep & dense.bool()
    return keep


def attention(
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
    """Softmax attention in the inputs' own precision; see `op.attention` for the arguments."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    logits = query @ key.transpose(-1, -2) * scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    keep = visible(
        query.shape[2],
        key.shape[2],
        mask,
        key_positions,
        causal,
        window,
        chunk,
        sinks,
        query.device,
    )
    if keep is not None:
        logits = logits.masked_fill(~keep, float("-inf"))
    top = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    if sink_logits is not None:
        top = torch.maximum(top, sink_logits[None, :, None, None])
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    if sink_logits is not None:
        total = total + torch.exp(sink_logits[None, :, None, None] - top)
    output = weights @ value / total.masked_fill(total == 0, 1)  # an empty row gives zeros
    return output.transpose(1, 2)
