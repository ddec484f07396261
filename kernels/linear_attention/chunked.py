"""Triton kernels of linear attention with one decay a head (or none), parallel over chunks.

Forward: `enter_states` walks over the chunks with a tile of the state in registers and writes the
state that enters each; `outputs` makes every chunk's y from it. Backward: `leave_gradients` walks
back with the gradient of the state that leaves each chunk; `query_key_gradients` and
`value_gradients` are again parallel over chunks. In all of them

    y_i = scale (sum_{j <= i} (q_i . k_j) e^(G_i - G_j) w_j v_j + e^(G_i) q_i S) + d v_i

with S the entering state, G the sum of log decays since the chunk began and w the gain.
Head h of the H outputs belongs to state s = h // rows; q, k and v have their own head counts.
G and GAIN are float32 [B, S, chunks * BT], the states [B, S, chunks, K, V].
"""

from __future__ import annotations

import triton.language as tl

from rewriter.kernels.kernel import kernel


@kernel
def chunk_sums(
    X, G, T, chunks, heads, per_x, xb, xt, xh, LEAST: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """G: sums of max(X, LEAST) since the chunk began; grid: (chunks, B S).

    The other kernels take differences of these sums, so they are added in float64.
    """
    c, bs = tl.program_id(0), tl.program_id(1)
    b, s = (bs // heads).to(tl.int64), bs % heads
    t = c * BT + tl.arange(0, BT)
    x = tl.load(X + b * xb + t * xt + s // per_x * xh, mask=t < T, other=0.0)
    total = tl.cumsum(tl.maximum(x, LEAST).to(tl.float64), 0)
    tl.store(G + bs.to(tl.int64) * chunks * BT + t, total.to(tl.float32))


@kernel
def enter_states(
    K, V, G, GAIN, S0, ENTER, FINAL,
    T, chunks, heads, width_k, width_v, per_k, per_v, kb, kt, kh, vb, vt, vh,
    HAS_DECAY: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_STATE: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid: (tiles of K, tiles of V, B S)."""
    bs = tl.program_id(2).to(tl.int64)
    b, s = bs // heads, bs % heads
    rk = tl.program_id(0) * BK + tl.arange(0, BK)
    rv = tl.program_id(1) * BV + tl.arange(0, BV)
    rt = tl.arange(0, BT)
    in_k, in_v = rk < width_k, rv < width_v
    tile = rk[:, None] * width_v + rv[None, :]
    inside = in_k[:, None] & in_v[None, :]
    size = width_k * width_v
    if HAS_STATE:
        state = tl.load(S0 + bs * size + tile, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BK, BV], tl.float32)
    k_base = K + b * kb + (s // per_k) * kh + rk[:, None]
    v_base = V + b * vb + (s // per_v) * vh + rv[None, :]
    enter = ENTER + bs * chunks * size + tile
    row = bs * chunks * BT
    for c in range(0, chunks):
        tl.store(enter, state.to(ENTER.dtype.element_ty), mask=inside)
        enter += size
        t = c * BT + rt
        k = tl.load(k_base + t[None, :] * kt, mask=in_k[:, None] & (t < T)[None, :], other=0.0)
        v = tl.load(v_base + t[:, None] * vt, mask=(t < T)[:, None] & in_v[None, :], other=0.0)
        if HAS_DECAY:
            total = tl.load(G + row + c * BT + BT - 1)
            state = state * tl.exp(total)
            v = (v * tl.exp(total - tl.load(G + row + t))[:, None]).to(K.dtype.element_ty)
        if HAS_GAIN:
            v = (v * tl.load(GAIN + row + t)[:, None]).to(K.dtype.element_ty)
        state = tl.dot(k, v, state, input_precision=PRECISION)
    tl.store(FINAL + bs * size + tile, state, mask=inside)


@kernel
def outputs(
    Q, K, V, G, GAIN, SKIP, ENTER, Y,
    T, chunks, heads, rows, width_k, width_v, per_q, per_k, per_v, scale,
    qb, qt, qh, kb, kt, kh, vb, vt, vh,
    HAS_DECAY: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_SKIP: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid: (tiles of V, chunks, B H); heads is H."""
    c = tl.program_id(1)
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // heads, bh % heads
    bs, s = bh // rows, h // rows
    rt = tl.arange(0, BT)
    t = c * BT + rt
    real = t < T
    rv = tl.program_id(0) * BV + tl.arange(0, BV)
    in_v = rv < width_v
    q_base = Q + b * qb + (h // per_q) * qh + t[:, None] * qt
    k_base = K + b * kb + (s // per_k) * kh + t[None, :] * kt
    enter = ENTER + (bs * chunks + c) * width_k * width_v
    scores = tl.zeros([BT, BT], tl.float32)
    y = tl.zeros([BT, BV], tl.float32)
    for start in range(0, width_k, BK):
        rk = start + tl.arange(0, BK)
        in_k = rk < width_k
        q = tl.load(q_base + rk[None, :], mask=real[:, None] & in_k[None, :], other=0.0)
        k = tl.load(k_base + rk[:, None], mask=in_k[:, None] & real[None, :], other=0.0)
        state = tl.load(enter + rk[:, None] * width_v + rv[None, :],
                        mask=in_k[:, None] & in_v[None, :], other=0.0)  # fmt: skip
        scores = tl.dot(q, k, scores, input_precision=PRECISION)
        y = tl.dot(q, state, y, input_precision=PRECISION)
    v = tl.load(V + b * vb + (s // per_v) * vh + t[:, None] * vt + rv[None, :],
                mask=real[:, None] & in_v[None, :], other=0.0)  # fmt: skip
    earlier = rt[:, None] >= rt[None, :]
    row = (bs * chunks + c) * BT
    if HAS_DECAY:
        g = tl.load(G + row + rt)
        y = y * tl.exp(g)[:, None]
        scores = scores * tl.exp(tl.where(earlier, g[:, None] - g[None, :], 0.0))
    if HAS_GAIN:
        scores = scores * tl.load(GAIN + row + rt)[None, :]
    scores = tl.where(earlier, scores, 0.0).to(V.dtype.element_ty)
    y = tl.dot(scores, v, y, input_precision=PRECISION) * scale
    if HAS_SKIP:
        y += tl.load(SKIP + h).to(tl.float32) * v.to(tl.float32)
    where = Y + ((b * T + t[:, None]) * heads + h) * width_v + rv[None, :]
    tl.store(where, y.to(Y.dtype.element_ty), mask=real[:, None] & in_v[None, :])


@kernel
def leave_gradients(
    Q, DY, G, DFINAL, LEAVE, DS0,
    T, chunks, states, rows, width_k, width_v, per_q, scale, qb, qt, qh,
    HAS_DECAY: tl.constexpr, HAS_FINAL: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid: (tiles of K, tiles of V, B S). LEAVE: the gradient of the state after each chunk."""
    bs = tl.program_id(2).to(tl.int64)
    b, s = bs // states, bs % states
    heads = states * rows
    rk = tl.program_id(0) * BK + tl.arange(0, BK)
    rv = tl.program_id(1) * BV + tl.arange(0, BV)
    rt = tl.arange(0, BT)
    in_k, in_v = rk < width_k, rv < width_v
    tile = rk[:, None] * width_v + rv[None, :]
    inside = in_k[:, None] & in_v[None, :]
    size = width_k * width_v
    if HAS_FINAL:
        dstate = tl.load(DFINAL + bs * size + tile, mask=inside, other=0.0).to(tl.float32)
    else:
        dstate = tl.zeros([BK, BV], tl.float32)
    row = bs * chunks * BT
    for back in range(0, chunks):
        c = chunks - 1 - back
        where = LEAVE + (bs * chunks + c) * size + tile
        tl.store(where, dstate.to(LEAVE.dtype.element_ty), mask=inside)
        t = c * BT + rt
        real = t < T
        if HAS_DECAY:
            dstate = dstate * tl.exp(tl.load(G + row + c * BT + BT - 1))
            reached = tl.exp(tl.load(G + row + t)) * scale
        else:
            reached = tl.full([BT], 1.0, tl.float32) * scale
        for r in range(0, rows):
            h = s * rows + r
            q = tl.load(Q + b * qb + (h // per_q) * qh + t[None, :] * qt + rk[:, None],
                        mask=in_k[:, None] & real[None, :], other=0.0)  # fmt: skip
            dy = tl.load(DY + ((b * T + t[:, None]) * heads + h) * width_v + rv[None, :],
                         mask=real[:, None] & in_v[None, :], other=0.0)  # fmt: skip
            dy = (dy * reached[:, None]).to(Q.dtype.element_ty)
            dstate = tl.dot(q, dy, dstate, input_precision=PRECISION)
    tl.store(DS0 + bs * size + tile, dstate, mask=inside)


@kernel
def query_key_gradients(
    Q, K, V, DY, G, GAIN, ENTER, LEAVE, DQ, DK, DG,
    T, chunks, heads, rows, width_k, width_v, per_q, per_k, per_v, scale,
    qb, qt, qh, kb, kt, kh, vb, vt, vh,
    HAS_DECAY: tl.constexpr, HAS_GAIN: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid: (tiles of K, chunks, B H). DQ, DK: [B, T, H, K]; DG: [tiles of K, B H, chunks BT]."""
    c = tl.program_id(1)
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // heads, bh % heads
    bs, s = bh // rows, h // rows
    rt = tl.arange(0, BT)
    t = c * BT + rt
    real = t < T
    rk = tl.program_id(0) * BK + tl.arange(0, BK)
    in_k = rk < width_k
    v_base = V + b * vb + (s // per_v) * vh + t[:, None] * vt
    dy_base = DY + ((b * T + t[:, None]) * heads + h) * width_v
    place = (bs * chunks + c) * width_k * width_v + rk[None, :] * width_v
    pairs = tl.zeros([BT, BT], tl.float32)
    dq = tl.zeros([BT, BK], tl.float32)
    dk = tl.zeros([BT, BK], tl.float32)
    for start in range(0, width_v, BV):
        rv = start + tl.arange(0, BV)
        in_v = rv < width_v
        both = real[:, None] & in_v[None, :]
        dy = tl.load(dy_base + rv[None, :], mask=both, other=0.0)
        v = tl.load(v_base + rv[None, :], mask=both, other=0.0)
        state_mask = in_v[:, None] & in_k[None, :]
        state = tl.load(ENTER + place + rv[:, None], mask=state_mask, other=0.0)
        dstate = tl.load(LEAVE + place + rv[:, None], mask=state_mask, other=0.0)
        pairs = tl.dot(dy, tl.trans(v), pairs, input_precision=PRECISION)
        dq = tl.dot(dy, state, dq, input_precision=PRECISION)
        dk = tl.dot(v, dstate, dk, input_precision=PRECISION)
    earlier = rt[:, None] >= rt[None, :]
    row = (bs * chunks + c) * BT
    first = (h % rows == 0).to(tl.float32)  # queries that share a state share its gradient: once
    dq = dq * scale
    dk = dk * first
    pairs = pairs * scale
    if HAS_DECAY:
        g = tl.load(G + row + rt)
        total = tl.load(G + row + BT - 1)
        dq = dq * tl.exp(g)[:, None]
        dk = dk * tl.exp(total - g)[:, None]
        pairs = pairs * tl.exp(tl.where(earlier, g[:, None] - g[None, :], 0.0))
    if HAS_GAIN:
        gain = tl.load(GAIN + row + rt)
        dk = dk * gain[:, None]
        pairs = pairs * gain[None, :]
    pairs = tl.where(earlier, pairs, 0.0)
    inside = real[:, None] & in_k[None, :]
    q = tl.load(Q + b * qb + (h // per_q) * qh + t[:, None] * qt + rk[None, :],
                mask=inside, other=0.0)  # fmt: skip
    k = tl.load(K + b * kb + (s // per_k) * kh + t[:, None] * kt + rk[None, :],
                mask=inside, other=0.0)  # fmt: skip
    if HAS_DECAY:
        # q . dq - k . dk, without the pairs (i, i): no decay lies between them, and their equal
        # shares of both sums would cancel with a rounding error larger than what is left.
        dg = tl.sum(q.to(tl.float32) * dq - k.to(tl.float32) * dk, 1)
        share = pairs * tl.dot(q, tl.trans(k), input_precision=PRECISION)
        share = tl.where(rt[:, None] > rt[None, :], share, 0.0)
        dg += tl.sum(share, 1) - tl.sum(share, 0)
        batches = tl.num_programs(2)
        tl.store(DG + ((tl.program_id(0) * batches + bh) * chunks + c) * BT + rt, dg)
    pairs = pairs.to(K.dtype.element_ty)
    dq = tl.dot(pairs, k, dq, input_precision=PRECISION)
    dk = tl.dot(tl.trans(pairs), q, dk, input_precision=PRECISION)
    where = ((b * T + t[:, None]) * heads + h) * width_k + rk[None, :]
    tl.store(DQ + where, dq.to(DQ.dtype.element_ty), mask=inside)
    tl.store(DK + where, dk.to(DK.dtype.element_ty), mask=inside)


@kernel
def value_gradients(
    Q, K, V, DY, G, GAIN, SKIP, LEAVE, DV, DGAIN,
    T, chunks, heads, rows, width_k, width_v, per_q, per_k, per_v, scale,
    qb, qt, qh, kb, kt, kh, vb, vt, vh,
    HAS_DECAY: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_SKIP: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid: (tiles of V, chunks, B H). DV: [B, T, H, V]; DGAIN: [tiles of V, B H, chunks BT]."""
    c = tl.program_id(1)
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // heads, bh % heads
    bs, s = bh // rows, h // rows
    rt = tl.arange(0, BT)
    t = c * BT + rt
    real = t < T
    rv = tl.program_id(0) * BV + tl.arange(0, BV)
    in_v = rv < width_v
    q_base = Q + b * qb + (h // per_q) * qh + t[None, :] * qt
    k_base = K + b * kb + (s // per_k) * kh + t[:, None] * kt
    leave = LEAVE + (bs * chunks + c) * width_k * width_v
    scores = tl.zeros([BT, BT], tl.float32)  # [j, i]: transposed
    dv = tl.zeros([BT, BV], tl.float32)
    for start in range(0, width_k, BK):
        rk = start + tl.arange(0, BK)
        in_k = rk < width_k
        q = tl.load(q_base + rk[:, None], mask=in_k[:, None] & real[None, :], other=0.0)
        k = tl.load(k_base + rk[None, :], mask=real[:, None] & in_k[None, :], other=0.0)
        dstate = tl.load(leave + rk[:, None] * width_v + rv[None, :],
                         mask=in_k[:, None] & in_v[None, :], other=0.0)  # fmt: skip
        scores = tl.dot(k, q, scores, input_precision=PRECISION)
        dv = tl.dot(k, dstate, dv, input_precision=PRECISION)
    later = rt[:, None] <= rt[None, :]
    row = (bs * chunks + c) * BT
    dv = dv * (h % rows == 0).to(tl.float32)
    scores = scores * scale
    if HAS_DECAY:
        g = tl.load(G + row + rt)
        dv = dv * tl.exp(tl.load(G + row + BT - 1) - g)[:, None]
        scores = scores * tl.exp(tl.where(later, g[None, :] - g[:, None], 0.0))
    scores = tl.where(later, scores, 0.0).to(K.dtype.element_ty)
    where = ((b * T + t[:, None]) * heads + h) * width_v + rv[None, :]
    inside = real[:, None] & in_v[None, :]
    dy = tl.load(DY + where, mask=inside, other=0.0)
    dv = tl.dot(scores, dy, dv, input_precision=PRECISION)
    if HAS_GAIN:
        v = tl.load(V + b * vb + (s // per_v) * vh + t[:, None] * vt + rv[None, :],
                    mask=inside, other=0.0)  # fmt: skip
        batches = tl.num_programs(2)
        at = ((tl.program_id(0) * batches + bh) * chunks + c) * BT + rt
        tl.store(DGAIN + at, tl.sum(v.to(tl.float32) * dv, 1))
        dv = dv * tl.load(GAIN + row + rt)[:, None]
    if HAS_SKIP:
        dv += tl.load(SKIP + h).to(tl.float32) * dy.to(tl.float32)
    tl.store(DV + where, dv.to(DV.dtype.element_ty), mask=inside)
