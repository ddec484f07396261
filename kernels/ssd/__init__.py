"""State-space duality: the scalar-decay linear recurrence of Mamba-2."""

from __future__ import annotations

from torch import Tensor

from rewriter.kernels.ssd import op

__all__ = ["ssd"]


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;  y_t = S_t C_t + D x_t.

    Source: Dao and Gu, "Transformers are SSMs" (Mamba-2), arXiv 2405.21060, section 6.

    Args:
        x: [B, T, H, P] floating point.
        dt: [B, T, H], the positive step, after bias and softplus.
        A: [H], negative; the decay of a step is exp(dt A).
        B: [B, T, G, N], written into the state. G divides H; head h reads group h // (H // G).
        C: [B, T, G, N], read from the state.
        D: [H], a skip from x to y, or None.
        state: [B, H, P, N], the state before the first token; None means zeros.
        mask: [B, T] bool or int. Where it is 0 the state passes unchanged, y is 0, and whatever
            the token holds (NaN too) touches nothing.

    Returns:
        y: [B, T, H, P] in the dtype of x.
        final_state: [B, H, P, N], float32 (float64 when x is float64).

    Raises:
        ValueError: a shape is not as above.
    """
    return op.ssd(x, dt, A, B, C, D, state, mask)
