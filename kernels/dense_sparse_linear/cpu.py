"""Two matrix products, the second with the coefficients written out; for one token a gather."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

#: Tokens below which gathering k numbers a row beats a product with the zeros written out.
FEW = 4


def coefficients(basis: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """The sparse factor with its zeros: [p, m / p, k]."""
    blocks, atoms, _ = basis.shape
    made = value.new_zeros(value.shape[0], atoms)
    made = made.scatter_add(1, index.long(), value)
    return made.unflatten(0, (blocks, -1))


def dense_sparse_linear(
    x: Tensor, basis: Tensor, index: Tensor, value: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Same contract as the package's function; differentiable."""
    blocks, atoms, columns = basis.shape
    z = linear(x.reshape(-1, columns), basis.flatten(0, 1))  # [tokens, p k]
    if z.shape[0] < FEW:
        y = (z[:, places(index, blocks, atoms)] * value).sum(-1)
    else:
        sparse = coefficients(basis, index, value)
        y = torch.einsum("tpk,pmk->tpm", z.unflatten(1, (blocks, atoms)), sparse).flatten(1)
    y = y.view(*x.shape[:-1], index.shape[0])
    return y if bias is None else y + bias


def places(index: Tensor, blocks: int, atoms: int) -> Tensor:
    """index [m, s] as columns of all blocks' atoms side by side."""
    start = torch.arange(blocks, device=index.device) * atoms
    return index.long() + start.repeat_interleave(index.shape[0] // blocks)[:, None]


def backward(
    grads: tuple[Tensor | None, ...],
    x: Tensor,
    basis: Tensor,
    index: Tensor,
    value: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, None, Tensor, Tensor | None]:
    """One gradient for each argument: dense products, best left to the vendor's library."""
    (dy,) = grads
    assert dy is not None
    blocks, atoms, columns = basis.shape
    rows, dy = x.reshape(-1, columns), dy.reshape(-1, index.shape[0])
    z = linear(rows, basis.flatten(0, 1)).unflatten(1, (blocks, atoms))
    split = dy.unflatten(1, (blocks, -1))
    dz = torch.einsum("tpm,pmk->tpk", split, coefficients(basis, index, value)).flatten(1)
    every = torch.einsum("tpm,tpk->pmk", split, z).flatten(0, 1)  # of the zeros too
    return (
        (dz @ basis.flatten(0, 1)).view(x.shape),
        (dz.T @ rows).view(basis.shape),
        None,
        every.gather(1, index.long()),
        None if bias is None else dy.sum(0),
    )
