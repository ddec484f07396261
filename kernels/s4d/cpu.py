"""The convolution form, on every device: `torch.fft`, and powers of A' in two levels.

A power A'^(Q c + i) is A'^(Q c) A'^i, so nothing of size H x N x T is stored, and the kernel, the
final state and what the first state adds are matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rewriter.kernels.autograd import without_autocast
from rewriter.kernels.linear_attention.reference import inert
from rewriter.kernels.long_conv.cpu import long_conv
from rewriter.kernels.s4d.reference import discretise

CHUNK = 64


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
    """Same contract as the package's function; differentiable, float32 inside (or float64)."""
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    with without_autocast(u):
        (values,) = inert(mask, u.to(wide))
        A, B, C = (torch.view_as_complex(t.to(wide).contiguous()) for t in (A, B, C))
        # Phases of many turns: float64 here costs nothing, the tensors are [H, N].
        log_a, b = discretise(A.to(torch.complex128), B.to(torch.complex128), dt.double(), method)
        before = None if state is None else torch.view_as_complex(state.to(wide).contiguous())
        if mask is None:
            y, last = _sequence(values, log_a, b.to(C.dtype), C, before, None)
        else:  # time goes by for real tokens only: bring them together, at the end
            order = torch.argsort(mask.bool().int(), dim=1, stable=True)[..., None]
            real = mask.bool().sum(1)
            y, last = _sequence(
                values.gather(1, order.expand_as(values)), log_a, b.to(C.dtype), C, before, real
            )
            (y,) = inert(mask, y.gather(1, torch.argsort(order, dim=1).expand_as(y)))
        if D is not None:
            y = y + D.to(wide) * values
        return y.to(u.dtype), torch.view_as_real(last)


def _sequence(
    u: Tensor, log_a: Tensor, b: Tensor, C: Tensor, state: Tensor | None, real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """u [B, T, H] with its `real` [B] tokens at the end and zeros before them."""
    length = u.shape[1]
    chunks = -(-length // CHUNK) if length > 1 else 1
    size = CHUNK if length > 1 else 1
    steps = torch.arange(size, device=u.device)
    inner = torch.exp(log_a[..., None] * steps).to(b.dtype)  # [H, N, Q]
    starts = torch.arange(chunks, device=u.device) * size
    outer = torch.exp(log_a * starts[:, None, None]).to(b.dtype)  # [c, H, N]
    if length == 1:
        y = u * 2 * (C * b).sum(-1).real
    else:
        kernel = 2 * torch.einsum("chn,hnq->hcq", outer * (C * b), inner).real
        y = long_conv(u, kernel.flatten(1)[:, :length])
    parts = pad(u, (0, 0, chunks * size - length, 0)).unflatten(1, (chunks, size))
    written = torch.einsum("bcqh,hnq->bchn", parts.to(b.dtype), inner.flip(2))
    last = b * (written * outer.flip(0)).sum(1)
    if state is not None:
        a = torch.exp(log_a)
        reading = (C * state * a.to(b.dtype))[:, None] * outer  # [B, c, H, N]
        remembered = 2 * torch.einsum("bchn,hnq->bcqh", reading, inner).real.flatten(1, 2)
        if real is None:
            y = y + remembered[:, :length]
            last = last + torch.exp(log_a * length).to(b.dtype) * state
        else:
            since = torch.arange(length, device=u.device) - (length - real[:, None])
            remembered = remembered.gather(1, since.clamp(min=0)[..., None].expand_as(y))
            y = y + remembered  # what lands on masked tokens is dropped by the caller
            last = last + torch.exp(log_a * real[:, None, None]).to(b.dtype) * state
    return y, last
