"""The blocked form: softmax in two blocks of the window, one matrix state between blocks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rewriter.kernels.autograd import without_autocast
from rewriter.kernels.hybrid_attention.compute import (
    Blocks,
    Options,
    compute_blocks,
    repeat,
    step,
)


def hybrid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    gate: Tensor,
    mask: Tensor | None,
    ring_key: Tensor | None,
    ring_value: Tensor | None,
    ring_features: Tensor | None,
    sink_key: Tensor | None,
    sink_value: Tensor | None,
    far_value: Tensor | None,
    far_mass: Tensor | None,
    count: Tensor | None,
    scale: float,
    window: int,
    block_aligned: bool,
    sinks: int,
    reference: str,
    far_cap: float,
    blocks: Blocks | None = None,
) -> tuple[Tensor, ...]:
    """Same contract as `rewriter::hybrid_attention`; differentiable, float32 inside (or 64).

    blocks: computes what `compute_blocks` does, from the inputs as they are; for GPUs.
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    types = (key.dtype, value.dtype, key_features.dtype, key.dtype, value.dtype)
    options = (scale, window, block_aligned, sinks, reference, far_cap)
    with without_autocast(query):
        one = query.shape[2] == 1
        keep = blocks is not None and not one
        given = (query, key, value, query_features, key_features)
        new = (*(t if keep else t.to(wide) for t in given), gate.to(wide))
        state = (ring_key, ring_value, ring_features, sink_key, sink_value)
        compute = blocks or compute_blocks
        if count is None and (mask is None or bool(mask.all())) and not one:
            y, after = _fresh(new, options, compute)
        else:
            if count is None or far_value is None or far_mass is None:
                before = _empty(new, options)
                count = torch.zeros(len(query), dtype=torch.int64, device=query.device)
            else:
                before = [t if keep else t.to(wide) for t in state if t is not None]
                before += [far_value.to(wide), far_mass.to(wide)]
            real = torch.ones_like(gate[:, 0], dtype=torch.bool) if mask is None else mask.bool()
            if one:
                y, after = step(new, before, count, real, options)
            else:
                y, after = _continued(new, before, count, real, options, compute)
        *kept, far_value, far_mass, count = after
        kept = [t.to(dtype) for t, dtype in zip(kept, types, strict=True)]
        return (y.to(query.dtype), *kept, far_value, far_mass, count)


def _empty(new: tuple[Tensor, ...], options: Options) -> list[Tensor]:
    """The state before the first token."""
    _, key, value, _, features, gate = new
    _, window, block_aligned, sinks, _, _ = options
    ring = 2 * window if block_aligned else window
    kept = [t.new_zeros(*t.shape[:2], ring, t.shape[3]) for t in (key, value, features)]
    kept += [t.new_zeros(*t.shape[:2], sinks, t.shape[3]) for t in (key, value)]
    far = gate.new_zeros(*features.shape[:2], features.shape[3], value.shape[3])
    return [*kept, far, far[..., 0]]


def _fresh(
    new: tuple[Tensor, ...], options: Options, compute: Blocks
) -> tuple[Tensor, list[Tensor]]:
    """No past and no padding: the blocks are slices."""
    query, key, value, query_features, key_features, gate = new
    _, window, block_aligned, sinks, _, _ = options
    batch, _, length, _ = query.shape
    blocks = -(-length // window)
    tail = blocks * window - length
    keys, values = (pad(t, (0, 0, window, tail)) for t in (key, value))
    features = pad(key_features[:, :, sinks:], (0, 0, window + sinks, tail))
    features = features[:, :, : (blocks + 1) * window]
    queries, query_features = (pad(t, (0, 0, 0, tail)) for t in (query, query_features))
    rank = torch.arange(blocks * window, device=query.device)[None]
    first = min(sinks, length)
    sink_key, sink_value = (pad(t[:, :, :first], (0, 0, 0, sinks - first)) for t in (key, value))
    past = _empty(new, options)[5:]
    y, states, masses = compute(
        queries,
        keys,
        values,
        query_features,
        features,
        pad(gate, (0, tail)),
        sink_key,
        sink_value,
        *past,
        rank,
        options,
    )
    far_value, far_mass = states[:, :, length // window], masses[:, :, length // window]
    if not block_aligned:
        far_value, far_mass = _add_part(
            far_value, far_mass, features, values, length // window, length % window, window
        )
    size = 2 * window if block_aligned else window
    slots = torch.arange(size, device=query.device)
    held = length - 1 - (length - 1 - slots) % size  # rank in each slot; negative: none
    source = torch.where(held < 0, length, held)
    rings = [pad(t, (0, 0, 0, 1)).index_select(2, source) for t in (key, value, key_features)]
    count = torch.full((batch,), length, dtype=torch.int64, device=query.device)
    return y[:, :length], [*rings, sink_key, sink_value, far_value, far_mass, count]


def _continued(
    new: tuple[Tensor, ...],
    before: list[Tensor],
    count: Tensor,
    real: Tensor,
    options: Options,
    compute: Blocks,
) -> tuple[Tensor, list[Tensor]]:
    """After a past, or with padding: every row's real tokens move to their own blocks."""
    query, key, value, query_features, key_features, gate = new
    ring_key, ring_value, ring_features, sink_key, sink_value, far_value, far_mass = before
    _, window, block_aligned, sinks, _, _ = options
    length, ring = query.shape[2], ring_key.shape[2]
    order = (~real).int().argsort(dim=1, stable=True)  # columns of the real tokens, in order
    total = count + real.sum(1)
    offset = count % window if block_aligned else torch.zeros_like(count)
    origin = count - offset
    blocks = max(1, -(-int((total - origin).max()) // window))

    def column(rank: Tensor) -> Tensor:
        """Of a rank [B, n] in the rings with the new tokens behind them; -1: nowhere."""
        fresh = order.gather(1, (rank - count[:, None]).clamp(0, length - 1))
        found = torch.where(rank < count[:, None], rank % ring, ring + fresh)
        return found.masked_fill((rank < 0) | (rank >= total[:, None]), -1)

    def take(old: Tensor, fresh: Tensor, where: Tensor) -> Tensor:
        both = torch.cat([old, fresh], 2)
        index = where.clamp_min(0)[:, None, :, None].expand(-1, both.shape[1], -1, both.shape[3])
        return both.gather(2, index).masked_fill((where < 0)[:, None, :, None], 0)

    place = torch.arange((blocks + 1) * window, device=query.device)[None]
    rank = origin[:, None] - window + place
    where = column(rank)
    keys, values = take(ring_key, key, where), take(ring_value, value, where)
    # Sinks are never far, and what already is in the state must not enter it again.
    counted = (rank >= sinks) & (rank > (count - window)[:, None] if not block_aligned else True)
    features = take(ring_features, key_features, where.masked_fill(~counted, -1))
    own = where[:, window:] - ring
    nothing = query.new_zeros(len(query), query.shape[1], 0, 1)
    queries, query_features, gates = (
        take(nothing.expand(-1, -1, -1, t.shape[3]), t, own)
        for t in (query, query_features, gate[..., None])
    )
    first = torch.arange(sinks, device=query.device).expand(len(query), -1)
    found = torch.where(first < count[:, None], first, sinks + column(first) - ring)
    found = found.masked_fill(first >= total[:, None], -1)
    sink_key, sink_value = take(sink_key, key, found), take(sink_value, value, found)

    y, states, masses = compute(
        queries,
        keys,
        values,
        query_features,
        features,
        gates[..., 0],
        sink_key,
        sink_value,
        far_value,
        far_mass,
        rank[:, window:],
        options,
    )
    here = (count[:, None] + real.cumsum(1) - 1 - origin[:, None]).clamp_min(0)
    y = y.gather(1, here[..., None, None].expand(-1, -1, *y.shape[2:]))
    y = y.masked_fill(~real[..., None, None], 0)

    ended = (total - origin) // window
    row = torch.arange(len(query), device=query.device)
    far_value, far_mass = states[row, :, ended], masses[row, :, ended]
    if not block_aligned:
        far_value, far_mass = _add_part(
            far_value, far_mass, features, values, ended, (total - origin) % window, window
        )
    slots = torch.arange(ring, device=query.device)[None]
    held = column(total[:, None] - 1 - (total[:, None] - 1 - slots) % ring)
    rings = [
        take(old, fresh, held)
        for old, fresh in ((ring_key, key), (ring_value, value), (ring_features, key_features))
    ]
    return y, [*rings, sink_key, sink_value, far_value, far_mass, total]


def _add_part(
    far_value: Tensor,
    far_mass: Tensor,
    features: Tensor,
    values: Tensor,
    block: Tensor | int,
    rest: Tensor | int,
    window: int,
) -> tuple[Tensor, Tensor]:
    """A sliding window ends inside a block: its first rest + 1 tokens have left it too."""
    batch, device = len(features), features.device
    block, rest = (torch.as_tensor(n, device=device).expand(batch) for n in (block, rest))
    place = torch.arange(window, device=device)[None]
    index = (block[:, None] * window + place)[:, None, :, None]
    left = (place <= rest[:, None])[:, None, :, None]
    features = features.gather(2, index.expand(-1, features.shape[1], -1, features.shape[3]))
    values = values.gather(2, index.expand(-1, values.shape[1], -1, values.shape[3]))
    features = (features * left).to(far_value.dtype)
    values = values.to(far_value.dtype)
    return (
        far_value + features.mT @ repeat(values, features.shape[1]),
        far_mass + features.sum(2),
    )
