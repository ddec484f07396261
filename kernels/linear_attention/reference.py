"""What `rewriter::linear_attention` means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def inert(mask: Tensor | None, *tensors: Tensor | None) -> list[Any]:
    """Tensors [B, T, ...] with zeros where the mask [B, T] is 0, whatever they hold there."""
    if mask is None:
        return list(tensors)
    gone = ~mask.bool()
    return [
        None if t is None else t.masked_fill(gone.reshape(*gone.shape, *[1] * (t.dim() - 2)), 0)
        for t in tensors
    ]


def state_heads(*tensors: Tensor | None) -> int:
    """Number of states: the largest head count among k, v, log_decay and beta."""
    return max(t.shape[2] for t in tensors if t is not None)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float = 1.0,
    normalise: bool = False,
    state: Tensor | None = None,
    z: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token after another, in the inputs' own precision; see the package."""
    S = state_heads(k, v, log_decay, beta)
    H = max(q.shape[2], S)
    q, k, v, log_decay, beta = inert(mask, q, k, v, log_decay, beta)
    repeated: list[Any] = [
        None if t is None else t.repeat_interleave(S // t.shape[2], 2)
        for t in (k, v, log_decay, beta)
    ]
    k, v, g, b = repeated
    q = q.repeat_interleave(H // q.shape[2], 2)
    if state is None:
        state = v.new_zeros(v.shape[0], S, k.shape[3], v.shape[3])
    if z is None:
        z = v.new_zeros(v.shape[0], S, k.shape[3] if normalise else 0)
    outputs = []
    for t in range(v.shape[1]):
        if g is not None:
            kept = torch.exp(g[:, t].reshape(*g.shape[:1], S, -1))  # [B, S, 1 or K]
            state, z = kept[..., None] * state, (kept * z if normalise else z)
        new = v[:, t]
        if b is not None:
            new = b[:, t, :, None] * (new - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t, :, :, None] * new[:, :, None]
        y = torch.einsum("bhk,bhkv->bhv", q[:, t], state.repeat_interleave(H // S, 1))
        if normalise:
            z = z + k[:, t]
            total = (q[:, t] * z.repeat_interleave(H // S, 1)).sum(-1, keepdim=True)
            y = torch.where(total == 0, 0, y / torch.where(total == 0, 1, total))
        outputs.append(y if normalise else scale * y)
    return torch.stack(outputs, 1), state, z
