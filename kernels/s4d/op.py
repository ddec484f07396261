"""`rewriter::s4d`: schema, shapes, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.kernels.autograd import register_cpu, register_recompute, register_triton
from rewriter.kernels.mixer import MixerSpec, StateTensor, register_mixer
from rewriter.kernels.s4d import cpu


@torch.library.custom_op(
    "rewriter::s4d",
    mutates_args=(),
    schema="(Tensor u, Tensor A, Tensor B, Tensor C, Tensor dt, Tensor? D, Tensor? state, "
    "Tensor? mask, str method) -> (Tensor y, Tensor final_state)",
)
def s4d(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    method: str,
) -> tuple[Tensor, Tensor]:
    """Arguments and results are those of `rewriter.kernels.s4d.s4d`."""
    _check(u, A, B, C, dt, D, state, mask, method)
    y, final_state = cpu.s4d(u, A, B, C, dt, D, state, mask, method)
    return y.contiguous(), final_state.contiguous()


@s4d.register_fake
def _(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    method: str,
) -> tuple[Tensor, Tensor]:
    _check(u, A, B, C, dt, D, state, mask, method)
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    return u.new_empty(u.shape), u.new_empty(u.shape[0], *A.shape, dtype=wide)


def _check(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    method: str,
) -> None:
    if method not in ("zoh", "bilinear"):
        raise ValueError(f"s4d: method is {method!r}, expected 'zoh' or 'bilinear'")
    if u.dim() != 3 or A.dim() != 3:
        raise ValueError(
            f"s4d: u is {tuple(u.shape)} and A {tuple(A.shape)}, expected [B, T, H] and [H, N, 2]"
        )
    (batch, length, channels), size = u.shape, A.shape[1]
    for name, tensor, shape in (
        ("A", A, (channels, size, 2)),
        ("B", B, (channels, size, 2)),
        ("C", C, (channels, size, 2)),
        ("dt", dt, (channels,)),
        ("D", D, (channels,)),
        ("state", state, (batch, channels, size, 2)),
        ("mask", mask, (batch, length)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"s4d: {name} is {tuple(tensor.shape)}, expected {shape}")


register_recompute(s4d, cpu.s4d)
register_cpu(s4d)
register_triton(s4d)
register_mixer(s4d, MixerSpec("time_invariant", (StateTensor("ssm", "state", 1),)))
