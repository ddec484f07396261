"""`rewriter::block_sparse_attention` in standard operators: MatMul and Softmax under its mask.

ONNX Runtime has no kernel that is faster for listed blocks (com.microsoft SparseAttention took
twice the time of dense attention at every length): it costs what dense attention costs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

import rewriter.kernels.block_sparse_attention  # noqa: F401  registers the op
from rewriter.backends.onnx.ops.attention import HIDDEN
from rewriter.backends.onnx.registry import Context, lowers
from rewriter.kernels.block_sparse_attention.reference import visible


@lowers(torch.ops.rewriter.block_sparse_attention.default)
def lower(node: Node, context: Context) -> None:
    context.fall_back("block_sparse_attention: MatMul and Softmax, at the cost of dense attention")
    context.replace(node, masked)


def masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    full: Tensor,
    mask: Tensor | None,
    columns: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    group_q: Tensor | None,
    group_k: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in the op."""
    softcap = options[-1]
    batch, heads, length, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    each = heads // groups
    folded = query.reshape(batch, groups, each * length, width)
    logits = ((folded @ key.transpose(-1, -2)) * scale).reshape(batch, heads, length, keys)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    if key_bias is not None:
        logits = logits + key_bias.repeat_interleave(heads // key_bias.shape[1], 1)[:, :, None]
    keep = visible(
        length, keys, index, count, full, mask, columns, pos_q, pos_k, group_q, group_k,
        *options[:-1],
    )  # fmt: skip
    keep = keep.repeat_interleave(heads // keep.shape[1], 1)
    logits = torch.where(keep, logits, HIDDEN)
    some = keep.any(-1, keepdim=True)
    weights = torch.where(some, torch.softmax(logits, -1), 0.0)
    weights = weights.reshape(batch, groups, each * length, keys)
    output = (weights @ value).reshape(batch, heads, length, value.shape[3]).transpose(1, 2)
    lse = torch.where(some[..., 0], torch.logsumexp(logits, -1), float("-inf"))
    return output, lse
