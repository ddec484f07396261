"""`rewriter::causal_conv1d`: schema, shapes, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.kernels.autograd import (
    register_autocast,
    register_cpu,
    register_recompute,
    register_triton,
)
from rewriter.kernels.causal_conv1d import reference
from rewriter.kernels.mixer import MixerSpec, StateTensor, register_mixer


@torch.library.custom_op(
    "rewriter::causal_conv1d",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? mask, "
    "str activation) -> (Tensor y, Tensor final_state)",
)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Arguments and results are those of `rewriter.kernels.causal_conv1d.causal_conv1d`."""
    _check(x, weight, bias, state, mask, activation)
    y, final_state = reference.causal_conv1d(x, weight, bias, state, mask, activation)
    form = torch.contiguous_format
    return y.contiguous(), final_state.clone(memory_format=form)


@causal_conv1d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    _check(x, weight, bias, state, mask, activation)
    return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[2], weight.shape[1] - 1)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> None:
    if activation not in ("silu", "none"):
        raise ValueError(f"causal_conv1d: activation is {activation!r}, expected 'silu' or 'none'")
    if x.dim() != 3 or weight.dim() != 2:
        raise ValueError(
            f"causal_conv1d: x is {tuple(x.shape)} and weight {tuple(weight.shape)}, "
            "expected [B, T, C] and [C, k]"
        )
    (batch, length, channels), k = x.shape, weight.shape[1]
    for name, tensor, shape in (
        ("weight", weight, (channels, k)),
        ("bias", bias, (channels,)),
        ("state", state, (batch, channels, k - 1)),
        ("mask", mask, (batch, length)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"causal_conv1d: {name} is {tuple(tensor.shape)}, expected {shape}")


register_recompute(causal_conv1d, reference.causal_conv1d)
register_cpu(causal_conv1d)
register_autocast(causal_conv1d, "x", "weight", "bias", "state")
register_triton(causal_conv1d)
register_mixer(causal_conv1d, MixerSpec("shift", (StateTensor("conv", "state", 1),)))
