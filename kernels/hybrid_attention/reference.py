"""What `rewriter::hybrid_attention` means."""

from __future__ import annotations

import torch
from torch import Tensor


def hybrid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    gate: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    window: int,
    block_aligned: bool = True,
    sinks: int = 4,
    reference: str = "none",
    far_cap: float = 0.0,
) -> Tensor:
    """The quadratic form of a whole sequence, in the inputs' own precision.

    See `rewriter.kernels.hybrid_attention.hybrid_attention` for the arguments.

    Returns:
        y: [B, L, H, Dv].
    """
    batch, heads, length, _ = query.shape
    key, value, key_features = (
        t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value, key_features)
    )
    rows = []
    for b in range(batch):
        real = torch.ones(length, dtype=torch.bool) if mask is None else mask[b].bool()
        real = real.to(query.device)
        if not bool(real.any()):
            rows.append(value.new_zeros(length, heads, value.shape[-1]))
            continue
        q, k, v, fq, fk = (t[b][:, real] for t in (query, key, value, query_features, key_features))
        rank = torch.arange(q.shape[1], device=q.device)
        start = (rank // window - 1) * window if block_aligned else rank - window + 1
        i, j = rank[:, None], rank[None, :]
        near = (j <= i) & (j >= start[:, None])
        sink = (j < sinks) & (j < start[:, None])
        far = (j < start[:, None]) & ~sink
        logits = q @ k.mT * scale
        inside = logits.masked_fill(~near, -torch.inf)
        level = torch.zeros_like(gate[b][:, real])
        if reference == "max":
            level = inside.amax(-1)
        elif reference == "mean":
            level = inside.logsumexp(-1) - near.sum(-1).to(q.dtype).log()
        far_log = (gate[b][:, real] + level)[..., None]
        if far_cap:
            far_log = (
                far_log
                + (far_cap / far.sum(-1).clamp_min(1).to(q.dtype)).clamp_max(1).log()[:, None]
            )
        exact = logits.masked_fill(~(near | sink), -torch.inf)
        top = torch.maximum(exact.amax(-1, keepdim=True), far_log).detach()
        weights = (exact - top).exp() + (far_log - top).exp() * (fq @ fk.mT) * far
        y = (weights / weights.sum(-1, keepdim=True)) @ v
        out = y.new_zeros(heads, length, v.shape[-1])
        rows.append(out.index_copy(1, real.nonzero()[:, 0], y).transpose(0, 1))
    return torch.stack(rows)
