"""Linears as a dense basis and a few coefficients a row: DSFormer's format."""

from __future__ import annotations

from torch import Tensor

from rewriter.kernels.dense_sparse_linear import op

__all__ = ["dense_sparse_linear"]


def dense_sparse_linear(
    x: Tensor, basis: Tensor, index: Tensor, value: Tensor, bias: Tensor | None = None
) -> Tensor:
    """z_b = basis_b x;  y_i = sum_t value_it z_b[index_it] + bias_i, for row i of block b.

    The m outputs are p blocks of m / p consecutive rows; every block has a basis of k atoms and
    every row s coefficients. With s = k it is a low-rank linear; with s = 1 the rows are vector
    quantised. 2 (p k n + m s) operations a token.

    Source: DSFormer, arXiv 2312.13211; specs/compress.md §3.2 says what of it is ours.

    Args:
        x: [..., n] floating point.
        basis: [p, k, n]; p divides m.
        index: [m, s] integer, entries in 0 .. k - 1 of the row's own block; one that occurs
            twice counts twice.
        value: [m, s].
        bias: [m] or None.

    Returns: [..., m] in the dtype of x.

    Raises:
        ValueError: a shape is not as above.
    """
    return op.dense_sparse_linear(x, basis, index, value, bias)
