"""What `rewriter::selective_scan` means."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.kernels.linear_attention.reference import inert


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token after another, in the inputs' own precision; see the package."""
    x, dt, B, C = inert(mask, x, dt, B, C)
    h = x.new_zeros(x.shape[0], *A.shape) if state is None else state
    outputs = []
    for t in range(x.shape[1]):
        write = (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        h = torch.exp(dt[:, t, :, None] * A) * h + write
        outputs.append((h @ C[:, t, :, None])[..., 0])
    y = torch.stack(outputs, dim=1)
    return (y if D is None else y + D * x), h
