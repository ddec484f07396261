"""Softmax near and linear attention far, once the tokens lie in their blocks or slots."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: scale, window, block_aligned, sinks, reference, far_cap.
Options = tuple[float, int, bool, int, str, float]
Blocks = Callable[..., tuple[Tensor, Tensor, Tensor]]


def repeat(value: Tensor, heads: int) -> Tensor:
    times = heads // value.shape[1]
    return value if times == 1 else value.repeat_interleave(times, 1)


def start_of_window(rank: Tensor, options: Options) -> Tensor:
    """First rank of the window of a query; may be negative."""
    _, window, block_aligned, _, _, _ = options
    return (rank // window - 1) * window if block_aligned else rank - window + 1


def far_mass_log(rank: Tensor, options: Options) -> Tensor:
    """What the number of far tokens multiplies their weights by, as a logarithm."""
    _, _, _, sinks, _, far_cap = options
    far = (start_of_window(rank, options) - sinks).clamp_min(0).double()
    log = (far_cap / far).clamp_max(1).log() if far_cap else torch.zeros_like(far)
    return log.masked_fill(far == 0, -torch.inf)


def compute_blocks(
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
    start = start_of_window(rank, options)
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
    v = repeat(values, groups).unflatten(2, (blocks + 1, w))
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


def step(
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
    start = start_of_window(t, options)

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
        far_value = far_value + gone.mT @ repeat(ring_value, groups)
        far_mass = far_mass + gone.sum(2)
    kept = [ring_key, ring_value, ring_features, sink_key, sink_value, far_value, far_mass]
    return y, [*kept, count + real[:, 0]]
