"""One token after another with the state in registers: decoding, and every transition there is."""

from __future__ import annotations

import triton.language as tl

from rewriter.kernels.kernel import kernel


@kernel
def recurrent(
    Q, K, V, G, BETA, GAIN, SKIP, S0, Y, FINAL,
    T, states, rows, width_k, width_v, per_q, per_k, per_v, scale,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, state_k, state_v,
    DECAY: tl.constexpr, HAS_BETA: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_SKIP: tl.constexpr,
    HAS_STATE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """grid: (tiles of V, B S). BK >= K.

    G: float32 [B, T, S] with DECAY 1, [B, T, S, K] with DECAY 2; BETA, GAIN: float32 [B, T, S].
    state_k, state_v: strides of a state, [K, V] or (Mamba-2) [V, K].
    """
    bs = tl.program_id(1).to(tl.int64)
    b, s = bs // states, bs % states
    heads = states * rows
    rk = tl.arange(0, BK)
    rv = tl.program_id(0) * BV + tl.arange(0, BV)
    in_k, in_v = rk < width_k, rv < width_v
    tile = rk[:, None] * state_k + rv[None, :] * state_v
    base = bs * width_k * width_v
    inside = in_k[:, None] & in_v[None, :]
    if HAS_STATE:
        state = tl.load(S0 + base + tile, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BK, BV], tl.float32)
    q_base = Q + b * qb + rk
    k_at = K + b * kb + (s // per_k) * kh + rk
    v_at = V + b * vb + (s // per_v) * vh + rv
    for t in range(0, T):
        row = (b * T + t) * states + s
        k = tl.load(k_at, mask=in_k, other=0.0).to(tl.float32)
        v = tl.load(v_at, mask=in_v, other=0.0).to(tl.float32)
        new = v
        if DECAY == 1:
            state = state * tl.exp(tl.load(G + row))
        if DECAY == 2:
            g = tl.load(G + row * width_k + rk, mask=in_k, other=0.0)
            state = state * tl.exp(g)[:, None]
        if HAS_BETA:
            new = tl.load(BETA + row) * (v - tl.sum(state * k[:, None], 0))
        if HAS_GAIN:
            new = new * tl.load(GAIN + row)
        state += k[:, None] * new[None, :]
        for r in range(0, rows):
            h = s * rows + r
            q = tl.load(q_base + (h // per_q) * qh, mask=in_k, other=0.0).to(tl.float32)
            y = tl.sum(state * q[:, None], 0) * scale
            if HAS_SKIP:
                y += tl.load(SKIP + h).to(tl.float32) * v
            where = Y + ((b * T + t) * heads + h) * width_v + rv
            tl.store(where, y.to(Y.dtype.element_ty), mask=in_v)
        q_base += qt
        k_at += kt
        v_at += vt
    tl.store(FINAL + base + tile, state, mask=inside)
