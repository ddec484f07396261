"""`rewriter::dense_sparse_linear`: schema, shapes, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.autograd import register_autocast, register_cpu, register_triton
from rewriter.kernels.dense_sparse_linear import cpu


@torch.library.custom_op(
    "rewriter::dense_sparse_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor basis, Tensor index, Tensor value, Tensor? bias) -> Tensor",
)
def dense_sparse_linear(
    x: Tensor, basis: Tensor, index: Tensor, value: Tensor, bias: Tensor | None
) -> Tensor:
    """Arguments and result: see `rewriter.kernels.dense_sparse_linear.dense_sparse_linear`."""
    _check(x, basis, index, value, bias)
    return cpu.dense_sparse_linear(x, basis, index, value, bias)


@dense_sparse_linear.register_fake
def _(x: Tensor, basis: Tensor, index: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, basis, index, value, bias)
    return x.new_empty((*x.shape[:-1], index.shape[0]))


def _check(x: Tensor, basis: Tensor, index: Tensor, value: Tensor, bias: Tensor | None) -> None:
    if basis.dim() != 3 or index.dim() != 2:
        raise ValueError(
            f"dense_sparse_linear: basis {tuple(basis.shape)} must have 3 dimensions and index "
            f"{tuple(index.shape)} 2"
        )
    outputs = index.shape[0]
    if x.shape[-1] != basis.shape[2]:
        raise ValueError(
            f"dense_sparse_linear: x has {x.shape[-1]} columns, basis {basis.shape[2]}"
        )
    if outputs % basis.shape[0] != 0:
        raise ValueError(
            f"dense_sparse_linear: {basis.shape[0]} blocks do not divide {outputs} outputs"
        )
    for name, tensor, shape in (("value", value, tuple(index.shape)), ("bias", bias, (outputs,))):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"dense_sparse_linear: {name} is {tuple(tensor.shape)}, expected {shape}"
            )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return cpu.backward((grad,), *ctx.saved_tensors)


dense_sparse_linear.register_autograd(_backward, setup_context=_setup)
register_cpu(dense_sparse_linear)
register_autocast(dense_sparse_linear, "x", "basis", "value", "bias")
register_triton(dense_sparse_linear)
