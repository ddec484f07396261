"""What `rewriter::dense_sparse_linear` means."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_sparse_linear(
    x: Tensor, basis: Tensor, index: Tensor, value: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Row by row a dense weight: see `rewriter.kernels.dense_sparse_linear`."""
    rows = index.shape[0] // basis.shape[0]
    weight = torch.stack(
        [value[i] @ basis[i // rows][index[i].long()] for i in range(index.shape[0])]
    )
    y = x @ weight.T
    return y if bias is None else y + bias
