"""What `rewriter::s4d` means."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.kernels.linear_attention.reference import inert


def discretise(A: Tensor, B: Tensor, dt: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Complex A, B [H, N] and dt [H] to (log A', B')."""
    step = dt[:, None] * A
    if method == "zoh":
        return step, torch.expm1(step) / A * B
    return torch.log((1 + step / 2) / (1 - step / 2)), dt[:, None] * B / (1 - step / 2)


def s4d(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    method: str = "zoh",
) -> tuple[Tensor, Tensor]:
    """One token after another, in the inputs' own precision; see the package."""
    (u,) = inert(mask, u)
    A, B, C = (torch.view_as_complex(t) for t in (A, B, C))
    log_a, b = discretise(A, B, dt, method)
    h = b.new_zeros(u.shape[0], *b.shape) if state is None else torch.view_as_complex(state)
    outputs = []
    for t in range(u.shape[1]):
        new = torch.exp(log_a) * h + b * u[:, t, :, None]
        h = new if mask is None else torch.where(mask[:, t, None, None].bool(), new, h)
        outputs.append(2 * (C * h).sum(-1).real)
    y = torch.stack(outputs, 1)
    (y,) = inert(mask, y if D is None else y + D * u)
    return y, torch.view_as_real(h)
