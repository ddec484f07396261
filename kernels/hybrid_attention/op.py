"""`rewriter::hybrid_attention`: schema, shapes, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.autograd import (
    expect,
    register_autocast,
    register_cpu,
    register_recompute,
    register_triton,
)
from rewriter.kernels.hybrid_attention import cpu
from rewriter.kernels.mixer import MixerSpec, StateTensor, register_mixer

STATE = (
    "ring_key",
    "ring_value",
    "ring_features",
    "sink_key",
    "sink_value",
    "far_value",
    "far_mass",
    "count",
)


@torch.library.custom_op(
    "rewriter::hybrid_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor query_features, "
    "Tensor key_features, Tensor gate, Tensor? mask, Tensor? ring_key, Tensor? ring_value, "
    "Tensor? ring_features, Tensor? sink_key, Tensor? sink_value, Tensor? far_value, "
    "Tensor? far_mass, Tensor? count, float scale, int window, bool block_aligned, int sinks, "
    "str reference, float far_cap) -> (Tensor y, Tensor new_ring_key, Tensor new_ring_value, "
    "Tensor new_ring_features, Tensor new_sink_key, Tensor new_sink_value, "
    "Tensor new_far_value, Tensor new_far_mass, Tensor new_count)",
)
def hybrid_attention(*args: Any) -> tuple[Tensor, ...]:
    """Arguments and results are those of `rewriter.kernels.hybrid_attention`, state unpacked."""
    _shapes(*args)
    form = torch.contiguous_format
    return tuple(t.clone(memory_format=form) for t in cpu.hybrid_attention(*args))


@hybrid_attention.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    query, key, value, features = args[0], args[1], args[2], args[4]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    types = (*(t.dtype for t in (query, key, value, features, key, value)), wide, wide)
    shapes = _shapes(*args)
    return tuple(
        query.new_empty(shape, dtype=dtype)
        for shape, dtype in zip(shapes, (*types, torch.int64), strict=True)
    )


def _shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    gate: Tensor,
    mask: Tensor | None,
    *rest: Any,
) -> list[tuple[Any, ...]]:
    """Shapes of all results; checks those of the arguments."""
    state, (_, window, block_aligned, sinks, reference, _) = rest[:8], rest[8:]
    if any(t.dim() != 4 for t in (query, key, value, query_features, key_features)):
        raise ValueError("hybrid_attention: queries, keys, values and features have 4 dimensions")
    (batch, heads, length, width), kv_heads = query.shape, key.shape[1]
    groups, size, out = key_features.shape[1], key_features.shape[3], value.shape[3]
    if heads % groups or groups % kv_heads:
        raise ValueError(
            f"hybrid_attention: {kv_heads} key heads must divide {groups} feature heads, "
            f"and those {heads} query heads"
        )
    if window < 1 or not 0 <= sinks <= window:
        raise ValueError(f"hybrid_attention: {sinks} sinks do not fit into a window of {window}")
    if reference not in ("none", "max", "mean"):
        raise ValueError(f"hybrid_attention: unknown reference {reference!r}")
    ring = 2 * window if block_aligned else window
    shapes = [
        (batch, kv_heads, ring, width),
        (batch, kv_heads, ring, out),
        (batch, groups, ring, size),
        (batch, kv_heads, sinks, width),
        (batch, kv_heads, sinks, out),
        (batch, groups, size, out),
        (batch, groups, size),
        (batch,),
    ]
    expect(
        "hybrid_attention",
        ("key", key, (batch, kv_heads, length, width)),
        ("value", value, (batch, kv_heads, length, out)),
        ("query_features", query_features, (batch, heads, length, size)),
        ("key_features", key_features, (batch, groups, length, size)),
        ("gate", gate, (batch, heads, length)),
        ("mask", mask, (batch, length)),
        *zip(STATE, state, shapes, strict=True),
    )
    if len({t is None for t in state}) > 1:
        raise ValueError("hybrid_attention: give all tensors of the state or none")
    return [(batch, length, heads, out), *shapes]


register_recompute(hybrid_attention, cpu.hybrid_attention)
register_cpu(hybrid_attention)
register_autocast(hybrid_attention, "query", "key", "value", "query_features", "key_features")
register_triton(hybrid_attention)
register_mixer(
    hybrid_attention,
    MixerSpec(
        "identity",
        tuple(StateTensor(name, name, number + 1) for number, name in enumerate(STATE)),
        normalised=True,
    ),
)
