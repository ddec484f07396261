"""What `rewriter::block_sparse_attention` means: dense masked softmax of the expanded plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.block_sparse_attention.arguments import Arguments
from rewriter.kernels.block_sparse_attention.plan import block_maps


def visible(
    length: int,
    keys: int,
    index: Tensor,
    count: Tensor,
    full: Tensor,
    mask: Tensor | None,
    columns: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    group_q: Tensor | None,
    group_k: Tensor | None,
    block_q: int,
    block_k: int,
    causal: bool,
    window: int,
    sinks: int,
) -> Tensor:
    """bool [B or Bm, Hm, L, S]."""

    def elements(blocks: Tensor) -> Tensor:
        rows = blocks.repeat_interleave(block_q, -2)[..., :length, :]
        return rows.repeat_interleave(block_k, -1)[..., :keys]

    listed, whole = (elements(m) for m in block_maps(index, count, full, -(-keys // block_k)))
    place = torch.arange(keys, device=index.device)[None, None]
    pos_q = place[..., keys - length :] if pos_q is None else pos_q
    pos_k = place if pos_k is None else pos_k
    distance = pos_q[..., :, None] - pos_k[..., None, :]
    before = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    element = before
    if window > 0:
        first = (
            place[0] < sinks if mask is None else mask.bool() & (mask.long().cumsum(-1) <= sinks)
        )
        element = element & ((distance.abs() < window) | first[:, None, None, :])
    if group_q is not None and group_k is not None:
        element = element & (group_q[..., :, None] == group_k[..., None, :])
    keep = listed & (whole | element)
    if columns is not None:
        chosen = torch.zeros(*columns.shape[:2], keys + 1, dtype=torch.bool, device=index.device)
        chosen.scatter_(-1, torch.where(columns < 0, keys, columns.long()), True)
        keep = keep | (chosen[..., None, :keys] & ~listed & before)
    return keep if mask is None else keep & mask.bool()[:, None, None, :]


def block_sparse_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """Arguments and results of the op, in the inputs' own precision."""
    given = Arguments(*args)
    query, heads = given.query, given.query.shape[1]
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (given.key, given.value))
    logits = query @ key.transpose(-1, -2) * given.scale
    if given.softcap > 0:
        logits = given.softcap * torch.tanh(logits / given.softcap)
    if given.key_bias is not None:
        bias = given.key_bias
        logits = logits + bias.repeat_interleave(heads // bias.shape[1], 1)[:, :, None]
    keep = visible(
        query.shape[2], key.shape[2], given.index, given.count, given.full, given.mask,
        given.columns, given.pos_q, given.pos_k, given.group_q, given.group_k, given.block_q,
        given.block_k, given.causal, given.window, given.sinks,
    )  # fmt: skip
    logits = logits.masked_fill(~keep.repeat_interleave(heads // keep.shape[1], 1), float("-inf"))
    lse = torch.logsumexp(logits, -1)
    weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0)[..., None])
    return (weights @ value).transpose(1, 2), lse
