"""The Triton kernels of softmax attention, dense and by block plan: forward and backward.

One walk over keys serves all: *full* tiles need no element mask, *partial* ones do, and
*columns* are single gathered keys. With INDEX the tiles come from a block plan; without, from
the geometry of causal, window and chunk. Optional pointers are None, and the code for them is
not compiled. Heads that share keys may be packed in one tile (PACK), as decode does.
"""

from __future__ import annotations

import triton.language as tl

from rewriter.kernels.kernel import kernel

FULL_TILES, PARTIAL_TILES, COLUMN_TILES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@kernel
def walk(
    INDEX, COUNT, FULL, START, plan_row, b, first, last, offset, L, S, window, C,
    BLOCK_K: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SCATTERED: tl.constexpr,
):  # fmt: skip
    """Tiles that rows first..last visit: (full, partial, columns; low, left, right).

    Without a plan tile j begins at low + j BN; the full ones are left <= j < right.
    """
    columns = (C + BN - 1) // BN
    if INDEX is not None:
        full = tl.load(FULL + plan_row)
        partial = tl.load(COUNT + plan_row) - full
        return (
            (full * BLOCK_K + BN - 1) // BN, (partial * BLOCK_K + BN - 1) // BN,
            columns, full, 0, 0,
        )  # fmt: skip
    low, high = 0, S
    if not SCATTERED:
        if CAUSAL:
            high = tl.minimum(S, offset + last + 1)
        if WINDOW:
            low = tl.maximum(0, offset + first - window + 1)
            if not CAUSAL:
                high = tl.minimum(S, offset + last + window)
        if START is not None:
            low = tl.maximum(low, tl.load(START + b * L + first))
    low = low // BN * BN
    steps = tl.maximum((high - low + BN - 1) // BN, 0)
    left, right = 0, steps
    if SCATTERED or START is not None:
        right = left
    else:
        if WINDOW:
            left = tl.minimum(tl.maximum((offset + last - window - low + BN) // BN, 0), steps)
        if CAUSAL:
            right = tl.maximum(offset + first + 1 - low, 0) // BN
        elif WINDOW:
            right = tl.maximum(offset + first + window - low, 0) // BN
        right = tl.minimum(tl.maximum(right, left), steps)
    return right - left, steps - (right - left), columns, low, left, right


@kernel
def first_key(
    INDEX, plan_row, j, low, left, right, KMAX,
    MODE: tl.constexpr, BLOCK_K: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The first key of full or partial tile j, where tiles lie inside of blocks."""
    if INDEX is not None:
        skip = low if MODE == PARTIAL_TILES else 0  # low: how many full blocks come first
        block = tl.load(INDEX + plan_row * KMAX + skip + j // (BLOCK_K // BN))
        return tl.multiple_of(block * BLOCK_K + j % (BLOCK_K // BN) * BN, BN)
    if MODE != FULL_TILES:
        j = tl.where(j < left, j, j - left + right) - left
    return tl.multiple_of(low + (left + j) * BN, BN)


@kernel
def nth(
    INDEX, COLUMNS, plan_row, plan_head, j, listed, low, left, right, S, KMAX, C,
    MODE: tl.constexpr, BLOCK_K: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The keys [BN] of tile j of a mode; S where there is none. listed: the blocks of the mode."""
    i = tl.arange(0, BN)
    if MODE == COLUMN_TILES:
        n = tl.load(COLUMNS + plan_head * C + j * BN + i, mask=j * BN + i < C, other=-1)
        return tl.where(n < 0, S, n)
    if INDEX is not None:
        skip = low if MODE == PARTIAL_TILES else 0  # low: how many full blocks come first
        if BLOCK_K % BN == 0:
            return first_key(
                INDEX, plan_row, j, low, left, right, KMAX, MODE, BLOCK_K, BN
            ) + i  # fmt: skip
        e = j * BN + i
        block = tl.load(
            INDEX + plan_row * KMAX + skip + e // BLOCK_K, mask=e // BLOCK_K < listed, other=0
        )
        return tl.where(e // BLOCK_K < listed, block * BLOCK_K + e % BLOCK_K, S)
    return first_key(INDEX, plan_row, j, low, left, right, KMAX, MODE, BLOCK_K, BN) + i


@kernel
def scores(
    q, k, ok, row, head, n, pos_q, group_q, b, plan_head,
    KIND, DENSE, BIAS, KEY_BIAS, POS_K, GROUP_K, LISTED,
    dense_b, dense_h, dense_l, dense_s, bias_b, bias_h, bias_l, bias_s,
    scale, softcap, window, S, T, TK,
    MODE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits in base 2 [BM, BN], -inf where hidden, and tanh of the soft-cap.

    q: [BM, D], k: [D, BN]; row, head: [BM]; n: [BN].
    """
    inside = n < S
    s = tl.dot(q, k, input_precision=PRECISION) * scale
    bent = s
    if SOFTCAP:
        bent = 1 - 2 / (1 + tl.exp2(s * (2 * LOG2E / softcap)))
        s = softcap * bent
    keep = ok[:, None] & inside[None, :]
    if BIAS is not None:
        s += tl.load(
            BIAS + b * bias_b + head[:, None] * bias_h + row[:, None] * bias_l
            + n[None, :] * bias_s,
            mask=keep, other=0.0,
        ).to(tl.float32)  # fmt: skip
    if KEY_BIAS is not None:
        s += tl.load(KEY_BIAS + plan_head * S + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if KIND is not None:
        kind = tl.load(KIND + b * S + n, mask=inside, other=0)
        keep = keep & (kind > 0)[None, :]
    if DENSE is not None:
        keep = keep & (
            tl.load(
                DENSE + b * dense_b + head[:, None] * dense_h + row[:, None] * dense_l
                + n[None, :] * dense_s,
                mask=keep, other=0,
            ) != 0
        )  # fmt: skip
    if MODE != FULL_TILES:
        if POS_K is not None:
            pos_k = tl.load(POS_K + plan_head * S + n, mask=inside, other=0)
        else:
            pos_k = n
        distance = pos_q[:, None] - pos_k[None, :]
        if CAUSAL:
            keep = keep & (distance >= 0)
        if MODE == COLUMN_TILES:
            if LISTED is not None:
                block = (plan_head * T + row[:, None] // BLOCK_Q) * TK + n[None, :] // BLOCK_K
                keep = keep & (tl.load(LISTED + block, mask=keep, other=0) == 0)
            elif WINDOW:
                keep = keep & (tl.abs(distance) >= window)
        elif WINDOW:
            near = tl.abs(distance) < window
            if SINKS:
                near = near | (kind == 2)[None, :]
            keep = keep & near
        if GROUP_K is not None and (MODE == PARTIAL_TILES or LISTED is None):
            group_k = tl.load(GROUP_K + plan_head * S + n, mask=inside, other=0)
            keep = keep & (group_q[:, None] == group_k[None, :])
    return tl.where(keep, s * LOG2E, -float("inf")), bent


@kernel
def attend(
    Q, K, V, O, LSE, INDEX, COUNT, FULL, COLUMNS, LISTED, KIND, DENSE, BIAS, KEY_BIAS,
    POS_Q, POS_K, GROUP_Q, GROUP_K, SINK, START,
    q_b, q_h, q_l, k_b, k_h, k_s, v_b, v_h, v_s,
    dense_b, dense_h, dense_l, dense_s, bias_b, bias_h, bias_l, bias_s,
    scale, softcap, window, B, H, HK, HM, PLAN_B, L, S, T, TK, KMAX, C,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    ROWS: tl.constexpr, PACK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, SOFTCAP: tl.constexpr, SCATTERED: tl.constexpr, MODES: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """O and LSE of one tile of rows; grid (row tiles, B H / PACK, splits of the keys).

    O: [splits, B, L, H, DV], LSE: [splits, B, H, L]. EVEN: no tile of keys and no row of them
    needs a mask to stay inside. scale > 0.
    """
    # The last rows see most keys: they begin first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    unit, split = tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
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
    pos_q = row + S - L
    if POS_Q is not None:
        pos_q = tl.load(POS_Q + plan_head * L + row, mask=ok, other=0)
    group_q = row
    if GROUP_Q is not None:
        group_q = tl.load(GROUP_Q + plan_head * L + row, mask=ok, other=0)
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DVP], tl.float32)
    full, partial, columns, low, left, right = walk(
        INDEX, COUNT, FULL, START, plan_row, b, tile * ROWS,
        tl.minimum(tile * ROWS + ROWS, L) - 1, S - L, L, S, window, C,
        BLOCK_K, BN, CAUSAL, WINDOW, SCATTERED,
    )  # fmt: skip
    key = K + b.to(tl.int64) * k_b + hk * k_h
    value = V + b.to(tl.int64) * v_b + hk * v_h
    inside: tl.constexpr = INDEX is None or BLOCK_K % BN == 0
    per: tl.constexpr = BLOCK_K // BN
    for mode in tl.static_range(0, MODES):
        steps = full if mode == FULL_TILES else (partial if mode == PARTIAL_TILES else columns)
        listed = 0
        if INDEX is not None:
            listed = low if mode == FULL_TILES else tl.load(COUNT + plan_row) - low
        share = (steps + splits - 1) // splits
        begin, end = split * share, tl.minimum(steps, split * share + share)
        if inside and INDEX is not None and mode != COLUMN_TILES:
            blocks = INDEX + plan_row * KMAX + (0 if mode == FULL_TILES else low)
            # A step ahead of its use, so that no load of keys waits for it.
            block = tl.load(blocks + begin // per, mask=begin < end, other=0)
        for j in range(begin, end):
            if inside and mode != COLUMN_TILES:
                if INDEX is not None:
                    at = tl.multiple_of(block * BLOCK_K + j % per * BN, BN)
                    block = tl.load(blocks + (j + 1) // per, mask=j + 1 < end, other=0)
                else:
                    at = first_key(
                        INDEX, plan_row, j, low, left, right, KMAX, mode, BLOCK_K, BN
                    )  # fmt: skip
                n = at + tl.arange(0, BN)
            else:
                n = nth(
                    INDEX, COLUMNS, plan_row, plan_head, j, listed, low, left, right, S, KMAX, C,
                    mode, BLOCK_K, BN,
                )  # fmt: skip
            if EVEN and inside and mode != COLUMN_TILES:
                k = tl.load(key + n[None, :] * k_s + d[:, None])
            else:
                k = tl.load(
                    key + n[None, :] * k_s + d[:, None],
                    mask=(n < S)[None, :] & (d < D)[:, None], other=0.0,
                )  # fmt: skip
            plain: tl.constexpr = (
                EVEN and mode == FULL_TILES and not SOFTCAP and BIAS is None
                and KEY_BIAS is None and KIND is None and DENSE is None
            )  # fmt: skip
            if plain:  # nothing is hidden: one multiply-add an element takes the scale along
                s = tl.dot(q, k, input_precision=PRECISION)
                higher = tl.maximum(top, tl.max(s, 1) * (scale * LOG2E))
                safe = higher
                p = tl.exp2(s * (scale * LOG2E) - higher[:, None])
            else:
                s, _ = scores(
                    q, k, ok, row, head, n, pos_q, group_q, b, plan_head,
                    KIND, DENSE, BIAS, KEY_BIAS, POS_K, GROUP_K, LISTED,
                    dense_b, dense_h, dense_l, dense_s, bias_b, bias_h, bias_l, bias_s,
                    scale, softcap, window, S, T, TK,
                    mode, BLOCK_Q, BLOCK_K, CAUSAL, WINDOW, SINKS, SOFTCAP, PRECISION,
                )  # fmt: skip
                higher = tl.maximum(top, tl.max(s, 1))
                safe = tl.where(higher == -float("inf"), 0.0, higher)
                p = tl.exp2(s - safe[:, None])
            if EVEN and inside and mode != COLUMN_TILES:
                v = tl.load(value + n[:, None] * v_s + dv[None, :])
            else:
                v = tl.load(
                    value + n[:, None] * v_s + dv[None, :],
                    mask=(n < S)[:, None] & (dv < DV)[None, :], other=0.0,
                )  # fmt: skip
            kept = tl.exp2(top - safe)
            total = total * kept + tl.sum(p, 1)
            acc = acc * kept[:, None]
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
            top = higher
    if SINK is not None:
        sink = tl.load(SINK + head, mask=ok, other=0.0).to(tl.float32) * LOG2E
        higher = tl.maximum(top, sink)
        kept = tl.exp2(top - higher)
        total = total * kept + tl.exp2(sink - higher)
        acc = acc * kept[:, None]
        top = higher
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    place = (split * B + b).to(tl.int64)
    tl.store(
        O + ((place * L + row)[:, None] * H + head[:, None]) * DV + dv[None, :],
        acc.to(O.dtype.element_ty), mask=ok[:, None] & (dv < DV)[None, :],
    )  # fmt: skip
    lse = tl.where(total == 0.0, -float("inf"), top + tl.log2(tl.where(total == 0.0, 1.0, total)))
    tl.store(LSE + (place * H + head) * L + row, lse * LN2, mask=ok)


@kernel
def merge_splits(
    O, LSE, OUT, OUT_LSE, rows, H, L, splits, SINK,
    DV: tl.constexpr, BD: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    """Disjoint key sets: O [splits, B, L, H, DV] and LSE [splits, B, H, L] to one; rows = B L H.

    grid: (rows, tiles of DV).
    """
    r = tl.program_id(0)
    i, dv = tl.arange(0, MAX), tl.program_id(1) * BD + tl.arange(0, BD)
    b, l, h = r // (L * H), r // H % L, r % H
    place = (b * H + h) * L + l
    lse = tl.load(LSE + i * rows + place, mask=i < splits, other=-float("inf"))
    top = tl.max(lse, 0)
    if SINK is not None:
        sink = tl.load(SINK + h).to(tl.float32)
        top = tl.maximum(top, sink)
    safe = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.exp2((lse - safe) * LOG2E)
    total = tl.sum(weight, 0)
    if SINK is not None:
        total += tl.exp2((sink - safe) * LOG2E)
    some = tl.where(total == 0.0, 1.0, total)
    part = tl.load(
        O + (i.to(tl.int64) * rows + r)[:, None] * DV + dv[None, :],
        mask=(i < splits)[:, None] & (dv < DV)[None, :], other=0.0,
    )  # fmt: skip
    made = tl.sum(part.to(tl.float32) * (weight / some)[:, None], 0)
    tl.store(OUT + r.to(tl.int64) * DV + dv, made.to(OUT.dtype.element_ty), mask=dv < DV)
    result = tl.where(total == 0.0, -float("inf"), safe + tl.log2(some) * LN2)
    tl.store(OUT_LSE + place, result)
