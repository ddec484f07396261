"""The blocked form: softmax in two blocks of the window, one matrix state between blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from rewriter.kernels.autograd import without_autocast

Options = tuple[float, int, bool, int, str, float]
Blocks = Callable[..., tuple[Tensor, Tensor, Tensor]]


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

    blocks: computes what `_blocks` does, from the inputs as they are; for GPUs.
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
        compute = blocks or _blocks
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
                y, after = _step(new, before, count, real, options)
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


# ---- where tokens lie -------------------------------------------------------------------------


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
        far_value + features.mT @ _repeat(values, features.shape[1]),
        far_mass + features.sum(2),
    )


def _repeat(value: Tensor, heads: int) -> Tensor:
    repeat = heads // value.shape[1]
    return value if repeat == 1 else value.repeat_interleave(repeat, 1)


# ---- what they compute ------------------------------------------------------------------------


def _start(rank: Tensor, options: Options) -> Tensor:
    """First rank of the window of a query; may be negative."""
    _, window, block_aligned, _, _, _ = options
    return (rank // window - 1) * window if block_aligned else rank - window + 1


def far_mass_log(rank: Tensor, options: Options) -> Tensor:
    """What the number of far tokens multiplies their weights by, as a logarithm."""
    _, _, _, sinks, _, far_cap = options
    far = (_start(rank, options) - sinks).clamp_min(0).double()
    log = (far_cap / far).clamp_max(1).log() if far_cap else torch.zeros_like(far)
    return log.masked_fill(far == 0, -torch.inf)


def _blocks(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_features: Tensor,
    features: Tensor,
    gate: Tensor,
    sink_key: Tensor,
    sink_value: Tensor,
    far_value: Tensor,
    far_mass: Tensor,
    rank: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries in C blocks of w; keys, values and features in C + 1, the first from before them.

    Args:
        queries: [B, H, C w, D]. rank: [B or 1, C w], of the queries. far_value, far_mass: what
            lies before the first block of keys.

    Returns:
        y [B, C w, H, Dv]; far_value [B, G, C + 1, F, Dv] and far_mass [B, G, C + 1, F] as they
        enter each block of queries, and the one that would follow.
    """
    scale, w, block_aligned, sinks, reference, _ = options
    batch, heads, length, _ = queries.shape
    kv_heads, groups, blocks = keys.shape[1], features.shape[1], length // w

    def grouped(t: Tensor, parts: int) -> Tensor:  # [B, H, C w, n] to [B, parts, C, r w, n]
        t = t.unflatten(1, (parts, -1)).unflatten(3, (blocks, w))
        return t.transpose(2, 3).flatten(3, 4)

    def regrouped(t: Tensor) -> Tensor:  # [B, parts, C, r w, n] to [B, H, C w, n]
        return t.unflatten(3, (-1, w)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def pairs(t: Tensor) -> Tensor:  # [B, Hk, (C + 1) w, n] to [B, Hk, C, 2 w, n]
        t = t.unflatten(2, (blocks + 1, w))
        return torch.cat([t[:, :, :-1], t[:, :, 1:]], 3)

    # Exact: every block sees itself and the block before.
    q = grouped(queries * scale, kv_heads)
    logits = q @ pairs(keys).mT  # [B, Hk, C, r w, 2 w]
    place = torch.arange(w, device=q.device)
    ahead = place[None, :] > place[:, None]
    behind = torch.zeros_like(ahead) if block_aligned else ~ahead
    shape = (batch, kv_heads, blocks, heads // kv_heads, w, 2 * w)
    view = logits.view(shape)
    view.masked_fill_(torch.cat([behind, ahead], 1), -torch.inf)
    # Only the block before the first one can lie before the row's first token.
    missing = rank[:, :1] - w + place < 0  # [B or 1, w]
    if bool(missing.any()):
        view[:, :, 0, ..., :w].masked_fill_(missing[:, None, None, None, :], -torch.inf)
    start = _start(rank, options)
    top = logits.detach().amax(-1)
    if reference == "max":
        level = logits.amax(-1)
    elif reference == "mean":
        seen = (rank - start.clamp_min(0) + 1).to(q.dtype)
        level = logits.logsumexp(-1) - grouped(_heads(seen.log(), batch, heads), kv_heads)[..., 0]
    else:
        level = None

    far_log = gate + far_mass_log(rank, options).to(gate)[:, None]
    far_log = grouped(far_log[..., None], kv_heads)[..., 0]
    if level is not None:
        far_log = far_log + level
    top = torch.maximum(top, far_log.detach())
    if sinks:
        sink_logits = q @ sink_key.mT[:, :, None]
        hidden = torch.arange(sinks, device=q.device) >= start[..., None]  # [B or 1, C w, sinks]
        hidden = hidden.unflatten(1, (blocks, w))[:, None, :, None]
        sink_logits.unflatten(3, (-1, w)).masked_fill_(hidden, -torch.inf)
        top = torch.maximum(top, sink_logits.detach().amax(-1))
    weights = (logits - top[..., None]).exp_()
    total = weights.sum(-1)
    y = weights @ pairs(values)
    if sinks:
        sink_weights = (sink_logits - top[..., None]).exp_()
        total = total + sink_weights.sum(-1)
        y = y + sink_weights @ sink_value[:, :, None]
    factor = (far_log - top).exp()

    # Linear: the sum over all blocks before the two.
    f = features.unflatten(2, (blocks + 1, w))
    v = _repeat(values, groups).unflatten(2, (blocks + 1, w))
    states = torch.cat([far_value[:, :, None], f[:, :, :-1].mT @ v[:, :, :-1]], 2).cumsum(2)
    masses = torch.cat([far_mass[:, :, None], f[:, :, :-1].sum(3)], 2).cumsum(2)
    fq = grouped(query_features, groups)
    far_y = fq @ states[:, :, :-1]
    far_total = (fq @ masses[:, :, :-1, :, None])[..., 0]
    if not block_aligned:  # and the part of the block before that has left the window
        inside = fq @ f[:, :, :-1].mT
        inside = inside.unflatten(3, (-1, w)).masked_fill(ahead, 0).flatten(3, 4)
        far_y = far_y + inside @ v[:, :, :-1]
        far_total = far_total + inside.sum(-1)
    if groups != kv_heads:
        far_y, far_total = (grouped(regrouped(t), kv_heads) for t in (far_y, far_total[..., None]))
        far_total = far_total[..., 0]
    y = y + factor[..., None] * far_y
    y = y / (total + factor * far_total)[..., None]
    return regrouped(y).transpose(1, 2), states, masses


def _heads(value: Tensor, batch: int, heads: int) -> Tensor:
    """[B or 1, n] to [B, H, n, 1]."""
    return value[:, None, :, None].expand(batch, heads, -1, 1)


def _step(
    new: tuple[Tensor, ...],
    before: list[Tensor],
    count: Tensor,
    real: Tensor,
    options: Options,
) -> tuple[Tensor, list[Tensor]]:
    """One token a row: it goes into its slot, then every slot's rank follows from the count."""
    query, key, value, query_features, key_features, gate = new
    ring_key, ring_value, ring_features, sink_key, sink_value, far_value, far_mass = before
    scale, window, block_aligned, sinks, reference, _ = options
    ring, kv_heads, groups = ring_key.shape[2], key.shape[1], key_features.shape[1]
    slots, first = (torch.arange(n, device=query.device)[None] for n in (ring, sinks))
    t = count[:, None]

    def put(old: Tensor, fresh: Tensor, chosen: Tensor) -> Tensor:
        return torch.where((chosen & real)[:, None, :, None], fresh, old)

    ring_key, ring_value, ring_features = (
        put(old, fresh, slots == t % ring)
        for old, fresh in ((ring_key, key), (ring_value, value), (ring_features, key_features))
    )
    sink_key, sink_value = (
        put(old, fresh, first == t) for old, fresh in ((sink_key, key), (sink_value, value))
    )
    held = t - (t - slots) % ring
    start = _start(t, options)

    q = (query[:, :, 0] * scale).unflatten(1, (kv_heads, -1))  # [B, Hk, r, D]
    logits = q @ ring_key.mT
    logits = logits.masked_fill((held < start.clamp_min(0))[:, None, None], -torch.inf)
    exact, seen = logits, ring_value
    if sinks:
        sink_logits = q @ sink_key.mT
        sink_logits = sink_logits.masked_fill((first >= start)[:, None, None], -torch.inf)
        exact, seen = torch.cat([exact, sink_logits], 3), torch.cat([seen, sink_value], 2)
    far_log = gate[..., 0] + far_mass_log(t, options).to(gate)
    if reference == "max":
        far_log = far_log + logits.amax(-1).flatten(1)
    elif reference == "mean":
        number = (t - start.clamp_min(0) + 1).to(q.dtype)
        far_log = far_log + logits.logsumexp(-1).flatten(1) - number.log()
    top = torch.maximum(exact.amax(-1).flatten(1), far_log).detach()
    weights = (exact - top.view(exact.shape[:3])[..., None]).exp()
    factor = (far_log - top).exp()[..., None]
    fq = query_features[:, :, 0].unflatten(1, (groups, -1))
    y = (weights @ seen).flatten(1, 2) + factor * (fq @ far_value).flatten(1, 2)
    mass = (fq @ far_mass[..., None]).flatten(1, 2)
    y = y / (weights.sum(-1, keepdim=True).flatten(1, 2) + factor * mass)
    y = y[:, None].masked_fill(~real[..., None, None], 0)

    # What the next token no longer sees exactly.
    after = t + 1
    if block_aligned:
        leaves = (after % window == 0) & (held >= after - 2 * window) & (held < after - window)
    else:
        leaves = held == after - window
    leaves = leaves & (held >= sinks) & real
    if bool(leaves.any()):
        gone = ring_features * leaves[:, None, :, None]
        far_value = far_value + gone.mT @ _repeat(ring_value, groups)
        far_mass = far_mass + gone.sum(2)
    kept = [ring_key, ring_value, ring_features, sink_key, sink_value, far_value, far_mass]
    return y, [*kept, count + real[:, 0]]
