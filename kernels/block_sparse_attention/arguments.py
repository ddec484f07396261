"""The arguments of `rewriter::block_sparse_attention`, for all forms of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Arguments:
    """In the order of the op.

    query: [B, H, L, D], the last L of the S columns.
    key, value: [B, Hk, S, D] and [B, Hk, S, Dv]; query head h reads head h // (H // Hk).
    index, count, full, columns, pos_q, pos_k, group_q, group_k, key_bias, block_q, block_k,
        causal, window, sinks: the fields of a `BlockPlan`, which says what they mean.
    mask: [B, S], true at real tokens.
    scale: multiplies the logits.
    softcap: 0, or logits become softcap * tanh(logits / softcap).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    index: Tensor
    count: Tensor
    full: Tensor
    mask: Tensor | None
    columns: Tensor | None
    pos_q: Tensor | None
    pos_k: Tensor | None
    group_q: Tensor | None
    group_k: Tensor | None
    key_bias: Tensor | None
    scale: float
    block_q: int
    block_k: int
    causal: bool
    window: int
    sinks: int
    softcap: float
