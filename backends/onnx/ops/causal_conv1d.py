"""`rewriter::causal_conv1d`: com.microsoft CausalConvWithState, or a grouped Conv."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

import rewriter.kernels.causal_conv1d  # noqa: F401  registers the op
from rewriter.backends.onnx.registry import Context, emit, lowers
from rewriter.graph import argument


@lowers(torch.ops.rewriter.causal_conv1d.default)
def lower(node: Node, context: Context) -> None:
    if context.fused and context.can.causal_conv:
        state = argument(node, "state")
        if context.alone(state, node, 1):
            context.share(state)
        context.replace(node, conv_with_state)
        return
    if context.fused:
        context.fall_back(
            f"causal_conv1d: Conv, onnxruntime {context.can.version} has no CausalConvWithState"
        )
    context.replace(node, conv)


def conv_with_state(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Shapes as in the op."""
    batch, length, channels = x.shape
    tail = weight.shape[1] - 1
    if mask is not None:
        x = torch.where(mask.bool()[..., None], x, 0.0)
    past = x.new_zeros((batch, channels, tail)) if state is None else state.to(x.dtype)
    y, present = emit(
        "CausalConvWithState",
        [x.transpose(1, 2), weight[:, None, :].to(x.dtype), bias, past],
        {"activation": activation, "ndim": 1},
        [(x.dtype, (batch, channels, length)), (x.dtype, (batch, channels, tail))],
    )
    return y.transpose(1, 2), present


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The same in standard operators."""
    batch, length, channels = x.shape
    tail = weight.shape[1] - 1
    if mask is not None:
        x = torch.where(mask.bool()[..., None], x, 0.0)
    past = x.new_zeros((batch, channels, tail)) if state is None else state.to(x.dtype)
    joined = torch.cat([past, x.transpose(1, 2)], 2)
    y = torch.nn.functional.conv1d(joined, weight[:, None, :].to(x.dtype), bias, groups=channels)
    if activation == "silu":
        y = y * torch.sigmoid(y)
    return y.transpose(1, 2), joined[:, :, length:]
