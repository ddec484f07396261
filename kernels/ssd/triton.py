"""`ssd` on a GPU: the kernels of linear attention with query C, key B, value x and gain dt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewriter.kernels.autograd import _recompute
from rewriter.kernels.kernel import Compilation
from rewriter.kernels.linear_attention import launch
from rewriter.kernels.linear_attention.reference import inert
from rewriter.kernels.linear_attention.triton import (
    TYPES,
    chunked_compilations,
    recurrent_compilation,
)
from rewriter.kernels.ssd import cpu

__all__ = ["backward", "compilations", "forward"]


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    one_by_one: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as the package's function; differentiable where it is chunked.

    one_by_one: whether to take the recurrent kernel, instead of for one token.
    """
    if x.dtype == torch.float64:
        return cpu.ssd(x, dt, A, B, C, D, state, mask)
    heads, dtype = x.shape[2], x.dtype
    x, dt, B, C = inert(mask, x, dt, B, C)
    B, C, dt = B.to(dtype), C.to(dtype), dt.float()
    log_decay = dt * A.float()
    D = None if D is None else D.float()
    state = None if state is None else state.float()
    if x.shape[1] == 1 if one_by_one is None else one_by_one:
        return launch.recurrent(
            C, B, x, log_decay, None, dt, D, state, heads, 1.0, dtype, value_first=True
        )
    chunk = launch.tiles(dtype, B.shape[3], x.shape[3])["BT"]
    g, gain = launch.chunk_sums(log_decay, heads, chunk), launch.per_state(dt, heads, chunk)
    before = None if state is None else state.mT
    y, final = launch.Chunked.apply(C, B, x, g, gain, D, before, heads, 1.0, False)
    return y, final.mT.contiguous()


def backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """One gradient or None for each argument of the op."""
    args = [x, dt, A, B, C, D, state, mask, False]
    needed = tuple(isinstance(a, Tensor) for a in args)
    return _recompute(forward, args, needed, tuple(grads))[:8]


def compilations() -> list[Compilation]:
    """Default configurations: chunked and one step, for states of 128 x 64."""
    made = []
    for dtype in TYPES:
        made += chunked_compilations(dtype, True)
        made.append(recurrent_compilation(dtype, 1, True))
    return made
