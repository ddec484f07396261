"""The short depthwise causal convolution in front of a recurrent mixer."""

from __future__ import annotations

from torch import Tensor

from rewriter.kernels.causal_conv1d import op

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """y_t = activation(bias + sum_i weight[:, i] x_{t-k+1+i}), channel by channel.

    Source: the convolution of Mamba, Gu and Dao, arXiv 2312.00752, section 3.4.

    Args:
        x: [B, T, C] floating point.
        weight: [C, k]; weight[:, k-1] multiplies the current token.
        bias: [C] or None.
        state: [B, C, k-1], the last k-1 inputs before x, oldest first; None means zeros.
        mask: [B, T] bool or int. Inputs are zero where it is 0, so left padding changes nothing.
        activation: "silu" or "none".

    Returns:
        y: [B, T, C] in the dtype of x; computed in float32 (float64 when x is float64).
        final_state: [B, C, k-1] in the dtype of x, the `state` for the tokens that follow.

    Raises:
        ValueError: a shape is not as above, or the activation is unknown.
    """
    return op.causal_conv1d(x, weight, bias, state, mask, activation)
