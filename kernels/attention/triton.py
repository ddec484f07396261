"""`rewriter::attention` on a GPU: the kernels of `flash`, by the geometry of its literals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.attention.launch import Problem, recording
from rewriter.kernels.kernel import NEWER, OLDER, Compilation


def key_kinds(mask: Tensor | None, key: Tensor, sinks: int) -> Tensor | None:
    """int8 [B, S]: 0 hidden, 1 a real token, 2 one of the first `sinks` real tokens."""
    if mask is None and sinks == 0:
        return None
    shape = (key.shape[0], key.shape[2])
    real = key.new_ones(shape, dtype=torch.bool) if mask is None else mask.bool()
    kinds = real.to(torch.int8)
    if sinks > 0:
        kinds = kinds + (real & (real.cumsum(-1) <= sinks)).to(torch.int8)
    return kinds.contiguous()


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sink_logits: Tensor | None,
    key_positions: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    sinks: int,
    softcap: float,
) -> Problem:
    batch, length, keys = query.shape[0], query.shape[2], key.shape[2]
    sinks = sinks if window > 0 else 0
    padding = mask if mask is not None and mask.dim() == 2 else None
    problem = Problem(
        query, key, value, scale, softcap, causal, window, bias=_four(bias),
        dense=_four(mask) if padding is None and mask is not None else None,
        sink=None if sink_logits is None else sink_logits.contiguous(),
        plan_batch=batch, scattered=key_positions is not None,
    )  # fmt: skip
    if key_positions is None:
        problem.kind = key_kinds(padding, key, sinks)
        if sinks > 0:  # outside of the window they are single columns
            problem.columns = _first_columns(padding, batch, keys, sinks, key.device)
    else:  # its first slots are the sinks
        kinds = key_kinds(padding, key, 0)
        if sinks > 0:
            kinds = key.new_ones((batch, keys), dtype=torch.int8) if kinds is None else kinds
            kinds[:, :sinks] *= 2
        problem.kind = kinds
        at = key_positions.to(torch.int32).contiguous()
        last = at.amax(-1, keepdim=True) - length + 1
        problem.pos_k = at[:, None]
        rows = torch.arange(length, device=key.device, dtype=torch.int32)
        problem.pos_q = (last + rows)[:, None].contiguous()
    if chunk > 0:
        _chunks(problem, padding, key_positions, chunk)
    return problem


def _four(x: Tensor | None) -> Tensor | None:
    """With four dimensions, as it broadcasts; booleans as bytes."""
    if x is None:
        return None
    x = x.view(torch.uint8).view(torch.int8) if x.dtype == torch.bool else x
    return x[(None,) * (4 - x.dim())]


def _first_columns(
    padding: Tensor | None, batch: int, keys: int, sinks: int, device: torch.device
) -> Tensor:
    """int32 [B, 1, sinks], -1 where a row has fewer."""
    if padding is None:
        place = torch.arange(sinks, device=device, dtype=torch.int32)
        return torch.where(place < keys, place, -1).expand(batch, 1, -1).contiguous()
    real = padding.bool()
    place = torch.arange(keys, device=device).expand(batch, -1)
    order = torch.where(real, place, keys + place).argsort(-1)[:, :sinks]
    found = torch.where(real.gather(1, order), order, -1).to(torch.int32)
    return found[:, None].contiguous()


def _chunks(
    problem: Problem, padding: Tensor | None, key_positions: Tensor | None, chunk: int
) -> None:
    """Chunks as groups, and the first key of each row's chunk and the last row of each key's."""
    batch, length, keys = problem.batch, problem.length, problem.keys
    device = problem.key.device
    if key_positions is not None:
        assert problem.pos_q is not None and problem.pos_k is not None
        problem.group_q, problem.group_k = problem.pos_q // chunk, problem.pos_k // chunk
        return
    origin = torch.zeros(batch, 1, dtype=torch.long, device=device)
    if padding is not None:
        origin = (padding.cumsum(-1) == 0).sum(-1, keepdim=True)
    at = torch.arange(keys, device=device) - origin
    group = torch.div(at, chunk, rounding_mode="floor")
    problem.group_k = group.to(torch.int32)[:, None].contiguous()
    problem.group_q = problem.group_k[:, :, keys - length :].contiguous()
    start = (group * chunk + origin).clamp_min(0)[:, keys - length :]
    problem.start = start.to(torch.int32).contiguous()
    stop = ((group + 1) * chunk + origin - (keys - length)).clamp(0, length)
    problem.stop = stop.to(torch.int32).contiguous()


def forward(*args: Any) -> Tensor:
    """Arguments and result of `rewriter::attention`."""
    return _problem(*args).forward()[0]


def forward_with_lse(*args: Any) -> tuple[Tensor, Tensor]:
    """Arguments and results of `rewriter::attention_with_lse`."""
    return _problem(*args).forward()


def gradients(
    grad_output: Tensor | None, grad_lse: Tensor | None, wants_bias: bool, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of query, key, value, bias and sink_logits; the last two empty as in the op."""
    problem = _problem(*args)
    found = problem.backward(grad_output, grad_lse, *problem.forward(), wants_bias=wants_bias)
    query, bias, sink = args[0], args[4], args[5]
    dbias, dsink = found["bias"], found["sink"]
    return (
        found["query"], found["key"], found["value"],
        query.new_empty(0) if dbias is None else dbias.view(bias.shape).to(bias.dtype),
        query.new_empty(0) if dsink is None else dsink.to(sink.dtype),
    )  # type: ignore[return-value]  # fmt: skip


def backward(grads: tuple[Tensor | None, ...], *args: Any) -> tuple[Tensor | None, ...]:
    """One gradient or None for each argument of `rewriter::attention`."""
    query, key, value, bias, sink = gradients(grads[0], None, args[4] is not None, *args)
    return (
        query, key, value, None, None if args[4] is None else bias,
        None if args[5] is None else sink, *[None] * (len(args) - 6),
    )  # fmt: skip


def compilations() -> list[Compilation]:
    """Prefill, its backward and decode: bfloat16 of 64 and 128, float32 in TF32."""
    found: list[Compilation] = []
    for dtype, width in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64)):
        query = torch.empty(1, 32, 4096, width, dtype=dtype, device="meta")
        key = torch.empty(1, 8, 4096, width, dtype=dtype, device="meta")
        name = f"{str(dtype)[6:]} {width}"
        for targets in (OLDER, NEWER) if dtype != torch.float32 else ((),):
            on = f"{name} {' '.join(targets)}".strip()
            for kind, window in (("causal", 0), ("window", 512)):
                with recording(f"{kind} {on}", targets) as some:
                    problem = Problem(query, key, key, width**-0.5, causal=True, window=window)
                    output, lse = problem.forward()
                    problem.backward(output, None, output, lse)
                found += some
            with recording(f"decode {on}", targets) as some:
                Problem(query[:, :, :1], key, key, width**-0.5, causal=True).forward()
            found += some
    return found
