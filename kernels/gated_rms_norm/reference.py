"""What `rewriter::gated_rms_norm` means; a few passes over the channels are also its CPU form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def gated_rms_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    group_size: int,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
) -> Tensor:
    """Differentiable, float32 inside (or float64); see the package."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    u = x.to(wide)
    factor = None if gate is None else silu(gate.to(wide))
    if factor is not None and not norm_before_gate:
        u = u * factor
    groups = u.unflatten(-1, (-1, group_size))
    mean = groups.square().mean(-1, keepdim=True)
    y = (groups * torch.rsqrt(mean + eps)).flatten(-2) * weight.to(wide)
    if factor is not None and norm_before_gate:
        y = y * factor
    return y.to(x.dtype)
