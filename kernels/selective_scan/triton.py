"""`selective_scan` on a GPU: a tile of channels with its states in registers, token by token.

Backward walks back over chunks of tokens: it runs each chunk forward again from the state that
was kept at its beginning, keeping the state before every token, and then goes backward through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rewriter.kernels.autograd import _recompute
from rewriter.kernels.kernel import COMPILE_OPTIONS, Compilation, kernel
from rewriter.kernels.linear_attention.reference import inert
from rewriter.kernels.selective_scan import cpu

__all__ = ["backward", "compilations", "forward"]

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@kernel
def scan(
    X, DT, A, B, C, D, S0, Y, FINAL, KEPT, T, channels, size,
    HAS_SKIP: tl.constexpr, HAS_STATE: tl.constexpr, KEEP: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """grid: (tiles of C, B). KEPT: [B, chunks, C, N], the state before each BT tokens."""
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    n = tl.arange(0, BN)
    in_c, in_n = c < channels, n < size
    inside = in_c[:, None] & in_n[None, :]
    tile = c[:, None] * size + n[None, :]
    a = tl.load(A + tile, mask=inside, other=0.0).to(tl.float32)
    h = tl.zeros([BC, BN], tl.float32)
    if HAS_STATE:
        h = tl.load(S0 + b * channels * size + tile, mask=inside, other=0.0).to(tl.float32)
    if HAS_SKIP:
        d = tl.load(D + c, mask=in_c, other=0.0).to(tl.float32)
    chunks = tl.cdiv(T, BT)
    for chunk in range(0, chunks):
        if KEEP:
            tl.store(KEPT + (b * chunks + chunk) * channels * size + tile, h, mask=inside)
        for t in range(chunk * BT, tl.minimum(chunk * BT + BT, T)):
            row = b * T + t
            x = tl.load(X + row * channels + c, mask=in_c, other=0.0).to(tl.float32)
            dt = tl.load(DT + row * channels + c, mask=in_c, other=0.0).to(tl.float32)
            write = tl.load(B + row * size + n, mask=in_n, other=0.0).to(tl.float32)
            read = tl.load(C + row * size + n, mask=in_n, other=0.0).to(tl.float32)
            h = tl.exp(dt[:, None] * a) * h + (dt * x)[:, None] * write[None, :]
            y = tl.sum(h * read[None, :], 1)
            if HAS_SKIP:
                y += d * x
            tl.store(Y + row * channels + c, y.to(Y.dtype.element_ty), mask=in_c)
    tl.store(FINAL + b * channels * size + tile, h, mask=inside)


@kernel
def scan_gradients(
    X, DT, A, B, C, D, KEPT, DY, DFINAL, BEFORE, DX, DDT, DA, DB, DC, DS0, T, channels, size,
    HAS_SKIP: tl.constexpr, HAS_FINAL: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """grid as `scan`. BEFORE: [B, tiles of C, BT, BC, BN], the states of the chunk at hand.

    DA: [B, C, N]; DB, DC: [tiles of C, B, T, N]: sums of one program.
    """
    tiles, i = tl.num_programs(0), tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    rc = tl.arange(0, BC)
    c = i * BC + rc
    n = tl.arange(0, BN)
    in_c, in_n = c < channels, n < size
    inside = in_c[:, None] & in_n[None, :]
    tile = c[:, None] * size + n[None, :]
    a = tl.load(A + tile, mask=inside, other=0.0).to(tl.float32)
    before = BEFORE + (b * tiles + i) * BT * BC * BN + rc[:, None] * BN + n[None, :]
    dh = tl.zeros([BC, BN], tl.float32)
    if HAS_FINAL:
        dh = tl.load(DFINAL + b * channels * size + tile, mask=inside, other=0.0).to(tl.float32)
    if HAS_SKIP:
        d = tl.load(D + c, mask=in_c, other=0.0).to(tl.float32)
    da = tl.zeros([BC, BN], tl.float32)
    chunks = tl.cdiv(T, BT)
    for back in range(0, chunks):
        chunk = chunks - 1 - back
        start = chunk * BT
        count = tl.minimum(BT, T - start)
        h = tl.load(KEPT + (b * chunks + chunk) * channels * size + tile, mask=inside, other=0.0)
        tl.debug_barrier()
        for j in range(0, count):
            tl.store(before + j * BC * BN, h)
            row = b * T + start + j
            x = tl.load(X + row * channels + c, mask=in_c, other=0.0).to(tl.float32)
            dt = tl.load(DT + row * channels + c, mask=in_c, other=0.0).to(tl.float32)
            write = tl.load(B + row * size + n, mask=in_n, other=0.0).to(tl.float32)
            h = tl.exp(dt[:, None] * a) * h + (dt * x)[:, None] * write[None, :]
        tl.debug_barrier()  # what one thread stored another may load
        for k in range(0, count):
            j = count - 1 - k
            row = b * T + start + j
            x = tl.load(X + row * channels + c, mask=in_c, other=0.0).to(tl.float32)
            dt = tl.load(DT + row * channels + c, mask=in_c, other=0.0).to(tl.float32)
            dy = tl.load(DY + row * channels + c, mask=in_c, other=0.0).to(tl.float32)
            write = tl.load(B + row * size + n, mask=in_n, other=0.0).to(tl.float32)
            read = tl.load(C + row * size + n, mask=in_n, other=0.0).to(tl.float32)
            decay = tl.exp(dt[:, None] * a)
            left = decay * tl.load(before + j * BC * BN)
            dh += dy[:, None] * read[None, :]
            dread = tl.sum(dy[:, None] * (left + (dt * x)[:, None] * write[None, :]), 0)
            dwrite = tl.sum(dh * (dt * x)[:, None], 0)
            written = tl.sum(dh * write[None, :], 1)
            faded = dh * left
            da += faded * dt[:, None]
            dx = dt * written
            if HAS_SKIP:
                dx += d * dy
            tl.store(DX + row * channels + c, dx.to(DX.dtype.element_ty), mask=in_c)
            ddt = x * written + tl.sum(faded * a, 1)
            tl.store(DDT + row * channels + c, ddt.to(DDT.dtype.element_ty), mask=in_c)
            part = (i * tl.num_programs(1).to(tl.int64) * T + row) * size + n
            tl.store(DB + part, dwrite, mask=in_n)
            tl.store(DC + part, dread, mask=in_n)
            dh = dh * decay
    tl.store(DA + b * channels * size + tile, da, mask=inside)
    tl.store(DS0 + b * channels * size + tile, dh, mask=inside)


def tiles(size: int) -> dict[str, Any]:
    """Constants and options for `size` states a channel."""
    states = max(4, triton.next_power_of_2(size))
    return {"BT": 32, "BC": max(4, min(32, 512 // states)), "BN": states, "num_warps": 1}


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C = (t.contiguous() for t in (x, dt, A, B, C))
        (batch, length, channels), size = x.shape, A.shape[1]
        options, keep = tiles(size), any(ctx.needs_input_grad)
        y = torch.empty_like(x)
        final = x.new_empty(batch, channels, size, dtype=torch.float32)
        chunks = triton.cdiv(length, options["BT"]) if keep else 0
        kept = final.new_empty(batch, chunks, channels, size)
        scan[(triton.cdiv(channels, options["BC"]), batch)](
            x, dt, A, B, C, x if D is None else D.contiguous(),
            x if state is None else state.contiguous(), y, final, kept, length, channels, size,
            HAS_SKIP=D is not None, HAS_STATE=state is not None, KEEP=keep, **options,
        )  # fmt: skip
        ctx.save_for_backward(x, dt, A, B, C, D, kept)
        ctx.has_state = state is not None
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, kept = ctx.saved_tensors
        dy, dfinal = grads
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        (batch, length, channels), size = x.shape, A.shape[1]
        options = tiles(size)
        parts = triton.cdiv(channels, options["BC"])
        dx, ddt = torch.empty_like(x), torch.empty_like(dt)
        da, ds = kept.new_empty(2, batch, channels, size)
        db, dc = kept.new_empty(2, parts, batch, length, size)
        before = kept.new_empty(batch, parts, options["BT"], options["BC"], options["BN"])
        scan_gradients[(parts, batch)](
            x, dt, A, B, C, x if D is None else D.contiguous(), kept, dy,
            x if dfinal is None else dfinal.contiguous(), before, dx, ddt, da, db, dc, ds,
            length, channels, size,
            HAS_SKIP=D is not None, HAS_FINAL=dfinal is not None, **options,
        )  # fmt: skip
        return (
            dx,
            ddt,
            da.sum(0).to(A.dtype),
            db.sum(0).to(B.dtype),
            dc.sum(0).to(C.dtype),
            None if D is None else (dy.float() * x.float()).sum((0, 1)).to(D.dtype),
            ds if ctx.has_state else None,
        )


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as the package's function; differentiable."""
    if x.dtype == torch.float64:
        return cpu.selective_scan(x, dt, A, B, C, D, state, mask)
    x, dt, B, C = inert(mask, x, dt, B, C)
    return _Scan.apply(x, dt, A, B, C, D, None if state is None else state.float())


def backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """One gradient or None for each argument of the op."""
    args = [x, dt, A, B, C, D, state, mask]
    needed = tuple(isinstance(a, Tensor) for a in args)
    return _recompute(forward, args, needed, tuple(grads))


def compilations() -> list[Compilation]:
    """Sixteen states a channel."""
    made = []
    for name in TYPES.values():
        for item in (scan, scan_gradients):
            values = {"HAS_SKIP": True, "HAS_STATE": True, "HAS_FINAL": True, "KEEP": True}
            values |= tiles(16)
            constants = {n: v for n, v in values.items() if n in item.arg_names}
            wide = ("A", "D", "S0", "FINAL", "KEPT", "DFINAL", "BEFORE", "DA", "DB", "DC", "DS0")
            pointers = {
                n: "*fp32" if n in wide else f"*{name}"
                for n in item.arg_names
                if n[0].isupper() and n != "T" and n not in constants
            }
            options = {n: v for n, v in values.items() if n in COMPILE_OPTIONS}
            aligned = (*pointers, "channels", "size")
            made.append(Compilation(item, name, pointers, constants, aligned, options, False))
    return made
