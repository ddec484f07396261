"""The block plan on a GPU: `kernels.attention.flash` with the plan's lists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.attention.launch import Problem, recording
from rewriter.kernels.attention.triton import key_kinds
from rewriter.kernels.kernel import NEWER, OLDER, Compilation


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    full: Tensor,
    mask: Tensor | None,
    columns: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    group_q: Tensor | None,
    group_k: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    block_q: int,
    block_k: int,
    causal: bool,
    window: int,
    sinks: int,
    softcap: float,
) -> Problem:
    batch, heads = index.shape[:2]
    if columns is not None:
        columns = columns.expand(batch, heads, -1)
    index, count, full = index.contiguous(), count.contiguous(), full.contiguous()
    columns, pos_q, pos_k, group_q, group_k, key_bias = (
        None if t is None else t.contiguous()
        for t in (columns, pos_q, pos_k, group_q, group_k, key_bias)
    )
    return Problem(
        query, key, value, scale, softcap, causal, window, index, count, full, columns,
        key_kinds(mask, key, sinks if window > 0 else 0),
        key_bias=key_bias, pos_q=pos_q, pos_k=pos_k, group_q=group_q, group_k=group_k,
        block_q=block_q, block_k=block_k, plan_batch=batch, plan_heads=heads,
    )  # fmt: skip


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """Arguments and results of the op."""
    return _problem(*args).forward()


def gradients(
    grad_output: Tensor | None, grad_lse: Tensor | None, output: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of query, key, value and key_bias (empty without one)."""
    problem = _problem(*args)
    found = problem.backward(grad_output, grad_lse, output, lse)
    given, bias = problem.key_bias, found["key_bias"]
    key_bias = output.new_empty(0) if given is None or bias is None else bias.to(given.dtype)
    query, key, value = found["query"], found["key"], found["value"]
    assert query is not None and key is not None and value is not None
    return query, key, value, key_bias


def backward(grads: tuple[Tensor | None, ...], *args: Any) -> tuple[Tensor | None, ...]:
    """One gradient or None for each argument of the op."""
    query, key, value, bias = gradients(grads[0], grads[1], *forward(*args), *args)
    found: list[Tensor | None] = [query, key, value, *[None] * (len(args) - 3)]
    if args[12] is not None:
        found[12] = bias
    return tuple(found)


def compilations() -> list[Compilation]:
    """Prefill by one list a key head, its backward, token queries, and paged decode."""
    found: list[Compilation] = []
    for dtype, width in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64)):
        query = torch.empty(1, 32, 4096, width, dtype=dtype, device="meta")
        key = torch.empty(1, 8, 4096, width, dtype=dtype, device="meta")
        name = f"{str(dtype)[6:]} {width}"
        for targets in (OLDER, NEWER) if dtype != torch.float32 else ((),):
            on = f"{name} {' '.join(targets)}".strip()
            for case, rows, block_q, block_k, listed in (
                ("prefill 128", 4096, 128, 128, 8),
                ("prefill 64", 4096, 64, 64, 8),
                ("token queries", 4096, 1, 64, 16),
                ("decode page 64", 1, 1, 64, 16),
                ("decode page 16", 1, 1, 16, 64),
            ):
                count = torch.empty(1, 8, rows // block_q, dtype=torch.int32, device="meta")
                index = torch.empty(*count.shape, listed, dtype=torch.int32, device="meta")
                with recording(f"{case} {on}", targets) as some:
                    problem = Problem(
                        query[:, :, :rows], key, key, width**-0.5, causal=True, index=index,
                        count=count, full=count, block_q=block_q, block_k=block_k, plan_heads=8,
                    )  # fmt: skip
                    output, lse = problem.forward()
                    if rows > 1:
                        problem.backward(output, None, output, lse)
                found += some
    return found
