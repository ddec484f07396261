"""`rewriter::linear_attention`: schema, shapes, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.kernels.autograd import (
    expect,
    register_autocast,
    register_cpu,
    register_recompute,
    register_triton,
)
from rewriter.kernels.linear_attention import cpu
from rewriter.kernels.linear_attention.reference import state_heads
from rewriter.kernels.mixer import MixerSpec, StateTensor, register_mixer


@torch.library.custom_op(
    "rewriter::linear_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, float scale, "
    "bool normalise, Tensor? state, Tensor? z, Tensor? mask) "
    "-> (Tensor y, Tensor final_state, Tensor final_z)",
)
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    normalise: bool,
    state: Tensor | None,
    z: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results are those of `rewriter.kernels.linear_attention.linear_attention`."""
    args = (q, k, v, log_decay, beta, scale, normalise, state, z, mask)
    _check(*args)
    y, final_state, final_z = cpu.linear_attention(*args)
    return y.contiguous(), final_state.contiguous(), final_z.contiguous()


@linear_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    normalise: bool,
    state: Tensor | None,
    z: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v, log_decay, beta, scale, normalise, state, z, mask)
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    batch, length, _, width = v.shape
    states, size = state_heads(k, v, log_decay, beta), k.shape[3]
    return (
        v.new_empty(batch, length, max(states, q.shape[2]), width),
        v.new_empty(batch, states, size, width, dtype=wide),
        v.new_empty(batch, states, size if normalise else 0, dtype=wide),
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    normalise: bool,
    state: Tensor | None,
    z: Tensor | None,
    mask: Tensor | None,
) -> None:
    name: str
    tensor: Tensor | None
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(
                f"linear_attention: {name} is {tuple(tensor.shape)}, expected [B, T, heads, width]"
            )
    if normalise and beta is not None:
        raise ValueError("linear_attention: the delta rule (beta) has no normalised form")
    (batch, length, _, width), size = v.shape, k.shape[3]
    states = state_heads(k, v, log_decay, beta)
    heads = max(states, q.shape[2])
    key_decay = (size,) if log_decay is not None and log_decay.dim() == 4 else ()
    for name, tensor, tail in (
        ("q", q, (size,)),
        ("k", k, (size,)),
        ("v", v, (width,)),
        ("log_decay", log_decay, key_decay),
        ("beta", beta, ()),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != (batch, length, *tensor.shape[2:3], *tail):
            expected = ", ".join(map(str, (batch, length, "heads", *tail)))
            raise ValueError(
                f"linear_attention: {name} is {tuple(tensor.shape)}, expected [{expected}]"
            )
        total = heads if name == "q" else states
        if total % tensor.shape[2] != 0:
            raise ValueError(
                f"linear_attention: {tensor.shape[2]} heads of {name} do not divide {total}"
            )
    if heads % states != 0:
        raise ValueError(f"linear_attention: {states} states do not divide {heads} query heads")
    expect(
        "linear_attention",
        ("state", state, (batch, states, size, width)),
        ("z", z, (batch, states, size if normalise else 0)),
        ("mask", mask, (batch, length)),
    )


register_recompute(linear_attention, cpu.linear_attention)
register_cpu(linear_attention)
register_autocast(linear_attention, "q", "k", "v")
register_triton(linear_attention)
register_mixer(
    linear_attention,
    MixerSpec(
        "head_scalar", (StateTensor("linear", "state", 1), StateTensor("linear_sum", "z", 2))
    ),
)
