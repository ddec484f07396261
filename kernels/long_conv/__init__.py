"""Convolution with a kernel as long as the sequence, by FFT."""

from __future__ import annotations

from torch import Tensor

from rewriter.kernels.long_conv import op

__all__ = ["long_conv"]


def long_conv(u: Tensor, kernel: Tensor, before: int = 0, mask: Tensor | None = None) -> Tensor:
    """y_t = sum_s kernel[:, t - s + before] u_s, channel by channel; terms outside are 0.

    Causal with before = 0 (an S4 kernel [H, T]). With before = T - 1 and a kernel [H, 2T - 1] it
    is the product with a Toeplitz matrix: a table over the relative position t - s.
    A general kernel has no finite state; for one that comes from a state space see
    `rewriter.kernels.s4d`.

    Source: Gu et al. (S4), arXiv 2111.00396; Luo et al. (kernelised attention with relative
    positions by FFT), arXiv 2106.12566.

    Args:
        u: [B, T, H] floating point.
        kernel: [H, L], real.
        before: number of lags below 0 at the beginning of the kernel; 0 <= before < L.
        mask: [B, T] bool or int. Where it is 0 the input counts as 0 and y is 0.

    Returns:
        [B, T, H] in the dtype of u; computed in float32 (float64 when u is float64).

    Raises:
        ValueError: a shape is not as above.
    """
    return op.long_conv(u, kernel, before, mask)
