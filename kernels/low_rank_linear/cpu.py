"""Plain matrix products: the fast form on a CPU, and the backward everywhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def low_rank_linear(
    x: Tensor,
    first: Tensor,
    second: list[Tensor],
    bias: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Same contract as `rewriter.kernels.low_rank_linear.low_rank_linear`; differentiable."""
    thin = linear(x, first)
    if order is None and len(second) == 1:
        return linear(thin, second[0], bias)
    parts = []
    for z, factor in zip(thin.split([f.shape[1] for f in second], -1), second, strict=True):
        parts += [linear(z, factor)] if order is None else [z, linear(z, factor)]
    y = torch.cat(parts, -1)
    if order is not None:
        y = y.index_select(-1, order)
    return y if bias is None else y + bias


def backward(
    grads: tuple[Tensor | None, ...],
    x: Tensor,
    first: Tensor,
    second: list[Tensor],
    bias: Tensor | None,
    order: Tensor | None,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None, None]:
    """One gradient for each argument. z is computed again: it is cheaper than to keep it.

    These are large dense products, which the vendor's library does best on a GPU too.
    """
    (dy,) = grads
    assert dy is not None
    d_bias = None if bias is None else dy.flatten(0, -2).sum(0)
    if order is not None:
        dy = torch.zeros_like(dy).index_add(-1, order, dy)
    ranks = [f.shape[1] for f in second]
    widths = [f.shape[0] + (0 if order is None else f.shape[1]) for f in second]
    d_thin, d_second = [], []
    for z, du, factor in zip(
        linear(x, first).split(ranks, -1), dy.split(widths, -1), second, strict=True
    ):
        if order is None:
            dz = du @ factor
        else:
            pivots, du = du.split([factor.shape[1], factor.shape[0]], -1)
            dz = pivots + du @ factor
        d_thin.append(dz)
        d_second.append(du.flatten(0, -2).T @ z.flatten(0, -2))
    d_z = torch.cat(d_thin, -1)
    return d_z @ first, d_z.flatten(0, -2).T @ x.flatten(0, -2), d_second, d_bias, None
