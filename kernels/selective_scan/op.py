"""`rewriter::selective_scan`: schema, shapes, autograd."""

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
from rewriter.kernels.selective_scan import cpu


@torch.library.custom_op(
    "rewriter::selective_scan",
    mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? state, "
    "Tensor? mask) -> (Tensor y, Tensor final_state)",
)
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results are those of `rewriter.kernels.selective_scan.selective_scan`."""
    _check(x, dt, A, B, C, D, state, mask)
    y, final_state = cpu.selective_scan(x, dt, A, B, C, D, state, mask)
    return y.contiguous(), final_state.contiguous()


@selective_scan.register_fake
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
    return x.new_empty(x.shape), x.new_empty(x.shape[0], *A.shape, dtype=wide)


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
    if x.dim() != 3 or A.dim() != 2:
        raise ValueError(
            f"selective_scan: x is {tuple(x.shape)} and A {tuple(A.shape)}, "
            "expected [B, T, C] and [C, N]"
        )
    (batch, length, channels), size = x.shape, A.shape[1]
    expect(
        "selective_scan",
        ("dt", dt, (batch, length, channels)),
        ("A", A, (channels, size)),
        ("B", B, (batch, length, size)),
        ("C", C, (batch, length, size)),
        ("D", D, (channels,)),
        ("state", state, (batch, channels, size)),
        ("mask", mask, (batch, length)),
    )


register_recompute(selective_scan, cpu.selective_scan)
register_cpu(selective_scan)
register_triton(selective_scan)
register_mixer(selective_scan, MixerSpec("full_diagonal", (StateTensor("ssm", "state", 1),)))
