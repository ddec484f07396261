"""The fast torch form: decays and writes of a chunk at once, one fused product-sum a token.

There is no matrix form, because the decay differs for every channel and state. Every factor is
at most 1: nothing is divided by a decay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.kernels.autograd import without_autocast
from rewriter.kernels.linear_attention.reference import inert

CHUNK = 16


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
    """Same contract as the package's function; differentiable, float32 inside (or float64)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    with without_autocast(x):
        values, dt, B, C = (t.to(wide) for t in inert(mask, x, dt, B, C))
        A = A.to(wide)
        h = values.new_zeros(x.shape[0], *A.shape) if state is None else state.to(wide)
        outputs = []
        parts = (t.split(CHUNK, 1) for t in (values, dt, B, C))
        for x_c, dt_c, B_c, C_c in zip(*parts, strict=True):
            kept = torch.exp(dt_c[..., None] * A)  # [B, Q, C, N]
            written = (dt_c * x_c)[..., None] * B_c[:, :, None]
            seen = []
            for a, b in zip(kept.unbind(1), written.unbind(1), strict=True):
                h = torch.addcmul(b, a, h)
                seen.append(h)
            outputs.append((torch.stack(seen, 1) @ C_c[..., None])[..., 0])
        y = torch.cat(outputs, 1)
        if D is not None:
            y = torch.addcmul(y, D.to(wide), values)
        return y.to(x.dtype), h
