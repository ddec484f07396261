"""The fast torch form: gated linear attention with query C, key B, value x and gain dt."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.kernels.autograd import without_autocast
from rewriter.kernels.linear_attention.cpu import CHUNK, chunked
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
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Same contract as `rewriter.kernels.ssd.ssd`; differentiable, float32 inside (or float64)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    with without_autocast(x):
        values, dt, B, C = (t.to(wide) for t in inert(mask, x, dt, B, C))
        A = A.to(wide)
        if state is None:
            state = values.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
        state = state.to(wide)
        if x.shape[1] == 1:
            y, state = _step(values, dt, A, B, C, state)
        else:
            y, last, _ = chunked(C, B, values, dt * A, None, state.mT, None, gain=dt, chunk=chunk)
            state = last.mT
        if D is not None:
            y.addcmul_(D.to(wide)[:, None], values)
        return y.to(x.dtype), state


def _step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token; the heads of a group are rows of one product, which reads the state once."""
    x, dt = x[:, 0], dt[:, 0, :, None]
    batch, heads, width, size = state.shape
    groups = B.shape[2]
    written = (x * dt).reshape(batch, groups, -1, width, 1)
    state = state * torch.exp(dt * A[:, None])[..., None]
    grouped = state.reshape(batch, groups, -1, width, size)
    grouped = grouped.addcmul_(written, B.reshape(batch, groups, 1, 1, size))
    rows = grouped.view(batch * groups, -1, size)
    y = torch.bmm(C.reshape(-1, 1, size), rows.mT)
    return y.view(batch, 1, heads, width), grouped.view(batch, heads, width, size)
