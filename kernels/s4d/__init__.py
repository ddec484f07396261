"""S4D: a time-invariant diagonal state space for every channel."""

from __future__ import annotations

from torch import Tensor

from rewriter.kernels.s4d import op

__all__ = ["s4d"]


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
    """h_t = A' h_{t-1} + B' u_t;  y_t = 2 Re(sum_n C_n h_tn) + D u_t, channel by channel.

    A', B' discretise A, B with the step dt: "zoh" A' = exp(dt A), B' = (A' - 1) / A B; "bilinear"
    A' = (1 + dt A / 2) / (1 - dt A / 2), B' = dt B / (1 - dt A / 2). Many tokens are one FFT
    convolution with the kernel 2 Re(sum_n C_n B'_n A'_n^t), one token is one step.

    Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space
    Models", arXiv 2206.11893. Complex numbers are pairs (real, imaginary) in the last dimension;
    each n stands for a conjugate pair, hence the 2.

    Args:
        u: [B, T, H] floating point.
        A, B, C: [H, N, 2], real part of A negative.
        dt: [H], positive.
        D: [H], a skip from u to y, or None.
        state: [B, H, N, 2] before the first token; None means zeros.
        mask: [B, T] bool or int. Where it is 0 the state passes unchanged (no time goes by), y is
            0, and whatever the token holds (NaN too) touches nothing.
        method: "zoh" or "bilinear".

    Returns:
        y: [B, T, H] in the dtype of u.
        final_state: [B, H, N, 2], float32 (float64 when u is float64).

    Raises:
        ValueError: a shape is not as above, or the method is unknown.
    """
    return op.s4d(u, A, B, C, dt, D, state, mask, method)
