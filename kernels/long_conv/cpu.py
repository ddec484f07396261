"""The FFT form, on every device: `torch.fft` is the library for it."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.kernels.autograd import without_autocast
from rewriter.kernels.linear_attention.reference import inert


def long_conv(u: Tensor, kernel: Tensor, before: int = 0, mask: Tensor | None = None) -> Tensor:
    """Same contract as the package's function; differentiable, float32 inside (or float64)."""
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    length = u.shape[1]
    with without_autocast(u):
        (values,) = inert(mask, u.to(wide))
        used = kernel[:, max(0, before - length + 1) : before + length].to(wide)
        first = min(before, length - 1)  # lags below 0 that are left
        size = _fast_size(length + used.shape[1] - 1)
        product = torch.fft.rfft(values, size, dim=1) * torch.fft.rfft(used, size).T
        y = torch.fft.irfft(product, size, dim=1)[:, first : first + length]
        (y,) = inert(mask, y)
        return y.to(u.dtype)


def _fast_size(least: int) -> int:
    """The next length whose only factors are 2, 3 and 5."""
    size = least
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 1
