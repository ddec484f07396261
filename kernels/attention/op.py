"""`rewriter::attention`: schema, shapes, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.kernels.attention import cpu
from rewriter.kernels.autograd import register_recompute
from rewriter.kernels.mixer import MixerSpec, register_mixer


@torch.library.custom_op("rewriter::attention", mutates_args=())
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
    """Softmax attention.

    Args:
        query: [B, H, L, D]. The queries are the last L of the sequence.
        key: [B, Hk, S, D], Hk divides H; query head h reads key head h // (H // Hk).
        value: [B, Hk, S, Dv].
        mask: [B, S] (true: a real token) or [B or 1, H or 1, L, S] (true: visible).
        bias: added to the logits, broadcastable to [B, H, L, S] (ALiBi, relative positions).
        sink_logits: [H], one learned logit a head that only takes part in the normaliser.
        key_positions: [B, S] int, the column of each key, for a cache that has dropped some;
            its first `sinks` slots hold the sinks, and its largest entry is the last query.
        scale: multiplies the logits.
        causal: a query sees keys up to its own column.
        window: 0, or a query sees only keys with |distance| < window (and the sinks).
        chunk: 0, or a query sees only keys of its own chunk of this many columns.
        sinks: with a window, the first real tokens of a row stay visible.
        softcap: 0, or logits become softcap * tanh(logits / softcap).

    Returns:
        [B, L, H, Dv]. A row that sees nothing is zero.
    """
    return cpu.attention(
        query,
        key,
        value,
        mask,
        bias,
        sink_logits,
        key_positions,
        scale,
        causal,
        window,
        chunk,
        sinks,
        softcap,
    ).clone(memory_format=torch.contiguous_format)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))


register_recompute(attention, cpu.attention)
register_mixer(attention, MixerSpec("kv_append", normalised=True))
