"""What `rewriter::long_conv` means."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.kernels.linear_attention.reference import inert


def long_conv(u: Tensor, kernel: Tensor, before: int = 0, mask: Tensor | None = None) -> Tensor:
    """The product with the Toeplitz matrix, written out: [H, T, T]."""
    (u,) = inert(mask, u)
    t = torch.arange(u.shape[1], device=u.device)
    place = t[:, None] - t + before
    inside = (place >= 0) & (place < kernel.shape[1])
    matrix = torch.where(inside, kernel[:, place.clamp(0, kernel.shape[1] - 1)], 0)
    (y,) = inert(mask, torch.einsum("hts,bsh->bth", matrix, u))
    return y
