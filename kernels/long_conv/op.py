"""`rewriter::long_conv`: schema, shapes, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.kernels.autograd import register_cpu, register_recompute, register_triton
from rewriter.kernels.long_conv import cpu
from rewriter.kernels.mixer import MixerSpec, register_mixer


@torch.library.custom_op(
    "rewriter::long_conv",
    mutates_args=(),
    schema="(Tensor u, Tensor kernel, int before, Tensor? mask) -> Tensor",
)
def long_conv(u: Tensor, kernel: Tensor, before: int, mask: Tensor | None) -> Tensor:
    """Arguments and result are those of `rewriter.kernels.long_conv.long_conv`."""
    _check(u, kernel, before, mask)
    return cpu.long_conv(u, kernel, before, mask).contiguous()


@long_conv.register_fake
def _(u: Tensor, kernel: Tensor, before: int, mask: Tensor | None) -> Tensor:
    _check(u, kernel, before, mask)
    return u.new_empty(u.shape)


def _check(u: Tensor, kernel: Tensor, before: int, mask: Tensor | None) -> None:
    if u.dim() != 3 or kernel.dim() != 2 or kernel.shape[0] != u.shape[2]:
        raise ValueError(
            f"long_conv: u is {tuple(u.shape)} and kernel {tuple(kernel.shape)}, "
            "expected [B, T, H] and [H, L]"
        )
    if not 0 <= before < kernel.shape[1]:
        raise ValueError(f"long_conv: before is {before}, the kernel has {kernel.shape[1]} lags")
    if mask is not None and mask.shape != u.shape[:2]:
        raise ValueError(f"long_conv: mask is {tuple(mask.shape)}, expected {tuple(u.shape[:2])}")


register_recompute(long_conv, cpu.long_conv)
register_cpu(long_conv)
register_triton(long_conv)
register_mixer(long_conv, MixerSpec("time_invariant"))
