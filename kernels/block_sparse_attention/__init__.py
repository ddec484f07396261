"""Attention over the blocks of keys that a plan lists (specs/sparse.md, section 1)."""

from __future__ import annotations

from torch import Tensor

from rewriter.kernels.block_sparse_attention import op
from rewriter.kernels.block_sparse_attention.plan import (
    BlockPlan,
    DecodePlan,
    select_blocks,
    select_pages,
)

__all__ = ["BlockPlan", "DecodePlan", "block_sparse_attention", "select_blocks", "select_pages"]


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan | DecodePlan,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the blocks of `plan`.

    Args:
        query: [B, H, L, D], the last L of the S columns; for a DecodePlan L is 1.
        key, value: [B, Hk, S, D] and [B, Hk, S, Dv].
        plan: see `BlockPlan`.
        mask: [B, S], true at real tokens.
        scale: of the logits; D ** -0.5 if None.
        softcap: 0, or logits become softcap * tanh(logits / softcap).

    Returns:
        output [B, L, H, Dv], zero for a row that sees nothing, and LSE [B, H, L], -inf there.

    Raises:
        ValueError: a shape does not fit the others.
    """
    if isinstance(plan, DecodePlan):
        plan = plan.prefill()
    return op.block_sparse_attention(
        query, key, value, plan.index, plan.count, plan.full, mask, plan.columns, plan.pos_q,
        plan.pos_k, plan.group_q, plan.group_k, plan.key_bias,
        query.shape[-1] ** -0.5 if scale is None else scale,
        plan.block_q, plan.block_k, plan.causal, plan.window, plan.sinks, softcap,
    )  # fmt: skip
