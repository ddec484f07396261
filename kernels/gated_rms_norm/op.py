"""`rewriter::gated_rms_norm`: schema, shapes, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.kernels.autograd import register_cpu, register_recompute, register_triton
from rewriter.kernels.gated_rms_norm import reference


@torch.library.custom_op(
    "rewriter::gated_rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? gate, Tensor weight, int group_size, float eps, "
    "bool norm_before_gate) -> Tensor",
)
def gated_rms_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    group_size: int,
    eps: float,
    norm_before_gate: bool,
) -> Tensor:
    """Arguments and result are those of `rewriter.kernels.gated_rms_norm.gated_rms_norm`."""
    _check(x, gate, weight, group_size)
    return reference.gated_rms_norm(x, gate, weight, group_size, eps, norm_before_gate).contiguous()


@gated_rms_norm.register_fake
def _(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    group_size: int,
    eps: float,
    norm_before_gate: bool,
) -> Tensor:
    _check(x, gate, weight, group_size)
    return x.new_empty(x.shape)


def _check(x: Tensor, gate: Tensor | None, weight: Tensor, group_size: int) -> None:
    channels = x.shape[-1]
    if tuple(weight.shape) != (channels,):
        raise ValueError(f"gated_rms_norm: weight is {tuple(weight.shape)}, expected ({channels},)")
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"gated_rms_norm: gate is {tuple(gate.shape)}, x {tuple(x.shape)}")
    if group_size < 1 or channels % group_size != 0:
        raise ValueError(f"gated_rms_norm: groups of {group_size} do not divide {channels}")


register_recompute(gated_rms_norm, reference.gated_rms_norm)
register_cpu(gated_rms_norm)
register_triton(gated_rms_norm)
