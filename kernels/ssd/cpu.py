"""The chunked form: matrix products inside a chunk, a short scan between chunks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 64


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
    with torch.autocast(x.device.type, enabled=False):
        values, dt, A, B, C = (t.to(wide) for t in (x, dt, A, B, C))
        if mask is not None:
            dt = dt.masked_fill(~mask.bool()[..., None], 0)
        if state is None:
            state = values.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
        state = state.to(wide)
        if x.shape[1] == 1:
            y, state = _step(values, dt, A, B, C, state)
        else:
            y, state = _chunked(values, dt, A, B, C, state, chunk)
        if D is not None:
            y = y + D.to(wide)[:, None] * values
        return y.to(x.dtype), state


def _step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    x, dt = x[:, 0], dt[:, 0]
    B, C = (t[:, 0].repeat_interleave(x.shape[1] // t.shape[2], dim=1) for t in (B, C))
    write = (dt[..., None] * x)[..., :, None] * B[..., None, :]
    state = torch.exp(dt * A)[..., None, None] * state + write
    return (state @ C[..., None]).squeeze(-1)[:, None], state


def _segment_sums(a: Tensor) -> Tensor:
    """[..., Q] to [..., Q, Q]: entry (i, j) is a_{j+1} + ... + a_i, and -inf where j > i.

    Summed directly: a difference of prefix sums cancels when the decay is strong.
    """
    size = a.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=a.device)
    terms = a[..., :, None].expand(*a.shape, size).masked_fill(~ones.tril(-1), 0)
    return terms.cumsum(-2).masked_fill(~ones.tril(), float("-inf"))


def _chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    batch, length, heads, width = x.shape
    groups = B.shape[2]
    chunks = int(max(1, (length + chunk - 1) // chunk))  # a plain number under tracing: it unrolls
    tail = chunks * chunk - length  # dt = 0 there: decay 1, nothing written
    a, write = pad(dt * A, (0, 0, 0, tail)), pad(dt[..., None] * x, (0, 0, 0, 0, 0, tail))
    B, C = (pad(t, (0, 0, 0, 0, 0, tail)).unflatten(1, (chunks, chunk)) for t in (B, C))
    write = write.unflatten(1, (chunks, chunk)).unflatten(3, (groups, -1))  # [B, c, Q, G, R, P]
    a = a.unflatten(1, (chunks, chunk)).unflatten(3, (groups, -1)).movedim(2, -1)  # [B, c, G, R, Q]

    decay = torch.exp(_segment_sums(a))  # [B, c, G, R, Q, Q]
    scores = torch.einsum("bcign,bcjgn->bcgij", C, B)[:, :, :, None] * decay
    inside = torch.einsum("bcgrij,bcjgrp->bcigrp", scores, write)

    kept = decay[..., -1, :].movedim(-1, 2)[..., None] * write  # what reaches the chunk's end
    written = torch.einsum("bcjgrp,bcjgn->bcgrpn", kept, B).flatten(2, 3)
    sums = a.cumsum(-1)
    through = torch.exp(sums[..., -1]).flatten(2)[..., None, None]
    entering = []
    for c in range(chunks):
        entering.append(state)
        state = through[:, c] * state + written[:, c]
    before = torch.stack(entering, dim=1).unflatten(2, (groups, -1))
    across = torch.einsum("bcign,bcgrpn->bcigrp", C, before)
    across = across * torch.exp(sums).movedim(-1, 2)[..., None]
    y = (inside + across).reshape(batch, chunks * chunk, heads, width)
    return y[:, :length], state
