"""`rewriter::dense_sparse_linear`: two products of matrices.

The file holds the non-zero values and their places; ONNX Runtime puts them into a matrix once,
when it loads the file, because its sparse products are slower below nine zeros in ten.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

import rewriter.kernels.dense_sparse_linear  # noqa: F401  registers the op
from rewriter.backends.onnx.registry import Context, lowers


@lowers(torch.ops.rewriter.dense_sparse_linear.default)
def lower(node: Node, context: Context) -> None:
    context.replace(node, two_products)


def two_products(
    x: Tensor, basis: Tensor, index: Tensor, value: Tensor, bias: Tensor | None
) -> Tensor:
    """Arguments as in the op."""
    blocks, rank, inputs = basis.shape
    outputs = index.shape[0]
    factor = value.new_zeros((outputs, rank)).scatter_add(1, index.long(), value)
    thin = x @ basis.reshape(blocks * rank, inputs).t()
    if blocks == 1:
        y = thin @ factor.t()
    else:
        rows = thin.reshape(-1, blocks, rank).transpose(0, 1)  # [blocks, M, rank]
        made = rows @ factor.reshape(blocks, -1, rank).transpose(1, 2)
        y = made.transpose(0, 1).reshape(*x.shape[:-1], outputs)
    return y if bias is None else y + bias
