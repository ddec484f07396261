"""The selective scan of Mamba-1: a decay for every channel and state."""

from __future__ import annotations

from torch import Tensor

from rewriter.kernels.selective_scan import op

__all__ = ["selective_scan"]


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
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t;  y_t = h_t C_t + D x_t, channel by channel.

    Source: Gu and Dao, "Mamba", arXiv 2312.00752, algorithm 2 (zero-order hold for A, Euler for
    B). With A equal over the states, and over the channels of a head, it is `ssd`.

    Args:
        x: [B, T, C] floating point.
        dt: [B, T, C], the positive step, after bias and softplus.
        A: [C, N], negative.
        B: [B, T, N], written into the state.
        C: [B, T, N], read from the state.
        D: [C], a skip from x to y, or None.
        state: [B, C, N] before the first token; None means zeros.
        mask: [B, T] bool or int. Where it is 0 the state passes unchanged, y is 0, and whatever
            the token holds (NaN too) touches nothing.

    Returns:
        y: [B, T, C] in the dtype of x.
        final_state: [B, C, N], float32 (float64 when x is float64).

    Raises:
        ValueError: a shape is not as above.
    """
    return op.selective_scan(x, dt, A, B, C, D, state, mask)
