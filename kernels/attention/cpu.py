"""Attention on a CPU: torch's fused kernel on pieces of rows, each with the keys it can see.

No piece needs an [L, S] mask or repeated keys: heads share keys by a stride of zero, a window
takes a slice of the keys, and padding at an end of a row is cut off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.kernels.attention import reference
from rewriter.kernels.attention.fused import attend, attend_backward, attend_row
from rewriter.kernels.attention.merge import with_sink

#: Elements of the mask or the logits of one piece.
BUDGET = 1 << 21
#: Rows of a tile of the window form.
TILE = 64


@dataclass
class Kind:
    """The arguments of the op that are not query, key or value."""

    mask: Tensor | None
    bias: Tensor | None
    sink_logits: Tensor | None
    key_positions: Tensor | None
    scale: float
    causal: bool
    window: int
    chunk: int
    sinks: int
    softcap: float


@dataclass
class Piece:
    """Rows of some batch rows, their keys, and what is added to the logits."""

    batch: slice
    rows: slice
    keys: slice
    extra: Tensor | None = None  # broadcastable to [B, H, L, S]
    triangle: bool = False  # causal, with as many keys as rows
    sinks: slice | None = None  # keys in front of `keys`
    seen: Tensor | None = None  # rows that see anything, where some do not


def attention_with_lse(
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
) -> tuple[Tensor, Tensor]:
    """Same contract as the reference; softmax in float32 for low precision."""
    kind = Kind(
        mask, bias, sink_logits, key_positions, scale, causal, window, chunk, sinks, softcap
    )
    batch, heads, length, _ = query.shape
    if length == 1:
        output, lse = _step(query, key, value, kind)
    else:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        output = query.new_zeros(batch, length, heads, value.shape[3])
        lse = torch.full((batch, heads, length), float("-inf"), dtype=wide, device=query.device)
        written_out = softcap > 0 or query.shape[3] != value.shape[3]
        for piece in pieces(query, key, kind, written_out):
            if piece.extra is None and not piece.triangle and piece.sinks is not None:
                _window(query, key, value, kind, piece, output, lse)
            else:
                _whole(query, key, value, kind, piece, output, lse)
    return (output, lse) if sink_logits is None else with_sink(output, lse, sink_logits)


def _whole(
    query: Tensor, key: Tensor, value: Tensor, kind: Kind, piece: Piece, output: Tensor, lse: Tensor
) -> None:
    q = query[piece.batch, :, piece.rows]
    k, v = (_keys(t, piece) for t in (key, value))
    groups, extra = k.shape[1], _fold(piece.extra, q, k.shape[1])
    some, normaliser = attend(
        _split(q, groups), *(_split(t, groups) for t in (k, v)), extra, kind.scale, kind.softcap,
        piece.triangle,
    )  # fmt: skip
    some, normaliser = some.reshape(*q.shape[:3], -1), normaliser.reshape(q.shape[:3])
    if piece.seen is not None:
        normaliser = normaliser.masked_fill(~piece.seen, float("-inf"))
        some = some.masked_fill(~piece.seen[..., None], 0)
    output[piece.batch, piece.rows] = some.transpose(1, 2)
    lse[piece.batch, :, piece.rows] = normaliser


def _split(x: Tensor, groups: int) -> Tensor:
    """[B, H, ...] to [B Hk, H / Hk, ...], so that the heads of a group share their keys."""
    return x.unflatten(1, (groups, -1)).flatten(0, 1)


def _fold(extra: Tensor | None, q: Tensor, groups: int) -> Tensor | None:
    """`extra` for the split queries; of stride zero where it is the same for all."""
    if extra is None:
        return None
    batch, heads, length, _ = q.shape
    if extra.shape[0] == extra.shape[1] == 1:
        return extra.expand(batch * groups, heads // groups, length, -1)
    return _split(extra.expand(batch, heads, length, -1), groups)


def _keys(x: Tensor, piece: Piece) -> Tensor:
    part = x[piece.batch, :, piece.keys]
    if piece.sinks is None:
        return part
    return torch.cat([x[piece.batch, :, piece.sinks], part], 2)


def _window(
    query: Tensor, key: Tensor, value: Tensor, kind: Kind, piece: Piece, output: Tensor, lse: Tensor
) -> None:
    """Rows beyond the sinks, all seeing as many keys: tiles of rows on overlapping slices."""
    window, sinks, groups = kind.window, kind.sinks, key.shape[1]
    assert piece.sinks is not None
    first, base = piece.rows.start, piece.sinks.start
    tiles, span = (piece.rows.stop - first) // TILE, window - 1 + TILE
    row = torch.arange(TILE)[:, None]
    behind = row - torch.arange(span) + window - 1
    seen = (behind >= 0) & (behind < window)
    extra = torch.cat([torch.zeros(TILE, sinks), torch.where(seen, 0.0, float("-inf"))], 1)
    for b in range(*piece.batch.indices(query.shape[0])):
        q = query[b].unflatten(0, (groups, -1))[:, :, first : piece.rows.stop]
        q = q.unflatten(2, (tiles, TILE)).permute(2, 0, 1, 3, 4)
        packed = extra.to(query.dtype).repeat(q.shape[2], 1)
        out = output[b, first : piece.rows.stop].unflatten(0, (tiles, TILE))
        out_lse = lse[b, :, first : piece.rows.stop].unflatten(1, (tiles, TILE))
        some = max(1, BUDGET // (groups * packed.numel()))
        for t in range(0, tiles, some):
            end = min(t + some, tiles)
            tiled = q[t:end].flatten(2, 3)  # [n, Hk, G TILE, D]
            low = first + t * TILE - window + 1
            k, v = (
                torch.cat(
                    [
                        x[b, :, base : base + sinks].expand(end - t, -1, -1, -1),
                        x[b, :, low : low + span + (end - t - 1) * TILE]
                        .unfold(1, span, TILE)
                        .permute(1, 0, 3, 2),
                    ],
                    2,
                )
                for x in (key, value)
            )
            result, normaliser = attend(
                tiled, k, v, packed.expand(end - t, groups, -1, -1), kind.scale, kind.softcap
            )
            result = result.unflatten(2, (-1, TILE)).permute(0, 3, 1, 2, 4).flatten(2, 3)
            out[t:end] = result
            normaliser = normaliser.unflatten(2, (-1, TILE)).permute(1, 2, 0, 3)
            out_lse[:, t:end] = normaliser.flatten(0, 1)


def _step(query: Tensor, key: Tensor, value: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """One query, the last position: heads of a group are rows of one matrix."""
    batch, heads, _, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    keep: Tensor | None = None
    mask = kind.mask
    if kind.window > 0 and (kind.key_positions is not None or kind.window < keys):
        if kind.key_positions is None:
            keep = reference.visible(
                1, keys, mask if mask is not None and mask.dim() == 2 else None, None,
                kind.causal, kind.window, 0, kind.sinks, query.device,
            )[:, 0, 0]  # type: ignore[index]  # fmt: skip
        else:
            ring = kind.key_positions[:, kind.sinks :]  # behind the sinks
            low, high = ring.aminmax(dim=-1)
            if int((high - low).max()) >= kind.window:
                last = kind.key_positions.amax(-1, keepdim=True)
                keep = kind.key_positions > last - kind.window
                keep[:, : kind.sinks] = True
    if mask is not None and mask.dim() == 2 and not bool(mask.all()):
        keep = mask.bool() if keep is None else keep & mask.bool()
    if kind.chunk > 0:
        same = reference.visible(
            1, keys, mask if mask is not None and mask.dim() == 2 else None, kind.key_positions,
            kind.causal, 0, kind.chunk, 0, query.device,
        )  # fmt: skip
        assert same is not None
        keep = same[:, 0, 0] if keep is None else keep & same[:, 0, 0]
    extra: Tensor | None = None
    empty: Tensor | None = None
    if keep is not None or kind.bias is not None or (mask is not None and mask.dim() == 4):
        seen = None if keep is None else keep[:, None, None]
        if mask is not None and mask.dim() == 4:
            seen = mask.bool() if seen is None else seen & mask.bool()
        extra = _additive(kind.bias, seen, query)
        extra = extra.expand(batch, heads, 1, keys).reshape(batch, groups, -1, keys)
        if seen is not None:
            empty = ~seen.any(-1)
    q = query.reshape(batch, groups, heads // groups, width)
    if kind.softcap == 0 and query.dtype in (torch.float32, torch.float64):
        output, lse = attend_row(q, key, value, extra, kind.scale)
    else:
        output, lse = attend(q, key, value, extra, kind.scale, kind.softcap)
    output, lse = output.reshape(batch, 1, heads, -1), lse.reshape(batch, heads, 1)
    if empty is not None and bool(empty.any()):
        lse = lse.masked_fill(empty, float("-inf"))
        output = output.masked_fill(empty.transpose(1, 2)[..., None], 0)
    return output, lse


def _additive(bias: Tensor | None, seen: Tensor | None, like: Tensor) -> Tensor:
    if bias is None:
        assert seen is not None
        return torch.where(seen, 0.0, float("-inf")).to(like.dtype)
    bias = bias.to(like.dtype)
    return bias if seen is None else torch.where(seen, bias, float("-inf"))


def pieces(query: Tensor, key: Tensor, kind: Kind, written_out: bool) -> Iterator[Piece]:
    """Every row that sees a key, once; written_out: the logits of a piece will be in memory."""
    batch, length, keys = query.shape[0], query.shape[2], key.shape[2]
    every = slice(0, batch)
    mask = kind.mask
    if mask is not None and mask.dim() == 2 and bool(mask.all()):
        mask = None
    window = 0 if kind.key_positions is None and kind.window >= keys else kind.window
    plain = kind.bias is None and kind.key_positions is None and not written_out
    plain = plain and not (window and kind.chunk)
    if plain and mask is None:
        if not (kind.causal or window or kind.chunk):
            yield Piece(every, slice(0, length), slice(0, keys))
        elif kind.causal and length == keys:
            yield from _square(query, kind, every, 0, keys, window)
        else:
            yield from _masked(query, key, kind, None, every, 0, length, window, False)
        return
    if plain and mask is not None and mask.dim() == 2 and kind.causal and length == keys:
        counts = mask.long().sum(-1)
        firsts = mask.long().argmax(-1)
        place = torch.arange(keys, device=mask.device)
        run = (place >= firsts[:, None]) & (place < (firsts + counts)[:, None])
        if torch.equal(run, mask.bool()):
            for b, (first, count) in enumerate(zip(firsts.tolist(), counts.tolist(), strict=True)):
                if count:
                    row, end = slice(b, b + 1), first + count
                    yield from _square(query, kind, row, first, end, window)
                    if end < keys:  # the padding behind a row sees what it may
                        yield from _masked(query, key, kind, mask, row, end, keys, window, False)
            return
    yield from _masked(query, key, kind, mask, every, 0, length, window, written_out)


def _square(
    query: Tensor, kind: Kind, batch: slice, first: int, end: int, window: int
) -> Iterator[Piece]:
    """Causal rows first..end on their own columns, without padding."""
    if kind.chunk > 0:
        for low in range(first, end, kind.chunk):
            rows = slice(low, min(low + kind.chunk, end))
            yield Piece(batch, rows, rows, triangle=True)
        return
    if not window or window >= end - first:
        yield Piece(batch, slice(first, end), slice(first, end), triangle=True)
        return
    yield from _band(query, kind, batch, first, end, window)


def _band(
    query: Tensor, kind: Kind, batch: slice, first: int, end: int, window: int
) -> Iterator[Piece]:
    """A window of the columns first..end: its first rows alone, whole tiles, and the rest."""
    head = slice(first, first + window)
    yield Piece(batch, head, head, triangle=True)
    start, sinks = first + window, kind.sinks
    many = (end - start - sinks) // TILE
    if many >= 2:
        middle = start + sinks
        if sinks:  # some sinks are still in the window
            yield _band_rows(query, batch, start, middle, first, window, sinks)
        yield Piece(
            batch,
            slice(middle, middle + many * TILE),
            slice(0, 0),
            sinks=slice(first, first + sinks),
        )
        start = middle + many * TILE
    for low in range(start, end, 4 * TILE):
        yield _band_rows(query, batch, low, min(low + 4 * TILE, end), first, window, sinks)


def _band_rows(
    query: Tensor, batch: slice, low: int, high: int, first: int, window: int, sinks: int
) -> Piece:
    place = torch.arange(low, high, device=query.device)
    start = max(first, low - window + 1)
    apart = slice(first, min(first + sinks, start)) if sinks else None
    keys = torch.arange(start, high, device=query.device)
    if apart is not None:
        keys = torch.cat([torch.arange(apart.start, apart.stop, device=query.device), keys])
    distance = place[:, None] - keys
    seen = (distance >= 0) & ((distance < window) | (keys < first + sinks))
    extra = torch.where(seen, 0.0, float("-inf")).to(query.dtype)[None, None]
    return Piece(batch, slice(low, high), slice(start, high), extra, sinks=apart)


def _masked(
    query: Tensor,
    key: Tensor,
    kind: Kind,
    mask: Tensor | None,
    batch: slice,
    begin: int,
    end: int,
    window: int,
    written_out: bool,
) -> Iterator[Piece]:
    """Rows begin..end with the mask of a few rows at a time."""
    length, keys = query.shape[2], key.shape[2]
    device = query.device
    padding = mask[batch].bool() if mask is not None and mask.dim() == 2 else None
    dense = mask if mask is not None and mask.dim() == 4 else None
    if kind.key_positions is None:
        place = torch.arange(keys, device=device)[None]
        last = torch.full((1, 1), keys - 1, device=device)
    else:
        place = kind.key_positions[batch]
        last = place.amax(-1, keepdim=True)
    first: Tensor | None = None
    if window > 0 and kind.sinks > 0:
        if kind.key_positions is not None:
            first = (torch.arange(keys, device=device) < kind.sinks)[None]
        elif padding is not None:
            first = padding & (padding.long().cumsum(-1) <= kind.sinks)
        else:
            first = place < kind.sinks
    origin: Tensor | int = 0
    if kind.chunk > 0 and padding is not None and kind.key_positions is None:
        origin = (padding.long().cumsum(-1) == 0).sum(-1, keepdim=True)
    count = len(range(*batch.indices(query.shape[0])))
    heads = 1
    for x in (dense, kind.bias):
        heads = max(heads, 1 if x is None else x.shape[1])
    by_row = kind.causal or window or kind.chunk
    by_row = by_row or any(x is not None and x.shape[2] > 1 for x in (dense, kind.bias))
    step = end - begin
    if by_row or written_out:
        wide = query.shape[1] if written_out else heads
        step = max(16, min(512, BUDGET // max(1, count * wide * keys)))
    offset = keys - length
    for low in range(begin, end, step):
        high = min(low + step, end)
        left, right = 0, keys
        if kind.key_positions is None:
            if kind.causal:
                right = min(keys, offset + high)
            if window and first is None:
                left = max(0, offset + low - window + 1)
                right = min(right, offset + high - 1 + window)
            if kind.chunk and isinstance(origin, int):
                left = max(left, (offset + low) // kind.chunk * kind.chunk)
        at = slice(left, right)
        rows = last - length + 1 + torch.arange(low, high, device=device)[None]
        seen = reference.elements(
            rows, place[:, at], None if padding is None else padding[:, at],
            None if first is None else first[:, at], origin, kind.causal, window, kind.chunk,
        )  # fmt: skip
        seen = None if seen is None else seen[:, None]
        if dense is not None:
            part = _cut(dense, batch, low, high, at).bool()
            seen = part if seen is None else seen & part
        bias = None if kind.bias is None else _cut(kind.bias, batch, low, high, at)
        extra = None if seen is None and bias is None else _additive(bias, seen, query)
        alive = None
        if seen is not None:
            alive = seen.any(-1)
            alive = None if bool(alive.all()) else alive
        yield Piece(batch, slice(low, high), at, extra, seen=alive)


def _cut(x: Tensor, batch: slice, low: int, high: int, keys: slice) -> Tensor:
    x = x if x.shape[0] == 1 else x[batch]
    x = x if x.shape[2] == 1 else x[:, :, low:high]
    return x if x.shape[3] == 1 else x[..., keys]


def gradients(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    wants_bias: bool,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of query, key, value, bias and sink_logits (empty where there is none), piece by piece."""
    kind = Kind(
        mask, bias, sink_logits, key_positions, scale, causal, window, chunk, sinks, softcap
    )
    output, lse = attention_with_lse(
        query, key, value, mask, bias, sink_logits, key_positions, scale, causal, window, chunk,
        sinks, softcap,
    )  # fmt: skip
    wide, groups = lse.dtype, key.shape[1]
    grad = torch.zeros_like(output) if grad_output is None else grad_output
    dq = torch.zeros_like(query, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (key, value))
    dbias = torch.zeros(0 if bias is None or not wants_bias else bias.shape, dtype=wide)
    safe = lse.masked_fill(lse == float("-inf"), 0)
    delta = (grad.to(wide) * output.to(wide)).sum(-1).transpose(1, 2)
    if grad_lse is not None:
        delta = delta - grad_lse
    exact = grad_lse is not None or dbias.numel() > 0
    written_out = exact or softcap > 0 or query.shape[3] != value.shape[3]
    for whole in pieces(query, key, kind, written_out):
        for piece in _plain(whole, query, kind):
            rows, batch = (piece.batch, slice(None), piece.rows), len(query[piece.batch])
            q, do, o = (t[rows] for t in (query, grad.transpose(1, 2), output.transpose(1, 2)))
            k, v = (_keys(t, piece) for t in (key, value))
            extra = _fold(piece.extra, q, groups)
            split = [_split(t, groups) for t in (do, q, k, v, o, safe[rows], delta[rows])]
            gq, gk, gv, logits = attend_backward(
                *split, extra, scale, softcap, piece.triangle, exact
            )
            dq[rows] = gq.unflatten(0, (batch, groups)).flatten(1, 2)
            for total, found in ((dk, gk), (dv, gv)):
                found = found.sum(1).unflatten(0, (batch, groups))
                apart = 0 if piece.sinks is None else piece.sinks.stop - piece.sinks.start
                total[piece.batch, :, piece.keys] += found[:, :, apart:]
                if piece.sinks is not None:
                    total[piece.batch, :, piece.sinks] += found[:, :, :apart]
            if dbias.numel() and logits is not None:
                logits = logits.unflatten(0, (batch, groups)).flatten(1, 2)
                part = _cut(dbias, piece.batch, piece.rows.start, piece.rows.stop, piece.keys)
                part += logits.sum_to_size(part.shape)
    dsink = query.new_empty(0)
    if sink_logits is not None:
        share = torch.exp(sink_logits.to(wide)[:, None] - lse)
        dsink = -(share * delta).sum((0, 2)).to(sink_logits.dtype)
    return (
        dq,
        dk.to(key.dtype),
        dv.to(value.dtype),
        dbias if bias is None else dbias.to(bias.dtype),
        dsink,
    )


def _plain(piece: Piece, query: Tensor, kind: Kind) -> Iterator[Piece]:
    """A piece of the window form as pieces with masks."""
    if piece.extra is not None or piece.triangle or piece.sinks is None:
        yield piece
        return
    for low in range(piece.rows.start, piece.rows.stop, 4 * TILE):
        high = min(low + 4 * TILE, piece.rows.stop)
        yield _band_rows(query, piece.batch, low, high, piece.sinks.start, kind.window, kind.sinks)
