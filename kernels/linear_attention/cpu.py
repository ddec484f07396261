"""The chunked form: matrix products inside a chunk, the state carried from chunk to chunk.

One chunk at a time keeps what it works on in the cache; nothing of size T x T, nor a state for
every chunk, is ever stored.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.autograd import without_autocast
from rewriter.kernels.linear_attention.reference import inert, state_heads

CHUNK = 64
KEY_DECAY_CHUNK = 16  # its weights are summed channel by channel: Q K products a token
LEAST_DECAY = -1e4


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float = 1.0,
    normalise: bool = False,
    state: Tensor | None = None,
    z: Tensor | None = None,
    mask: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as the package's function; differentiable, float32 inside (or float64)."""
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    with without_autocast(v):
        S = state_heads(k, v, log_decay, beta)
        size = (v.shape[0], S, k.shape[3])
        if state is None:
            state = v.new_zeros(*size, v.shape[3], dtype=wide)
        if not normalise:
            z = None
        elif z is None:
            z = v.new_zeros(size, dtype=wide)
        dtype, real = v.dtype, inert(mask, q, k, v, log_decay, beta)
        tokens: list[Any] = [None if t is None else t.to(wide) for t in real]
        q, k, v, log_decay, beta = tokens
        sums = None if z is None else z.to(wide)
        form = step if v.shape[1] == 1 else partial(chunked, chunk=chunk)
        y, state, z = form(q, k, v, log_decay, beta, state.to(wide), sums, scale=scale)
        return y.to(dtype), state, v.new_zeros(*size[:2], 0, dtype=wide) if z is None else z


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    z: Tensor | None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`chunked` for one token: the queries of a state are rows of one product."""
    batch, S, size, _ = state.shape
    k, v = _repeat(k[:, 0], S, 1), _repeat(v[:, 0], S, 1)
    if log_decay is not None:
        kept = torch.exp(_repeat(log_decay[:, 0], S, 1)).reshape(batch, S, -1)
        state, z = kept[..., None] * state, None if z is None else kept * z
    if beta is not None:
        held = torch.bmm(k.reshape(-1, 1, size), state.flatten(0, 1)).view(v.shape)
        v = _repeat(beta[:, 0], S, 1)[..., None] * (v - held)
    state = torch.addcmul(state, k[..., None], v[..., None, :])
    heads = max(S, q.shape[2])
    q = _repeat(q[:, 0], heads, 1).reshape(batch * S, -1, size)
    q = q if scale == 1 else q * scale
    y = torch.bmm(q, state.flatten(0, 1))
    if z is not None:
        z = z + k
        total = torch.bmm(q, z.reshape(-1, size, 1))
        y = y / total.masked_fill(total == 0, math.inf)
    return y.view(batch, 1, heads, -1), state, z


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    z: Tensor | None,
    scale: float = 1.0,
    gain: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All of one dtype and without padding; `gain` [B, T, S] multiplies v, z given: normalise."""
    S = state.shape[1]
    if chunk is None:
        chunk = CHUNK if log_decay is None or log_decay.dim() == 3 else KEY_DECAY_CHUNK
    rows = max(1, q.shape[2] // S)  # queries that share a state
    parts = [
        [None] * -(-v.shape[1] // chunk) if t is None else t.split(chunk, 1)
        for t in (q, k, v, log_decay, beta, gain)
    ]
    outputs = []
    for q, k, v, g, b, w in zip(*parts, strict=True):
        q = q.unflatten(2, (-1, rows)).permute(0, 2, 3, 1, 4)  # [B, h, R, Q, K]
        k = k.transpose(1, 2)[:, :, None]  # [B, h, 1, Q, K]
        v = _repeat(v if w is None else v * w[..., None], S, 2).transpose(1, 2)
        q = q if scale == 1 else q * scale
        v = v.reshape(-1, *v.shape[2:])  # [B S, Q, V], no copy for a batch of one
        since = reach = through = None
        if g is not None:
            # Sums in float64: a difference of float32 sums is wrong after one strong decay.
            # Below the least, exp() is 0 either way, and -inf - -inf would be NaN.
            g = _repeat(g, S, 2).transpose(1, 2).clamp(min=LEAST_DECAY)
            since = g.cumsum(2, dtype=torch.float64)  # [B, S, Q] or [B, S, Q, K]
            reach = torch.exp(since[:, :, -1:] - since).to(k.dtype)
            through = torch.exp(since[:, :, -1]).to(k.dtype).reshape(*state.shape[:2], -1)
        arrived = None if since is None else torch.exp(since).to(k.dtype)
        weights = _weights(q, k, since, S, 0)
        before = state.flatten(0, 1)
        if b is not None:  # the WY form: what is written solves a unit triangular system
            b = _repeat(b, S, 2).transpose(1, 2).reshape(-1, b.shape[1], 1)
            seen = torch.bmm(_spread(k, arrived, S), before)
            v = torch.linalg.solve_triangular(
                b * _weights(k, k, since, S, -1), b * (v - seen), upper=False, unitriangular=True
            )
        reading = _spread(q, arrived, S)
        y = torch.baddbmm(torch.bmm(weights, v), reading, before)
        writing = _spread(k, reach, S)
        kept = state if through is None else through[..., None] * state
        if z is not None:
            total = weights.sum(-1, keepdim=True) + torch.bmm(reading, z.flatten(0, 1)[..., None])
            y = y / total.masked_fill(total == 0, math.inf)
            z = (z if through is None else through * z) + writing.sum(1).view_as(z)
        state = torch.baddbmm(kept.flatten(0, 1), writing.mT, v).view_as(state)
        outputs.append(y.view(state.shape[0], S * rows, -1, y.shape[-1]).transpose(1, 2))
    return torch.cat(outputs, 1), state, z


def _repeat(t: Tensor, heads: int, dim: int) -> Tensor:
    return t if t.shape[dim] == heads else t.repeat_interleave(heads // t.shape[dim], dim)


def _spread(t: Tensor, factor: Tensor | None, S: int) -> Tensor:
    """[B, h, R, Q, K] times a factor of every state, [B, S, Q] or [B, S, Q, K]: [B S, R Q, K]."""
    if factor is None:
        t = _repeat(t, S, 1)
    else:
        factor = factor.reshape(*factor.shape[:3], -1).unflatten(1, (t.shape[1], -1))
        t = t[:, :, None] * factor[:, :, :, None]
    return t.reshape(-1, t.shape[-3] * t.shape[-2], t.shape[-1])


def _weights(a: Tensor, b: Tensor, since: Tensor | None, S: int, diagonal: int) -> Tensor:
    """a_i . b_j exp(g_{j+1} + ... + g_i) for j <= i + diagonal, else 0: [B S, R Q, Q]."""
    length, rows = a.shape[3], a.shape[2]
    if since is None:
        pairs = _pairs(a, b).tril(diagonal)
        return _repeat(pairs, S, 1).reshape(-1, rows * length, length)
    # exp() is slow where it underflows, and infinite above the diagonal: keep it off both.
    least = math.log(torch.finfo(a.dtype).tiny)
    decay = (since[:, :, :, None] - since[:, :, None]).to(a.dtype).clamp_(least, 0).exp_()
    if since.dim() == 4:  # [B, S, Q, Q, K]
        reached = decay * _repeat(b, S, 1)
        pairs = torch.einsum("bsrik,bsijk->bsrij", _repeat(a, S, 1), reached)
        return pairs.tril(diagonal).reshape(-1, rows * length, length)
    decay = decay.tril(diagonal)
    pairs = _pairs(a, b)
    product = pairs[:, :, None] * decay.unflatten(1, (pairs.shape[1], -1))[:, :, :, None]
    return product.reshape(-1, rows * length, length)


def _pairs(a: Tensor, b: Tensor) -> Tensor:
    """[B, h, R, Q, K] and [B, h, 1, Q, K] to [B, h, R, Q, Q], for the larger number of heads."""
    heads = max(a.shape[1], b.shape[1])
    a, b = _repeat(a, heads, 1), _repeat(b, heads, 1)
    return (a.flatten(2, 3) @ b[:, :, 0].mT).unflatten(2, a.shape[2:4])
