"""Softmax attention over a union of keys from its parts (specs/sparse.md, K4)."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Results over disjoint sets of keys to the result over their union; differentiable.

    outputs: [B, L, H, Dv] each; lses: [B, H, L] each, -inf where a row saw nothing.
    """
    stacked = torch.stack(lses)
    lse = torch.logsumexp(stacked, 0)
    weights = torch.exp(stacked - lse.masked_fill(lse == float("-inf"), 0)).transpose(-1, -2)
    total = sum(w[..., None] * o.to(w.dtype) for w, o in zip(weights, outputs, strict=True))
    assert isinstance(total, Tensor)
    return total.to(outputs[0].dtype), lse


def with_sink(output: Tensor, lse: Tensor, sink_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Let one learned logit a head, [H], take part in the normaliser."""
    whole = torch.logaddexp(lse, sink_logits.to(lse.dtype)[:, None].expand_as(lse))
    share = torch.exp(lse - whole).transpose(1, 2)[..., None]
    return (output * share).to(output.dtype), whole
