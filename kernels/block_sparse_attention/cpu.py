"""The block plan on a CPU: gathered blocks of keys through torch's fused attention.

Query blocks with equally many listed blocks make one batch; the keys of a batch are gathered a
few megabytes at a time. Full blocks need no mask; partial ones get a small additive mask; the
two results merge by their LSE while they are in cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.attention.fused import attend
from rewriter.kernels.block_sparse_attention.arguments import Arguments
from rewriter.kernels.block_sparse_attention.step import is_step, step
from rewriter.kernels.block_sparse_attention.tiles import Tiles


def block_sparse_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """Arguments and results of the op."""
    given = Arguments(*args)
    if is_step(given):
        return step(given)
    tiles, query, value = Tiles(given), given.query, given.value
    scale, softcap = given.scale, given.softcap
    batch, heads, length, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    shape = (batch, tiles.rows, given.block_q, tiles.heads, tiles.packed)
    output = query.new_zeros(*shape, value.shape[3])
    lse = torch.full(shape, float("-inf"), dtype=wide)
    for units, fulls, partials in tiles.batches(value.shape[3]):
        b, h, r = tiles.place(units)
        q = tiles.queries(query, units)  # [n, P, block_q, D]
        result: Tensor | None = None
        if fulls:
            k, v = (tiles.blocks(x, units, 0, fulls) for x in (given.key, value))
            packed = q.flatten(1, 2)[:, None]
            result, normaliser = attend(packed, k[:, None], v[:, None], None, scale, softcap)
            result = result.reshape(*q.shape[:3], -1)
            normaliser = normaliser.reshape(q.shape[:3])
        if partials or given.columns is not None:
            k, v, seen, extra = tiles.partial(units, fulls, partials)
            k, v = (x[:, None].expand(-1, tiles.packed, -1, -1) for x in (k, v))
            extra = extra[:, None].expand(-1, tiles.packed, -1, -1)
            some, some_lse = attend(q, k, v, extra, scale, softcap)
            some_lse = some_lse.masked_fill(~seen.any(-1)[:, None], float("-inf"))
            if result is None:
                result, normaliser = some, some_lse
            else:
                weight = torch.sigmoid(some_lse - normaliser)[..., None].to(some.dtype)
                result, normaliser = (
                    torch.lerp(result, some, weight),
                    torch.logaddexp(normaliser, some_lse),
                )
        if result is not None:
            output[b, r, :, h] = result.transpose(1, 2)
            lse[b, r, :, h] = normaliser.transpose(1, 2)
    output = output.flatten(3, 4).flatten(1, 2)[:, :length]
    return output.contiguous(), lse.flatten(3, 4).flatten(1, 2)[:, :length].transpose(
        1, 2
    ).contiguous()


def gradients(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of query, key, value, key_bias, from the saved output and LSE, one batch after another."""
    given = Arguments(*args)
    query, key, value, key_bias = given.query, given.key, given.value, given.key_bias
    tiles, scale, softcap, block_q = Tiles(given), given.scale, given.softcap, given.block_q
    wide = lse.dtype
    grad_output = torch.zeros_like(output) if grad_output is None else grad_output
    delta = (grad_output.to(wide) * output.to(wide)).sum(-1).transpose(1, 2)  # [B, H, L]
    if grad_lse is not None:
        delta = delta - grad_lse
    outside = torch.stack([lse.masked_fill(lse == float("-inf"), 0), delta], -1)
    batch, _, length, _ = query.shape
    dq = torch.zeros(batch, tiles.heads, tiles.packed, tiles.rows, block_q, query.shape[3]).to(wide)
    dk = torch.zeros(batch * tiles.groups * tiles.keys, key.shape[3], dtype=wide)
    dv = torch.zeros(batch * tiles.groups * tiles.keys, value.shape[3], dtype=wide)
    bias = torch.zeros(batch * tiles.heads * tiles.keys, dtype=wide)
    for units, fulls, partials in tiles.batches(4 * value.shape[3]):
        if not (fulls or partials or given.columns is not None):
            continue
        k, v, seen, extra = tiles.partial(units, 0, fulls + partials)
        b, h, r = tiles.place(units)
        q, do, side = (
            tiles.queries(x, units).to(wide) for x in (query, grad_output.transpose(1, 2), outside)
        )
        k, v = k.to(wide)[:, None], v.to(wide)[:, None]
        logits = q @ k.transpose(-1, -2) * scale
        bent = torch.tanh(logits / softcap) if softcap > 0 else None
        logits = logits if bent is None else softcap * bent
        weights = torch.exp(logits + extra[:, None] - side[..., :1])
        slope = weights * (do @ v.transpose(-1, -2) - side[..., 1:])
        if key_bias is not None:
            ids = tiles.tokens(units, 0, fulls + partials).clamp(0, tiles.keys - 1)
            ids = ids + ((b * tiles.heads + h) * tiles.keys)[:, None]
            bias.index_add_(0, ids.flatten(), slope.sum((1, 2)).flatten())
        slope = (slope if bent is None else slope * (1 - bent.square())) * scale
        dq[b, h, :, r] = slope @ k
        ids = tiles.tokens(units, 0, fulls + partials).clamp(0, tiles.keys - 1)
        ids = (ids + (tiles.group(units) * tiles.keys)[:, None]).flatten()
        dk.index_add_(0, ids, (slope.transpose(-1, -2) @ q).sum(1).flatten(0, 1))
        dv.index_add_(0, ids, (weights.transpose(-1, -2) @ do).sum(1).flatten(0, 1))
    found = query.new_empty(0)
    if key_bias is not None:
        found = bias.view(batch, key_bias.shape[1], -1, tiles.keys).sum(2)
        found = (found.sum(0, keepdim=True) if key_bias.shape[0] == 1 else found).to(key_bias.dtype)
    return (
        dq.flatten(3, 4)[:, :, :, :length].flatten(1, 2).to(query.dtype),
        dk.view(key.shape).to(key.dtype),
        dv.view(value.shape).to(value.dtype),
        found,
    )
