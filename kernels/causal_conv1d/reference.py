"""What `rewriter::causal_conv1d` means; k shifted products are also its fast form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """Differentiable, float32 inside (or float64); see `rewriter.kernels.causal_conv1d`."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    (batch, length, channels), k = x.shape, weight.shape[1]
    inputs = x if mask is None else x.masked_fill(~mask.bool()[..., None], 0)
    past = x.new_zeros(batch, channels, k - 1) if state is None else state.to(x.dtype)
    inputs = torch.cat([past.transpose(1, 2), inputs], dim=1)  # [B, k-1+T, C]
    y = x.new_zeros(channels, dtype=wide) if bias is None else bias.to(wide)
    for i in range(k):
        y = y + weight[:, i].to(wide) * inputs[:, i : i + length]
    y = silu(y) if activation == "silu" else y
    return y.to(x.dtype), inputs[:, length:].transpose(1, 2)
