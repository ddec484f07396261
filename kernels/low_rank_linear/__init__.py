"""Linears as products of two thin factors: plain, packed siblings, and the pivot form."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rewriter.kernels.low_rank_linear import op

__all__ = ["low_rank_linear"]


def low_rank_linear(
    x: Tensor,
    first: Tensor,
    second: Sequence[Tensor],
    bias: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """z = x firstᵀ, cut into z_i of r_i columns; u_i = z_i second_iᵀ; y = cat(u_i) + bias.

    Siblings are linears that read the same x (query, key and value; gate and up): their first
    factors are stacked into one. With `order` it is the pivot form, r(m + n - r) parameters a
    sibling: u_i = cat(z_i, z_i second_iᵀ), y = cat(u_i)[order] + bias.

    Source: SVD-LLM, PIFA; specs/compress.md §2.5, §2.6.

    Args:
        x: [..., n] floating point.
        first: [r_1 + r_2 + ..., n].
        second: one for each sibling: [m_i, r_i]; in the pivot form [m_i - r_i, r_i].
        bias: [m_1 + m_2 + ...] or None.
        order: [m_1 + m_2 + ...] int64, or None: the column of cat(u_i) that each output is; a
            permutation that leaves every sibling's columns among themselves.

    Returns: [..., m_1 + m_2 + ...] in the dtype of x, the siblings one after another.

    Raises:
        ValueError: a shape is not as above.
    """
    return op.low_rank_linear(x, first, list(second), bias, order)
