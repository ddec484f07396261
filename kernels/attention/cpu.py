"""Attention on a CPU: torch's fused kernel on pieces of rows, each with the keys it can see.

No piece needs an [L, S] mask or repeated keys: heads share keys by a stride of zero, a window
takes a slice of the keys, and padding at an end of a row is cut off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.attention.arguments import Arguments
from rewriter.kernels.attention.fused import attend, attend_backward
from rewriter.kernels.attention.merge import with_sink
from rewriter.kernels.attention.pieces import BUDGET, TILE, Piece, cut, masked, pieces
from rewriter.kernels.attention.step import step


def attention(*args: Any) -> Tensor:
    """Arguments and result of the op; softmax in float32 for low precision."""
    given = Arguments(*args)
    if given.length == 1 and given.sink_logits is None:
        return step(given, wants_lse=False)[0]
    return attention_with_lse(*args)[0]


def attention_with_lse(*args: Any) -> tuple[Tensor, Tensor]:
    """Arguments and results of the op."""
    given = Arguments(*args)
    query, width = given.query, given.value.shape[3]
    batch, heads, length, _ = query.shape
    lse: Tensor | None
    if length == 1:
        output, lse = step(given, wants_lse=True)
        assert lse is not None
    else:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        output = query.new_zeros(batch, length, heads, width)
        lse = torch.full((batch, heads, length), float("-inf"), dtype=wide, device=query.device)
        written_out = given.softcap > 0 or query.shape[3] != width
        for piece in pieces(given, written_out):
            form = _window if piece.tiled else _whole
            form(given, piece, output, lse)
    return (output, lse) if given.sink_logits is None else with_sink(output, lse, given.sink_logits)


def _whole(given: Arguments, piece: Piece, output: Tensor, lse: Tensor) -> None:
    q = given.query[piece.batch, :, piece.rows]
    k, v = (_keys(t, piece) for t in (given.key, given.value))
    groups, extra = k.shape[1], _fold(piece.extra, q, k.shape[1])
    some, normaliser = attend(
        _split(q, groups), *(_split(t, groups) for t in (k, v)), extra, given.scale, given.softcap,
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


def _window(given: Arguments, piece: Piece, output: Tensor, lse: Tensor) -> None:
    """Rows beyond the sinks, all seeing as many keys: tiles of rows on overlapping slices."""
    window, sinks, groups = given.window, given.sinks, given.groups
    assert piece.sinks is not None
    first, base = piece.rows.start, piece.sinks.start
    tiles, span = (piece.rows.stop - first) // TILE, window - 1 + TILE
    row = torch.arange(TILE)[:, None]
    behind = row - torch.arange(span) + window - 1
    seen = (behind >= 0) & (behind < window)
    extra = torch.cat([torch.zeros(TILE, sinks), torch.where(seen, 0.0, float("-inf"))], 1)
    for b in range(*piece.batch.indices(given.batch)):
        q = given.query[b].unflatten(0, (groups, -1))[:, :, first : piece.rows.stop]
        q = q.unflatten(2, (tiles, TILE)).permute(2, 0, 1, 3, 4)
        packed = extra.to(given.query.dtype).repeat(q.shape[2], 1)
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
                for x in (given.key, given.value)
            )
            result, normaliser = attend(
                tiled, k, v, packed.expand(end - t, groups, -1, -1), given.scale, given.softcap
            )
            result = result.unflatten(2, (-1, TILE)).permute(0, 3, 1, 2, 4).flatten(2, 3)
            out[t:end] = result
            normaliser = normaliser.unflatten(2, (-1, TILE)).permute(1, 2, 0, 3)
            out_lse[:, t:end] = normaliser.flatten(0, 1)


def gradients(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    wants_bias: bool,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of query, key, value, bias and sink_logits (empty where there is none), piece by piece."""
    given = Arguments(*args)
    query, key, value = given.query, given.key, given.value
    bias, sink_logits, scale, softcap = given.bias, given.sink_logits, given.scale, given.softcap
    output, lse = attention_with_lse(*args)
    wide, groups = lse.dtype, given.groups
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
    for whole in pieces(given, written_out):
        for piece in masked(whole, given):
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
                part = cut(dbias, piece.batch, piece.rows.start, piece.rows.stop, piece.keys)
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
