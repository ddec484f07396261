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
    first = None
    if window > 0 and sinks > 0:
        if key_positions is not None:  # a ring keeps its sinks in the first slots
            first = (torch.arange(key_length, device=device) < sinks)[None, :]
        elif padding is not None:  # the first real tokens of each row
            first = padding & (padding.long().cumsum(-1) <= sinks)
        else:
            first = key < sinks
    origin: Tensor | int = 0
    if chunk > 0 and padding is not None and key_positions is None:
        origin = (padding.long().cumsum(-1) == 0).sum(-1, keepdim=True)
    keep = elements(query, key, padding, first, origin, causal, window, chunk)
    keep = None if keep is None else keep[:, None]
    if dense is not None:
        keep = dense.bool() if keep is None else keep & dense.bool()
    return keep


def elements(
    query: Tensor,
    key: Tensor,
    padding: Tensor | None,
    first: Tensor | None,
    origin: Tensor | int,
    causal: bool,
    window: int,
    chunk: int,
) -> Tensor | None:
    """bool, broadcastable to [B, L, S], of positions query [B or 1, L] and key [B or 1, S].

    padding, first: [B or 1, S], the real keys and the sinks. origin: where chunks begin to
    count, [B, 1] or one number.
    """
    distance = query[:, :, None] - key[:, None, :]
    keep: Tensor | None = None
    if causal:
        keep = distance >= 0
    if window > 0:
        near = distance.abs() < window
        near = near if first is None else near | first[:, None, :]
        keep = near if keep is None else keep & near
    if chunk > 0:
        same = ((query - origin) // chunk)[:, :, None] == ((key - origin) // chunk)[:, None, :]
        keep = same if keep is None else keep & same
    if padding is not None:
        keep = padding[:, None, :] if keep is None else keep & padding[:, None, :]
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
    return attention_with_lse(
        query, key, value, mask, bias, sink_logits, key_positions, scale, causal, window, chunk,
        sinks, softcap,
    )[0]  # fmt: skip


def attention_with_lse(
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
) -> tuple[Tensor, Tensor]:
    """The same and the log of the normaliser, [B, H, L]."""
    length, keys = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    logits = query @ key.transpose(-1, -2) * scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    keep = visible(
        length, keys, mask, key_positions, causal, window, chunk, sinks, query.device
    )  # fmt: skip
    if keep is not None:
        logits = logits.masked_fill(~keep, float("-inf"))
    every = logits
    if sink_logits is not None:
        sink = sink_logits[None, :, None, None].expand(*logits.shape[:3], 1)
        every = torch.cat([logits, sink.to(logits.dtype)], -1)
    lse = torch.logsumexp(every, -1)
    # An empty row gives zeros.
    weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0)[..., None])
    return (weights @ value).transpose(1, 2), lse
