"""`rewriter::low_rank_linear`: schema, shapes, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.autograd import register_autocast, register_cpu, register_triton
from rewriter.kernels.low_rank_linear import cpu


@torch.library.custom_op(
    "rewriter::low_rank_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor first, Tensor[] second, Tensor? bias, Tensor? order) -> Tensor",
)
def low_rank_linear(
    x: Tensor, first: Tensor, second: list[Tensor], bias: Tensor | None, order: Tensor | None
) -> Tensor:
    """Arguments and result are those of `rewriter.kernels.low_rank_linear.low_rank_linear`."""
    _check(x, first, second, bias, order)
    return cpu.low_rank_linear(x, first, second, bias, order)


@low_rank_linear.register_fake
def _(
    x: Tensor, first: Tensor, second: list[Tensor], bias: Tensor | None, order: Tensor | None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], _check(x, first, second, bias, order)))


def _check(
    x: Tensor, first: Tensor, second: list[Tensor], bias: Tensor | None, order: Tensor | None
) -> int:
    """Number of outputs."""
    if not second or first.dim() != 2 or any(f.dim() != 2 for f in second):
        raise ValueError("low_rank_linear: first and every second must be matrices")
    if x.shape[-1] != first.shape[1]:
        raise ValueError(f"low_rank_linear: x has {x.shape[-1]} columns, first {first.shape[1]}")
    rank = sum(f.shape[1] for f in second)
    if rank != first.shape[0]:
        raise ValueError(
            f"low_rank_linear: first has {first.shape[0]} rows, the ranks add up to {rank}"
        )
    width = sum(f.shape[0] for f in second) + (0 if order is None else rank)
    for name, tensor in (("bias", bias), ("order", order)):
        if tensor is not None and tuple(tensor.shape) != (width,):
            raise ValueError(
                f"low_rank_linear: {name} is {tuple(tensor.shape)}, expected ({width},)"
            )
    return width


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, first, second, bias, order = inputs
    ctx.save_for_backward(x, first, bias, order, *second)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, first, bias, order, *second = ctx.saved_tensors
    return cpu.backward((grad,), x, first, list(second), bias, order)


low_rank_linear.register_autograd(_backward, setup_context=_setup)
register_cpu(low_rank_linear)
register_autocast(low_rank_linear, "x", "first", "second", "bias")
register_triton(low_rank_linear)
