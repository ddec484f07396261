"""Attention through torch's own fused kernel where it can say what we mean."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rewriter.kernels.attention import reference


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sink_logits: Tensor | None,
    key_positions: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    sinks: int,
    softcap: float,
) -> Tensor:
    """Same contract as the reference; fp32 softmax for low precision."""
    if softcap > 0 or sink_logits is not None:
        wide = query.dtype if query.dtype == torch.float64 else torch.float32
        sharp = [None if t is None else t.to(wide) for t in (query, key, value, bias, sink_logits)]
        q, k, v, b, s = sharp
        assert q is not None and k is not None and v is not None
        return reference.attention(
            q, k, v, mask, b, s, key_positions, scale, causal, window, chunk, sinks, softcap
        ).to(query.dtype)
    length, keys = query.shape[2], key.shape[2]
    if mask is not None and mask.dim() == 2 and bool(mask.all()):
        mask = None
    if key_positions is None and window >= keys:
        window = 0
    plain = mask is None and bias is None and key_positions is None and window == chunk == 0
    gqa = bool(query.shape[1] != key.shape[1])  # not a symbol under dynamic shapes
    if plain and (not causal or length == keys or length == 1):
        output = scaled_dot_product_attention(
            query, key, value, is_causal=causal and length > 1, scale=scale, enable_gqa=gqa
        )
        return output.transpose(1, 2)
    keep = reference.visible(
        length, keys, mask, key_positions, causal, window, chunk, sinks, query.device
    )
    if bias is not None:
        bias = bias.to(query.dtype)
        if keep is not None:
            bias = bias.masked_fill(~keep, float("-inf"))
    extra = bias if bias is not None else keep
    if extra is not None:
        extra = extra.expand(query.shape[0], -1, length, keys)
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=extra, scale=scale, enable_gqa=gqa
    )
    return output.transpose(1, 2)
