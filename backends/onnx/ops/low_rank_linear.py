"""`rewriter::low_rank_linear`: two products of matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from rewriter.backends.onnx.registry import Context, lowers


@lowers(torch.ops.rewriter.low_rank_linear.default)
def lower(node: Node, context: Context) -> None:
    context.replace(node, two_products)


def two_products(
    x: Tensor, first: Tensor, second: list[Tensor], bias: Tensor | None, order: Tensor | None
) -> Tensor:
    """Arguments as in the op; `first` is one product for all outputs that share an input."""
    thin = (x @ first.t()).split([factor.shape[1] for factor in second], -1)
    parts = []
    for rows, factor in zip(thin, second, strict=True):
        parts += ([] if order is None else [rows]) + [rows @ factor.t()]
    y = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    if order is not None:
        y = y.index_select(-1, order)
    return y if bias is None else y + bias
