"""`hybrid_attention` on a GPU: one kernel for the states between blocks, one for the outputs.

Tokens are laid out in blocks by the torch form, and one-token steps run it too. Gradients are
those of the torch form, from the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rewriter.kernels.attention.launch import launch, recording
from rewriter.kernels.autograd import _recompute
from rewriter.kernels.hybrid_attention import cpu
from rewriter.kernels.hybrid_attention.compute import Options, far_mass_log
from rewriter.kernels.kernel import Compilation, kernel

__all__ = ["backward", "compilations", "forward"]

REFERENCES = {"none": 0, "max": 1, "mean": 2}


@kernel
def enter_states(
    features, values, far_value, far_mass, states, masses,
    G, HK, C, W, F, DV,
    BF: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum of φ_k vᵀ and of φ_k as it enters every block of queries; one program a tile."""
    bg = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    d = tl.program_id(2) * BV + tl.arange(0, BV)
    batch, group = bg // G, bg % G
    head = batch * HK + group // (G // HK)
    inside = (f[:, None] < F) & (d[None, :] < DV)
    at = f[:, None] * DV + d[None, :]
    state = tl.load(far_value + bg * F * DV + at, mask=inside, other=0.0)
    mass = tl.load(far_mass + bg * F + f, mask=f < F, other=0.0)
    for c in range(0, C + 1):
        tl.store(states + (bg * (C + 1) + c) * F * DV + at, state, mask=inside)
        if tl.program_id(2) == 0:
            tl.store(masses + (bg * (C + 1) + c) * F + f, mass, mask=f < F)
        if c < C:
            for n in range(0, W, BN):
                row = n + tl.arange(0, BN)
                token = c * W + row
                phi = tl.load(
                    features + (bg * (C + 1) * W + token[:, None]) * F + f[None, :],
                    mask=(row[:, None] < W) & (f[None, :] < F), other=0.0,
                )  # fmt: skip
                v = tl.load(
                    values + (head * (C + 1) * W + token[:, None]) * DV + d[None, :],
                    mask=(row[:, None] < W) & (d[None, :] < DV), other=0.0,
                )  # fmt: skip
                state += tl.dot(tl.trans(phi), v, input_precision=PRECISION)
                mass += tl.sum(phi.to(tl.float32), 0)


@kernel
def outputs(
    q, k, v, fq, fk, far_log, sink_k, sink_v, states, masses, first, y,
    H, HK, G, C, W, D, F, DV, SINKS, scale,
    ALIGNED: tl.constexpr, REFERENCE: tl.constexpr, HAS_SINKS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
    BS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BM queries of one block and head: window, sinks and far tokens under one normaliser."""
    tiles = tl.cdiv(W, BM)
    c, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    bh = tl.program_id(1).to(tl.int64)
    batch, head = bh // H, bh % H
    kv, group = batch * HK + head // (H // HK), batch * G + head // (H // G)
    row = tile * BM + tl.arange(0, BM)  # in the block
    d, dv = tl.arange(0, BD), tl.arange(0, BV)
    token = bh * C * W + c * W + row
    real = row < W
    query = tl.load(
        q + token[:, None] * D + d[None, :], mask=real[:, None] & (d[None, :] < D), other=0.0
    )
    zero = tl.load(first + batch)  # rank of the first query of the first block
    rank = zero + c * W + row
    start = rank - row - W if ALIGNED else rank - W + 1

    top = tl.full([BM], float("-inf"), tl.float32)
    total, acc = tl.zeros([BM], tl.float32), tl.zeros([BM, BV], tl.float32)
    far_total, far_acc = tl.zeros([BM], tl.float32), tl.zeros([BM, BV], tl.float32)
    for n in range(0, tl.minimum(W + (tile + 1) * BM, 2 * W), BN):
        column = n + tl.arange(0, BN)  # in this block and the one before
        there = column < 2 * W
        at = kv * (C + 1) * W + c * W + column
        key = tl.load(
            k + at[:, None] * D + d[None, :], mask=there[:, None] & (d[None, :] < D), other=0.0
        )
        value = tl.load(
            v + at[:, None] * DV + dv[None, :], mask=there[:, None] & (dv[None, :] < DV), other=0.0
        )
        distance = W + row[:, None] - column[None, :]
        seen = (distance >= 0) & there[None, :] & (zero + (c - 1) * W + column[None, :] >= 0)
        if not ALIGNED:
            seen = seen & (distance < W)
            if n < W:  # of the block before, what has left the window is far
                weights = tl.zeros([BM, BN], tl.float32)
                at = group * (C + 1) * W + c * W + column
                for begin in range(0, F, BF):
                    f = begin + tl.arange(0, BF)
                    left = tl.load(
                        fq + token[:, None] * F + f[None, :],
                        mask=real[:, None] & (f[None, :] < F), other=0.0,
                    )  # fmt: skip
                    right = tl.load(
                        fk + at[:, None] * F + f[None, :],
                        mask=there[:, None] & (f[None, :] < F), other=0.0,
                    )  # fmt: skip
                    weights += tl.dot(left, tl.trans(right), input_precision=PRECISION)
                weights = tl.where((distance >= W) & (column[None, :] < W), weights, 0.0)
                far_total += tl.sum(weights, 1)
                far_acc += tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        logits = tl.where(seen, logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp(logits - base[:, None])
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc += tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        top = new

    weight = tl.load(far_log + token, mask=real, other=float("-inf"))
    if REFERENCE == 1:
        weight += top
    if REFERENCE == 2:
        number = rank - tl.maximum(start, 0) + 1
        weight += top + tl.log(total) - tl.log(number.to(tl.float32))
    new = tl.maximum(top, weight)
    if HAS_SINKS:
        s = tl.arange(0, BS)
        at = kv * SINKS + s
        key = tl.load(
            sink_k + at[:, None] * D + d[None, :],
            mask=(s[:, None] < SINKS) & (d[None, :] < D), other=0.0,
        )  # fmt: skip
        value = tl.load(
            sink_v + at[:, None] * DV + dv[None, :],
            mask=(s[:, None] < SINKS) & (dv[None, :] < DV), other=0.0,
        )  # fmt: skip
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        seen = (s[None, :] < SINKS) & (s[None, :] < start[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        new = tl.maximum(new, tl.max(logits, 1))
    new = tl.where(new == float("-inf"), 0.0, new)
    shrink = tl.exp(top - new)
    total, acc = total * shrink, acc * shrink[:, None]
    if HAS_SINKS:
        weights = tl.exp(logits - new[:, None])
        total += tl.sum(weights, 1)
        acc += tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)

    at = group * (C + 1) + c
    for begin in range(0, F, BF):
        f = begin + tl.arange(0, BF)
        left = tl.load(
            fq + token[:, None] * F + f[None, :],
            mask=real[:, None] & (f[None, :] < F), other=0.0,
        )  # fmt: skip
        state = tl.load(
            states + (at * F + f[:, None]) * DV + dv[None, :],
            mask=(f[:, None] < F) & (dv[None, :] < DV), other=0.0,
        )  # fmt: skip
        mass = tl.load(masses + at * F + f, mask=f < F, other=0.0)
        far_acc += tl.dot(left, state.to(left.dtype), input_precision=PRECISION)
        far_total += tl.sum(left.to(tl.float32) * mass[None, :], 1)
    factor = tl.exp(weight - new)
    result = (acc + factor[:, None] * far_acc) / (total + factor * far_total)[:, None]
    place = ((batch * C * W + c * W + row) * H + head)[:, None] * DV + dv[None, :]
    tl.store(y + place, result, mask=real[:, None] & (dv[None, :] < DV))


def _blocks(
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
    """As `compute.compute_blocks`."""
    scale, w, aligned, sinks, reference, far_cap = options
    batch, heads, length, width = queries.shape
    kv_heads, groups = keys.shape[1], features.shape[1]
    size, out, blocks = features.shape[3], values.shape[3], length // w
    dtype = values.dtype
    queries, keys, values, query_features, features, sink_key, sink_value = (
        t.to(dtype).contiguous()
        for t in (queries, keys, values, query_features, features, sink_key, sink_value)
    )
    gate = gate + far_mass_log(rank, options).to(gate)[:, None]
    states = far_value.new_empty(batch, groups, blocks + 1, size, out)
    masses = far_value.new_empty(batch, groups, blocks + 1, size)
    y = torch.empty(batch, length, heads, out, dtype=dtype, device=values.device)
    # IEEE products of larger float32 tiles spill, and compile for minutes.
    largest = 32 if dtype == torch.float32 else 64
    fit = lambda n: min(largest, max(16, triton.next_power_of_2(n)))  # noqa: E731
    common: dict[str, Any] = {"PRECISION": "ieee"}
    launch(
        enter_states,
        (batch * groups, triton.cdiv(size, fit(size)), triton.cdiv(out, fit(out))),
        features, values, far_value.contiguous(), far_mass.contiguous(), states, masses,
        groups, kv_heads, blocks, w, size, out,
        BF=fit(size), BV=fit(out), BN=fit(w), num_stages=2, **common,
    )  # fmt: skip
    whole = lambda n: max(16, triton.next_power_of_2(n))  # noqa: E731
    launch(
        outputs,
        (blocks * triton.cdiv(w, fit(w)), batch * heads),
        queries, keys, values, query_features, features, gate.contiguous(), sink_key, sink_value,
        states, masses, rank[:, 0].expand(batch).int().contiguous(), y,
        heads, kv_heads, groups, blocks, w, width, size, out, sinks, float(scale),
        ALIGNED=aligned, REFERENCE=REFERENCES[reference], HAS_SINKS=sinks > 0,
        BM=fit(w), BN=min(32, fit(w)), BD=whole(width), BV=whole(out), BF=fit(size),
        BS=whole(sinks), num_stages=1, **common,
    )  # fmt: skip
    return y, states, masses


def forward(*args: Any) -> tuple[Tensor, ...]:
    """Arguments and results of the op."""
    if args[0].dtype == torch.float64:
        return cpu.hybrid_attention(*args)
    return tuple(t.contiguous() for t in cpu.hybrid_attention(*args, blocks=_blocks))


def backward(grads: Sequence[Tensor | None], *args: Any) -> tuple[Tensor | None, ...]:
    """One gradient or None for each argument of the op."""
    needed = tuple(isinstance(a, Tensor) for a in args)
    return _recompute(cpu.hybrid_attention, list(args), needed, tuple(grads))


def compilations() -> list[Compilation]:
    """Prefill of 4096 tokens with 128 features: block-aligned and sliding."""
    found: list[Compilation] = []
    for dtype in (torch.bfloat16, torch.float32):
        for aligned in (True, False):
            some = [
                torch.empty(1, heads, 4096, width, dtype=dtype, device="meta")
                for heads, width in ((32, 64), (8, 64), (8, 64), (32, 128), (8, 128))
            ]
            gate = torch.empty(1, 32, 4096, device="meta")
            kind = "block" if aligned else "sliding"
            with recording(f"{kind} {str(dtype)[6:]}") as kept:
                forward(*some, gate, *(None,) * 9, 0.125, 64, aligned, 4, "none", 1024.0)
            found += kept
    return found
