"""Backward of `flash.attend`: gradients of queries (and bias), and of keys, values, key bias."""

from __future__ import annotations

import triton.language as tl

from rewriter.kernels.attention.flash import (
    COLUMN_TILES,
    FULL_TILES,
    LOG2E,
    PARTIAL_TILES,
    nth,
    scores,
    walk,
)
from rewriter.kernels.kernel import kernel


@kernel
def slope(s, lse, bent, dp, delta, SOFTCAP: tl.constexpr):
    """Softmax weights, and gradients of the logits after and before the soft-cap."""
    p = tl.exp2(s - lse[:, None])
    ds = p * (dp - delta[:, None])
    raw = ds
    if SOFTCAP:
        raw = ds * (1 - bent * bent)
    return p, ds, raw


@kernel
def attend_dq(
    Q, K, V, DO, LSE, DELTA, DQ, DBIAS,
    INDEX, COUNT, FULL, COLUMNS, LISTED, KIND, DENSE, BIAS, KEY_BIAS,
    POS_Q, POS_K, GROUP_Q, GROUP_K, START,
    q_b, q_h, q_l, k_b, k_h, k_s, v_b, v_h, v_s,
    dense_b, dense_h, dense_l, dense_s, bias_b, bias_h, bias_l, bias_s,
    dbias_b, dbias_h, dbias_l, dbias_s,
    scale, softcap, window, H, HK, HM, PLAN_B, L, S, T, TK, KMAX, C,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    ROWS: tl.constexpr, PACK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, SOFTCAP: tl.constexpr, SCATTERED: tl.constexpr, MODES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The walk of `attend` again. DO: [B, L, H, DV]; LSE, DELTA: [B, H, L]; DQ: [B, H, L, D]."""
    tile, unit = tl.program_id(0), tl.program_id(1)
    b = unit // (H // PACK)
    h0 = unit % (H // PACK) * PACK
    hk = h0 // (H // HK)
    plan_head = b * PLAN_B * HM + h0 // (H // HM)
    r, d, dv = tl.arange(0, BM), tl.arange(0, DP), tl.arange(0, DVP)
    row, head = tile * ROWS + r // PACK, h0 + r % PACK
    ok = (r < ROWS * PACK) & (row < L)
    plan_row = plan_head * T + tile * ROWS // BLOCK_Q
    q = tl.load(
        Q + b.to(tl.int64) * q_b + head[:, None] * q_h + row[:, None] * q_l + d[None, :],
        mask=ok[:, None] & (d < D)[None, :], other=0.0,
    )  # fmt: skip
    do = tl.load(
        DO + ((b.to(tl.int64) * L + row)[:, None] * H + head[:, None]) * DV + dv[None, :],
        mask=ok[:, None] & (dv < DV)[None, :], other=0.0,
    )  # fmt: skip
    side = (b * H + head) * L + row
    lse = tl.load(LSE + side, mask=ok, other=0.0) * LOG2E
    lse = tl.where(lse == -float("inf"), 0.0, lse)
    delta = tl.load(DELTA + side, mask=ok, other=0.0)
    pos_q = row + S - L
    if POS_Q is not None:
        pos_q = tl.load(POS_Q + plan_head * L + row, mask=ok, other=0)
    group_q = row
    if GROUP_Q is not None:
        group_q = tl.load(GROUP_Q + plan_head * L + row, mask=ok, other=0)
    acc = tl.zeros([BM, DP], tl.float32)
    full, partial, columns, low, left, right = walk(
        INDEX, COUNT, FULL, START, plan_row, b, tile * ROWS,
        tl.minimum(tile * ROWS + ROWS, L) - 1, S - L, L, S, window, C,
        BLOCK_K, BN, CAUSAL, WINDOW, SCATTERED,
    )  # fmt: skip
    key = K + b.to(tl.int64) * k_b + hk * k_h
    value = V + b.to(tl.int64) * v_b + hk * v_h
    for mode in tl.static_range(0, MODES):
        steps = full if mode == FULL_TILES else (partial if mode == PARTIAL_TILES else columns)
        listed = 0
        if INDEX is not None:
            listed = low if mode == FULL_TILES else tl.load(COUNT + plan_row) - low
        for j in range(0, steps):
            n = nth(
                INDEX, COLUMNS, plan_row, plan_head, j, listed, low, left, right, S, KMAX, C,
                mode, BLOCK_K, BN,
            )  # fmt: skip
            k = tl.load(
                key + n[:, None] * k_s + d[None, :],
                mask=(n < S)[:, None] & (d < D)[None, :], other=0.0,
            )  # fmt: skip
            s, bent = scores(
                q, tl.trans(k), ok, row, head, n, pos_q, group_q, b, plan_head,
                KIND, DENSE, BIAS, KEY_BIAS, POS_K, GROUP_K, LISTED,
                dense_b, dense_h, dense_l, dense_s, bias_b, bias_h, bias_l, bias_s,
                scale, softcap, window, S, T, TK,
                mode, BLOCK_Q, BLOCK_K, CAUSAL, WINDOW, SINKS, SOFTCAP, PRECISION,
            )  # fmt: skip
            v = tl.load(
                value + n[None, :] * v_s + dv[:, None],
                mask=(n < S)[None, :] & (dv < DV)[:, None], other=0.0,
            )  # fmt: skip
            dp = tl.dot(do, v, input_precision=PRECISION)
            _, ds, raw = slope(s, lse, bent, dp, delta, SOFTCAP)
            if DBIAS is not None:
                tl.atomic_add(
                    DBIAS + b * dbias_b + head[:, None] * dbias_h + row[:, None] * dbias_l
                    + n[None, :] * dbias_s,
                    ds, mask=ok[:, None] & (n < S)[None, :],
                )  # fmt: skip
            acc = tl.dot(raw.to(k.dtype), k, acc, input_precision=PRECISION)
    tl.store(
        DQ + ((b.to(tl.int64) * H + head) * L + row)[:, None] * D + d[None, :],
        (acc * scale).to(DQ.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :],
    )  # fmt: skip


@kernel
def attend_dkv(
    Q, K, V, DO, LSE, DELTA, DK, DV_, DKEY_BIAS,
    ROW_BLOCKS, SPANS, COLUMNS, LISTED, KIND, DENSE, BIAS, KEY_BIAS,
    POS_Q, POS_K, GROUP_Q, GROUP_K, STOP,
    q_b, q_h, q_l, k_b, k_h, k_s, v_b, v_h, v_s,
    dense_b, dense_h, dense_l, dense_s, bias_b, bias_h, bias_l, bias_s,
    scale, softcap, window, H, HK, HM, PLAN_B, L, S, T, TK, C,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, SOFTCAP: tl.constexpr, SCATTERED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys against all rows that see it; grid (key tiles, B H / HEADS).

    HEADS: query heads that share the keys here. KEYS: keys of a tile, at most BN. With SPANS
    (int32 [Bm, Hm, TK, 2] and one more) the rows are blocks ROW_BLOCKS[from : to], first those
    that see all of the block. With COLUMNS the keys are single ones and the results are added.
    DK, DV_: [B, HK, S, D]; DKEY_BIAS: [B, H, S].
    """
    tile, unit = tl.program_id(0), tl.program_id(1)
    b = unit // (H // HEADS)
    h0 = unit % (H // HEADS) * HEADS
    hk = h0 // (H // HK)
    i, d, dv = tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, DVP)
    if COLUMNS is not None:
        here = b * PLAN_B * HM + h0 // (H // HM)
        n = tl.load(COLUMNS + here * C + tile * BN + i, mask=tile * BN + i < C, other=-1)
        n = tl.where(n < 0, S, n)
    else:
        n = tl.where(i < KEYS, tile * KEYS + i, S)
    held = (n < S)[:, None]
    k = tl.load(
        K + b.to(tl.int64) * k_b + hk * k_h + n[:, None] * k_s + d[None, :],
        mask=held & (d < D)[None, :], other=0.0,
    )  # fmt: skip
    v = tl.load(
        V + b.to(tl.int64) * v_b + hk * v_h + n[:, None] * v_s + dv[None, :],
        mask=held & (dv < DV)[None, :], other=0.0,
    )  # fmt: skip
    dk, dvalue = tl.zeros([BN, DP], tl.float32), tl.zeros([BN, DVP], tl.float32)
    low, high = 0, L
    if SPANS is None and COLUMNS is None and not SCATTERED:
        offset = S - L
        end = tl.minimum(tile * KEYS + KEYS, S)
        if CAUSAL:
            low = tl.maximum(0, tile * KEYS - offset)
        if WINDOW:
            reach = tl.minimum(L, end - 1 + window - offset)
            start = 0 if CAUSAL else tl.maximum(0, tile * KEYS - window + 1 - offset)
            if SINKS:
                kind = tl.load(KIND + b * S + n, mask=n < S, other=0)
                free = tl.max(kind, 0) == 2
                reach = tl.where(free, L, reach)
                start = tl.where(free, 0, start)
            high = tl.minimum(high, reach)
            low = tl.maximum(low, start)
        if STOP is not None:
            high = tl.minimum(high, tl.load(STOP + b * S + end - 1))
    for g in range(0, HEADS):
        h = h0 + g
        plan_head = b * PLAN_B * HM + h // (H // HM)
        bias_sum = tl.zeros([BN], tl.float32)
        for mode in tl.static_range(0, 3):
            steps = 0
            begin = 0
            blocks = 0
            if SPANS is not None:
                if mode < COLUMN_TILES:
                    span = SPANS + (plan_head * TK + tile * KEYS // BLOCK_K) * 2 + mode
                    begin = tl.load(span)
                    blocks = tl.load(span + 1) - begin
                    steps = (blocks * BLOCK_Q + BM - 1) // BM
            elif COLUMNS is not None:
                if mode == COLUMN_TILES:
                    steps = (L + BM - 1) // BM
            elif mode == PARTIAL_TILES:
                steps = (high - low + BM - 1) // BM
            for j in range(0, steps):
                e = j * BM + tl.arange(0, BM)
                if SPANS is not None:
                    if BLOCK_Q % BM == 0:
                        block = tl.load(ROW_BLOCKS + begin + j // (BLOCK_Q // BM))
                        row = block * BLOCK_Q + e % BLOCK_Q
                    else:
                        real = e // BLOCK_Q < blocks
                        block = tl.load(ROW_BLOCKS + begin + e // BLOCK_Q, mask=real, other=0)
                        row = tl.where(real, block * BLOCK_Q + e % BLOCK_Q, L)
                else:
                    row = low + e
                ok = row < L
                head = tl.full([BM], 0, tl.int32) + h
                q = tl.load(
                    Q + b.to(tl.int64) * q_b + h * q_h + row[:, None] * q_l + d[None, :],
                    mask=ok[:, None] & (d < D)[None, :], other=0.0,
                )  # fmt: skip
                do = tl.load(
                    DO + ((b.to(tl.int64) * L + row)[:, None] * H + h) * DV + dv[None, :],
                    mask=ok[:, None] & (dv < DV)[None, :], other=0.0,
                )  # fmt: skip
                side = (b * H + h) * L + row
                lse = tl.load(LSE + side, mask=ok, other=0.0) * LOG2E
                lse = tl.where(lse == -float("inf"), 0.0, lse)
                delta = tl.load(DELTA + side, mask=ok, other=0.0)
                pos_q = row + S - L
                if POS_Q is not None:
                    pos_q = tl.load(POS_Q + plan_head * L + row, mask=ok, other=0)
                group_q = row
                if GROUP_Q is not None:
                    group_q = tl.load(GROUP_Q + plan_head * L + row, mask=ok, other=0)
                s, bent = scores(
                    q, tl.trans(k), ok, row, head, n, pos_q, group_q, b, plan_head,
                    KIND, DENSE, BIAS, KEY_BIAS, POS_K, GROUP_K, LISTED,
                    dense_b, dense_h, dense_l, dense_s, bias_b, bias_h, bias_l, bias_s,
                    scale, softcap, window, S, T, TK,
                    mode, BLOCK_Q, BLOCK_K, CAUSAL, WINDOW, SINKS, SOFTCAP, PRECISION,
                )  # fmt: skip
                dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                p, ds, raw = slope(s, lse, bent, dp, delta, SOFTCAP)
                dvalue = tl.dot(tl.trans(p.to(do.dtype)), do, dvalue, input_precision=PRECISION)
                dk = tl.dot(tl.trans(raw.to(q.dtype)), q, dk, input_precision=PRECISION)
                if DKEY_BIAS is not None:
                    bias_sum += tl.sum(ds, 0)
        if DKEY_BIAS is not None:
            place = DKEY_BIAS + (b * H + h) * S + n
            if COLUMNS is not None:
                tl.atomic_add(place, bias_sum, mask=n < S)
            else:
                tl.store(place, bias_sum, mask=n < S)
    place = (b.to(tl.int64) * HK + hk) * S + n
    at_k = DK + place[:, None] * D + d[None, :]
    at_v = DV_ + place[:, None] * DV + dv[None, :]
    if COLUMNS is not None:
        tl.atomic_add(at_k, dk * scale, mask=held & (d < D)[None, :])
        tl.atomic_add(at_v, dvalue, mask=held & (dv < DV)[None, :])
    else:
        tl.store(at_k, (dk * scale).to(DK.dtype.element_ty), mask=held & (d < D)[None, :])
        tl.store(at_v, dvalue.to(DV_.dtype.element_ty), mask=held & (dv < DV)[None, :])
