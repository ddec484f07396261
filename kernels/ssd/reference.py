"""What `rewriter::ssd` means."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.kernels.linear_attention.reference import inert


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token after another, in the inputs' own precision; see `rewriter.kernels.ssd.ssd`."""
    batch, length, heads, width = x.shape
    x, dt, B, C = inert(mask, x, dt, B, C)
    B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    S = x.new_zeros(batch, heads, width, B.shape[-1]) if state is None else state
    outputs = []
    for t in range(length):
        decay, write = torch.exp(dt[:, t] * A), dt[:, t, :, None] * x[:, t]
        S = decay[..., None, None] * S + write[..., :, None] * B[:, t, :, None, :]
        outputs.append((S @ C[:, t, :, :, None]).squeeze(-1))
    y = torch.stack(outputs, dim=1)
    return (y if D is None else y + D[:, None] * x), S
