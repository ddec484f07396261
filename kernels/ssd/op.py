"""`rewriter::ssd`: schema, shapes, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.kernels.autograd import (
    expect,
    register_cpu,
    register_recompute,
    register_triton,
)
from rewriter.kernels.mixer import MixerSpec, StateTensor, register_mixer
from rewriter.kernels.ssd import cpu


@torch.library.custom_op(
    "rewriter::ssd",
    mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? state, "
    "Tensor? mask) -> (Tensor y, Tensor final_state)",
)
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results are those of `rewriter.kernels.ssd.ssd`."""
    _check(x, dt, A, B, C, D, state, mask)
    y, final_state = cpu.ssd(x, dt, A, B, C, D, state, mask)
    return y.contiguous(), final_state.contiguous()


@ssd.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _check(x, dt, A, B, C, D, state, mask)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    return x.new_empty(x.shape), x.new_empty(shape, dtype=wide)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
) -> None:
    if x.dim() != 4 or B.dim() != 4:
        raise ValueError(f"ssd: x {tuple(x.shape)} and B {tuple(B.shape)} must have 4 dimensions")
    batch, length, heads, width = x.shape
    groups, size = B.shape[2], B.shape[3]
    if heads % groups != 0:
        raise ValueError(f"ssd: {groups} groups do not divide {heads} heads")
    expect(
        "ssd",
        ("dt", dt, (batch, length, heads)),
        ("A", A, (heads,)),
        ("B", B, (batch, length, groups, size)),
        ("C", C, (batch, length, groups, size)),
        ("D", D, (heads,)),
        ("state", state, (batch, heads, width, size)),
        ("mask", mask, (batch, length)),
    )


register_recompute(ssd, cpu.ssd)
register_cpu(ssd)
register_triton(ssd)
register_mixer(ssd, MixerSpec("head_scalar", (StateTensor("ssm", "state", 1),)))
