"""What `rewriter::low_rank_linear` means."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_linear(
    x: Tensor,
    first: Tensor,
    second: list[Tensor],
    bias: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Every weight multiplied back to a dense one: see `rewriter.kernels.low_rank_linear`."""
    rows = []
    for thin, factor in zip(first.split([f.shape[1] for f in second]), second, strict=True):
        rows += [factor @ thin] if order is None else [thin, factor @ thin]
    weight = torch.cat(rows)
    if order is not None:
        weight = weight[order]
    y = x @ weight.T
    return y if bias is None else y + bias
