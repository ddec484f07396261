"""Rows of an attention with the keys they can see, so that none needs an [L, S] mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.kernels.attention import reference
from rewriter.kernels.attention.arguments import Arguments

#: Elements of the mask or the logits of one piece.
BUDGET = 1 << 21
#: Rows of a tile of the window form.
TILE = 64


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

    @property
    def tiled(self) -> bool:
        """Rows beyond the sinks of a window, whole tiles of them, which need no mask each."""
        return self.extra is None and not self.triangle and self.sinks is not None


def pieces(given: Arguments, written_out: bool) -> Iterator[Piece]:
    """Every row that sees a key, once; written_out: the logits of a piece will be in memory."""
    batch, length, keys = given.batch, given.length, given.keys
    every = slice(0, batch)
    mask = given.mask
    if mask is not None and mask.dim() == 2 and bool(mask.all()):
        mask = None
    window = 0 if given.key_positions is None and given.window >= keys else given.window
    plain = given.bias is None and given.key_positions is None and not written_out
    plain = plain and not (window and given.chunk)
    if plain and mask is None:
        if not (given.causal or window or given.chunk):
            yield Piece(every, slice(0, length), slice(0, keys))
        elif given.causal and length == keys:
            yield from _square(given, every, 0, keys, window)
        else:
            yield from _masked(given, None, every, 0, length, window, False)
        return
    if plain and mask is not None and mask.dim() == 2 and given.causal and length == keys:
        counts = mask.long().sum(-1)
        firsts = mask.long().argmax(-1)
        place = torch.arange(keys, device=mask.device)
        run = (place >= firsts[:, None]) & (place < (firsts + counts)[:, None])
        if torch.equal(run, mask.bool()):
            for b, (first, count) in enumerate(zip(firsts.tolist(), counts.tolist(), strict=True)):
                if count:
                    row, end = slice(b, b + 1), first + count
                    yield from _square(given, row, first, end, window)
                    if end < keys:  # the padding behind a row sees what it may
                        yield from _masked(given, mask, row, end, keys, window, False)
            return
    yield from _masked(given, mask, every, 0, length, window, written_out)


def _square(given: Arguments, batch: slice, first: int, end: int, window: int) -> Iterator[Piece]:
    """Causal rows first..end on their own columns, without padding."""
    if given.chunk > 0:
        for low in range(first, end, given.chunk):
            rows = slice(low, min(low + given.chunk, end))
            yield Piece(batch, rows, rows, triangle=True)
        return
    if not window or window >= end - first:
        yield Piece(batch, slice(first, end), slice(first, end), triangle=True)
        return
    yield from _band(given, batch, first, end, window)


def _band(given: Arguments, batch: slice, first: int, end: int, window: int) -> Iterator[Piece]:
    """A window of the columns first..end: its first rows alone, whole tiles, and the rest."""
    head = slice(first, first + window)
    yield Piece(batch, head, head, triangle=True)
    start, sinks = first + window, given.sinks
    many = (end - start - sinks) // TILE
    if many >= 2:
        middle = start + sinks
        if sinks:  # some sinks are still in the window
            yield _band_rows(given, batch, start, middle, first, window, sinks)
        yield Piece(
            batch,
            slice(middle, middle + many * TILE),
            slice(0, 0),
            sinks=slice(first, first + sinks),
        )
        start = middle + many * TILE
    for low in range(start, end, 4 * TILE):
        yield _band_rows(given, batch, low, min(low + 4 * TILE, end), first, window, sinks)


def _band_rows(
    given: Arguments, batch: slice, low: int, high: int, first: int, window: int, sinks: int
) -> Piece:
    place = torch.arange(low, high, device=given.query.device)
    start = max(first, low - window + 1)
    apart = slice(first, min(first + sinks, start)) if sinks else None
    keys = torch.arange(start, high, device=given.query.device)
    if apart is not None:
        keys = torch.cat([torch.arange(apart.start, apart.stop, device=given.query.device), keys])
    distance = place[:, None] - keys
    seen = (distance >= 0) & ((distance < window) | (keys < first + sinks))
    extra = torch.where(seen, 0.0, float("-inf")).to(given.query.dtype)[None, None]
    return Piece(batch, slice(low, high), slice(start, high), extra, sinks=apart)


def _masked(
    given: Arguments,
    mask: Tensor | None,
    batch: slice,
    begin: int,
    end: int,
    window: int,
    written_out: bool,
) -> Iterator[Piece]:
    """Rows begin..end with the mask of a few rows at a time."""
    length, keys, device = given.length, given.keys, given.query.device
    padding = mask[batch].bool() if mask is not None and mask.dim() == 2 else None
    dense = mask if mask is not None and mask.dim() == 4 else None
    if given.key_positions is None:
        place = torch.arange(keys, device=device)[None]
        last = torch.full((1, 1), keys - 1, device=device)
    else:
        place = given.key_positions[batch]
        last = place.amax(-1, keepdim=True)
    first: Tensor | None = None
    if window > 0 and given.sinks > 0:
        if given.key_positions is not None:
            first = (torch.arange(keys, device=device) < given.sinks)[None]
        elif padding is not None:
            first = padding & (padding.long().cumsum(-1) <= given.sinks)
        else:
            first = place < given.sinks
    origin: Tensor | int = 0
    if given.chunk > 0 and padding is not None and given.key_positions is None:
        origin = (padding.long().cumsum(-1) == 0).sum(-1, keepdim=True)
    count = len(range(*batch.indices(given.batch)))
    heads = 1
    for x in (dense, given.bias):
        heads = max(heads, 1 if x is None else x.shape[1])
    by_row = given.causal or window or given.chunk
    by_row = by_row or any(x is not None and x.shape[2] > 1 for x in (dense, given.bias))
    step = end - begin
    if by_row or written_out:
        wide = given.query.shape[1] if written_out else heads
        step = max(16, min(512, BUDGET // max(1, count * wide * keys)))
    offset = keys - length
    for low in range(begin, end, step):
        high = min(low + step, end)
        left, right = 0, keys
        if given.key_positions is None:
            if given.causal:
                right = min(keys, offset + high)
            if window and first is None:
                left = max(0, offset + low - window + 1)
                right = min(right, offset + high - 1 + window)
            if given.chunk and isinstance(origin, int):
                left = max(left, (offset + low) // given.chunk * given.chunk)
        at = slice(left, right)
        rows = last - length + 1 + torch.arange(low, high, device=device)[None]
        seen = reference.elements(
            rows, place[:, at], None if padding is None else padding[:, at],
            None if first is None else first[:, at], origin, given.causal, window, given.chunk,
        )  # fmt: skip
        seen = None if seen is None else seen[:, None]
        if dense is not None:
            part = cut(dense, batch, low, high, at).bool()
            seen = part if seen is None else seen & part
        bias = None if given.bias is None else cut(given.bias, batch, low, high, at)
        extra = None if seen is None and bias is None else additive(bias, seen, given.query)
        alive = None
        if seen is not None:
            alive = seen.any(-1)
            alive = None if bool(alive.all()) else alive
        yield Piece(batch, slice(low, high), at, extra, seen=alive)


def cut(x: Tensor, batch: slice, low: int, high: int, keys: slice) -> Tensor:
    x = x if x.shape[0] == 1 else x[batch]
    x = x if x.shape[2] == 1 else x[:, :, low:high]
    return x if x.shape[3] == 1 else x[..., keys]


def additive(bias: Tensor | None, seen: Tensor | None, like: Tensor) -> Tensor:
    if bias is None:
        assert seen is not None
        return torch.where(seen, 0.0, float("-inf")).to(like.dtype)
    bias = bias.to(like.dtype)
    return bias if seen is None else torch.where(seen, bias, float("-inf"))


def masked(piece: Piece, given: Arguments) -> Iterator[Piece]:
    """A piece of the window form as pieces with masks; any other as it is."""
    if not piece.tiled:
        yield piece
        return
    assert piece.sinks is not None
    for low in range(piece.rows.start, piece.rows.stop, 4 * TILE):
        high = min(low + 4 * TILE, piece.rows.stop)
        yield _band_rows(
            given, piece.batch, low, high, piece.sinks.start, given.window, given.sinks
        )
