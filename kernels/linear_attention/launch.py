"""Launches of the Triton kernels, for `linear_attention` and for `ssd`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from rewriter.kernels.kernel import for_hopper
from rewriter.kernels.linear_attention import chunked as kernels
from rewriter.kernels.linear_attention.recurrent import recurrent as recurrent_kernel

#: Of one token. exp() of it is nothing beside a float32, and what follows keeps its digits.
LEAST_DECAY = -60.0
LOW_PRECISION = (torch.bfloat16, torch.float16)


def tiles(dtype: torch.dtype, size: int, width: int) -> dict[str, Any]:
    """Constants and options of the chunked kernels for states of size x width."""
    # IEEE products of larger float32 tiles spill, and compile for minutes.
    largest = 64 if dtype in LOW_PRECISION else 32
    fit = lambda n: min(largest, max(16, triton.next_power_of_2(n)))  # noqa: E731
    constants = {"BT": largest, "BK": fit(size), "BV": fit(width), "PRECISION": "ieee"}
    return {**constants, "num_warps": 4, "num_stages": 2}


def state_tiles(x: Tensor, size: int, width: int) -> dict[str, Any]:
    """As `tiles`, for `enter_states` on x's device: a chain of loads, so many are under way."""
    options = tiles(x.dtype, size, width)
    if x.dtype in LOW_PRECISION and for_hopper(x):
        options |= {"num_warps": 8, "num_stages": 4}
    return options


def output_tiles(x: Tensor, size: int, width: int) -> dict[str, Any]:
    """As `tiles`, for `outputs` on x's device: the fewer tiles, the less is read twice."""
    options = tiles(x.dtype, size, width)
    if x.dtype in LOW_PRECISION and for_hopper(x):
        whole = {b: max(16, triton.next_power_of_2(n)) for b, n in (("BK", size), ("BV", width))}
        options |= {b: min(128, n) for b, n in whole.items()} | {"num_warps": 8}
    return options


def recurrent_tiles(size: int) -> dict[str, Any]:
    """Constants and options of the recurrent kernel for keys of `size` channels."""
    channels = max(16, triton.next_power_of_2(size))
    return {"BK": channels, "BV": max(8, min(32, 2048 // channels)), "num_warps": 4}


def value_tiles(dtype: torch.dtype, size: int, width: int) -> dict[str, Any]:
    """As `tiles`, for `value_gradients`."""
    return {**tiles(dtype, size, width), "num_warps": 8}


def query_key_tiles(dtype: torch.dtype, size: int, width: int) -> dict[str, Any]:
    """As `tiles`, for `query_key_gradients`, which holds three products at once."""
    options = tiles(dtype, size, width)
    return {**options, "BV": min(32, options["BV"]), "num_warps": 8}


def per_state(t: Tensor, states: int, chunk: int) -> Tensor:
    """[B, T, heads] to [B, states, T rounded up to whole chunks], zeros at the end."""
    if states != t.shape[2]:
        t = t.repeat_interleave(states // t.shape[2], 2)
    return pad(t.transpose(1, 2), (0, -t.shape[1] % chunk))


def chunk_sums(log_decay: Tensor, states: int, chunk: int) -> Tensor:
    """Sum of the log decays [B, T, heads] since each chunk began, float32 [B, states, padded T]."""
    return _ChunkSums.apply(log_decay, states, chunk)


class _ChunkSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_decay: Tensor, states: int, chunk: int) -> Tensor:
        ctx.save_for_backward(log_decay)
        ctx.chunk = chunk
        batch, length, heads = log_decay.shape
        chunks = triton.cdiv(length, chunk)
        g = log_decay.new_empty(batch, states, chunks * chunk, dtype=torch.float32)
        kernels.chunk_sums[(chunks, batch * states)](
            log_decay, g, length, chunks, states, states // heads, *log_decay.stride(),
            LEAST=LEAST_DECAY, BT=chunk, num_warps=1,
        )  # fmt: skip
        return g

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (log_decay,) = ctx.saved_tensors
        length, heads = log_decay.shape[1:]
        each = grad.double().unflatten(2, (-1, ctx.chunk)).flip(3).cumsum(3).flip(3).flatten(2)
        whole = each[:, :, :length].unflatten(1, (heads, -1)).sum(2).transpose(1, 2)
        return torch.where(log_decay < LEAST_DECAY, 0, whole).to(log_decay.dtype), None, None


class Chunked(torch.autograd.Function):
    """y and the final state of the kernels in `chunked.py`.

    q, k, v: one dtype, [B, T, heads, width]. g, gain: float32 [B, S, padded T] or None. skip: [H]
    or None (v then has H heads). state: float32 [B, S, K, V] or None. wide: y is float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        gain: Tensor | None,
        skip: Tensor | None,
        state: Tensor | None,
        states: int,
        scale: float,
        wide: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.call = _Call(q, k, v, g, gain, skip, state, states, scale)
        ctx.needed = state is not None, skip is not None
        enter, final = ctx.call.enter()
        y = ctx.call.outputs(enter, torch.float32 if wide else v.dtype)
        ctx.enter, ctx.final = enter, final
        return y, final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dfinal = grads
        return (*ctx.call.backward(dy, dfinal, ctx.enter, ctx.final), None, None, None)


class _Call:
    """Arguments of one call as the kernels take them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        gain: Tensor | None,
        skip: Tensor | None,
        state: Tensor | None,
        states: int,
        scale: float,
    ) -> None:
        self.q, self.k, self.v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
        self.g, self.gain, self.skip, self.state = (
            None if t is None else t.contiguous() for t in (g, gain, skip, state)
        )
        self.batch, self.length, _, self.size = k.shape
        self.width, self.states, self.scale = v.shape[3], states, scale
        self.heads = max(q.shape[2], states)
        self.rows = self.heads // states
        self.options = tiles(v.dtype, self.size, self.width)
        self.chunks = triton.cdiv(self.length, self.options["BT"])
        self.tiles_k = triton.cdiv(self.size, self.options["BK"])
        self.tiles_v = triton.cdiv(self.width, self.options["BV"])
        self.flags = {"HAS_DECAY": g is not None, "HAS_GAIN": gain is not None}
        self.per_q = self.heads // q.shape[2]
        self.per_k, self.per_v = states // k.shape[2], states // v.shape[2]
        self.strides = [t.stride(i) for t in (self.q, self.k, self.v) for i in (0, 1, 2)]

    def given(self, t: Tensor | None) -> Tensor:
        """A pointer in the place of what is not there; the kernel does not read it."""
        return self.v if t is None else t

    def all_states(self) -> Tensor:
        shape = (self.batch, self.states, self.chunks, self.size, self.width)
        return self.v.new_empty(shape)

    def one_state(self) -> Tensor:
        shape = (self.batch, self.states, self.size, self.width)
        return self.v.new_empty(shape, dtype=torch.float32)

    def enter(self) -> tuple[Tensor, Tensor]:
        enter, final = self.all_states(), self.one_state()
        options = state_tiles(self.v, self.size, self.width)
        tiles_k, tiles_v = (
            triton.cdiv(n, options[b]) for n, b in ((self.size, "BK"), (self.width, "BV"))
        )
        kernels.enter_states[(tiles_k, tiles_v, self.batch * self.states)](
            self.k, self.v, self.given(self.g), self.given(self.gain), self.given(self.state),
            enter, final, self.length, self.chunks, self.states, self.size, self.width,
            self.per_k, self.per_v, *self.strides[3:],
            **self.flags, HAS_STATE=self.state is not None, **options,
        )  # fmt: skip
        return enter, final

    def outputs(self, enter: Tensor, dtype: torch.dtype) -> Tensor:
        y = self.v.new_empty(self.batch, self.length, self.heads, self.width, dtype=dtype)
        options = output_tiles(self.v, self.size, self.width)
        tiles_v = triton.cdiv(self.width, options["BV"])
        kernels.outputs[(tiles_v, self.chunks, self.batch * self.heads)](
            self.q, self.k, self.v, self.given(self.g), self.given(self.gain),
            self.given(self.skip), enter, y,
            self.length, self.chunks, self.heads, self.rows, self.size, self.width,
            self.per_q, self.per_k, self.per_v, self.scale, *self.strides,
            **self.flags, HAS_SKIP=self.skip is not None, **options,
        )  # fmt: skip
        return y

    def backward(
        self, dy: Tensor | None, dfinal: Tensor | None, enter: Tensor, final: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, g, gain, skip and state."""
        if dy is None:
            dy = self.v.new_zeros(self.batch, self.length, self.heads, self.width)
        dy = dy.to(self.v.dtype).contiguous()
        leave, dstate = self.all_states(), self.one_state()
        programs = (self.tiles_k, self.tiles_v, self.batch * self.states)
        kernels.leave_gradients[programs](
            self.q, dy, self.given(self.g),
            self.v if dfinal is None else dfinal.contiguous(), leave, dstate,
            self.length, self.chunks, self.states, self.rows, self.size, self.width,
            self.per_q, self.scale, *self.strides[:3],
            HAS_DECAY=self.g is not None, HAS_FINAL=dfinal is not None, **self.options,
        )  # fmt: skip
        numbers = (
            self.length, self.chunks, self.heads, self.rows, self.size, self.width,
            self.per_q, self.per_k, self.per_v, self.scale, *self.strides,
        )  # fmt: skip
        dq, dk, dv = (
            self.v.new_empty(
                self.batch, self.length, self.heads, size,
                dtype=t.dtype if t.shape[2] == self.heads else torch.float32,
            )
            for t, size in ((self.q, self.size), (self.k, self.size), (self.v, self.width))
        )  # fmt: skip
        shape = self.v.dtype, self.size, self.width
        padded = (self.batch, self.heads, self.chunks * self.options["BT"])
        dg = self.v.new_empty(self.tiles_k, *padded, dtype=torch.float32)
        kernels.query_key_gradients[(self.tiles_k, self.chunks, self.batch * self.heads)](
            self.q, self.k, self.v, dy, self.given(self.g), self.given(self.gain), enter, leave,
            dq, dk, dg, *numbers, **self.flags, **query_key_tiles(*shape),
        )  # fmt: skip
        dgain = self.v.new_empty(self.tiles_v, *padded, dtype=torch.float32)
        kernels.value_gradients[(self.tiles_v, self.chunks, self.batch * self.heads)](
            self.q, self.k, self.v, dy, self.given(self.g), self.given(self.gain),
            self.given(self.skip), leave, dv, dgain, *numbers,
            **self.flags, HAS_SKIP=self.skip is not None, **value_tiles(*shape),
        )  # fmt: skip
        return (
            *(_shared(d, t) for d, t in ((dq, self.q), (dk, self.k), (dv, self.v))),
            None if self.g is None else self._decay_gradient(dg, enter, leave, final, dfinal),
            None if self.gain is None else self._sum_rows(dgain),
            None if self.skip is None else (dy.float() * self.v.float()).sum((0, 1, 3)),
            None if self.state is None else dstate,
        )

    def _sum_rows(self, partial: Tensor) -> Tensor:
        return partial.sum(0).unflatten(1, (self.states, self.rows)).sum(2)

    def _decay_gradient(
        self, dg: Tensor, enter: Tensor, leave: Tensor, final: Tensor, dfinal: Tensor | None
    ) -> Tensor:
        """What the kernels summed, and at the end of a chunk <leaving state, its gradient>."""
        total = self._sum_rows(dg).unflatten(2, (self.chunks, -1))
        last = final.new_zeros(*final.shape[:2], self.chunks)
        last[:, :, :-1] = torch.einsum("bsckv,bsckv->bsc", enter[:, :, 1:], leave[:, :, :-1])
        if dfinal is not None:
            last[:, :, -1] = torch.einsum("bskv,bskv->bs", final, dfinal)
        total[..., -1] += last
        return total.flatten(2)


def _shared(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient of every output head, summed over the heads that share a row of `like`."""
    return gradient.unflatten(2, (like.shape[2], -1)).sum(3).to(like.dtype)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    gain: Tensor | None,
    skip: Tensor | None,
    state: Tensor | None,
    states: int,
    scale: float,
    dtype: torch.dtype,
    value_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """y in `dtype` and the final state; value_first: a state is [V, K] instead of [K, V]."""
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    (batch, length, _, size), width = k.shape, v.shape[3]
    heads = max(q.shape[2], states)
    log_decay, beta, gain = (
        None if t is None else t.repeat_interleave(states // t.shape[2], 2).float().contiguous()
        for t in (log_decay, beta, gain)
    )
    y = v.new_empty(batch, length, heads, width, dtype=dtype)
    shape = (width, size) if value_first else (size, width)
    final = v.new_empty(batch, states, *shape, dtype=torch.float32)
    given = lambda t: v if t is None else t.contiguous()  # noqa: E731
    options = recurrent_tiles(size)
    recurrent_kernel[(triton.cdiv(width, options["BV"]), batch * states)](
        q, k, v, given(log_decay), given(beta), given(gain), given(skip), given(state), y, final,
        length, states, heads // states, size, width,
        heads // q.shape[2], states // k.shape[2], states // v.shape[2], scale,
        *(t.stride(i) for t in (q, k, v) for i in (0, 1, 2)),
        *((1, size) if value_first else (width, 1)),
        DECAY=0 if log_decay is None else log_decay.dim() - 2, HAS_BETA=beta is not None,
        HAS_GAIN=gain is not None, HAS_SKIP=skip is not None, HAS_STATE=state is not None,
        **options,
    )  # fmt: skip
    return y, final
