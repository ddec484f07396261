"""`rewriter::attention` and `rewriter::attention_with_lse`: schema, shapes, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.attention import cpu
from rewriter.kernels.attention.arguments import Arguments
from rewriter.kernels.autograd import register_autocast, register_cpu, register_triton
from rewriter.kernels.mixer import MixerSpec, register_mixer
from rewriter.kernels.schema import inputs, names

INPUTS, NAMES = inputs(Arguments), names(Arguments)


@torch.library.custom_op(
    "rewriter::attention", mutates_args=(), schema=f"({INPUTS}) -> Tensor output"
)
def attention(*args: Any) -> Tensor:
    """Softmax attention of `Arguments`, in their order.

    Returns [B, L, H, Dv]. A row that sees nothing is zero.
    """
    return cpu.attention(*args).contiguous()


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))


@torch.library.custom_op(
    "rewriter::attention_with_lse",
    mutates_args=(),
    schema=f"({INPUTS}) -> (Tensor output, Tensor lse)",
)
def attention_with_lse(*args: Any) -> tuple[Tensor, Tensor]:
    """`rewriter::attention`, and the log of the softmax's normaliser, for merging.

    lse: [B, H, L], float32 (float64 for float64), -inf for a row that sees nothing. It counts
    the learned sink. Differentiable.
    """
    output, lse = cpu.attention_with_lse(*args)
    return output.contiguous(), lse.contiguous()


@attention_with_lse.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return (
        query.new_empty((batch, length, heads, value.shape[3])),
        query.new_empty((batch, heads, length), dtype=wide),
    )


@torch.library.custom_op(
    "rewriter::attention_backward",
    mutates_args=(),
    schema=f"(Tensor? grad_output, Tensor? grad_lse, bool wants_bias, {INPUTS}) -> "
    "(Tensor query, Tensor key, Tensor value, Tensor bias, Tensor sink_logits)",
)
def attention_backward(
    grad_output: Tensor | None, grad_lse: Tensor | None, wants_bias: bool, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients from the inputs alone, so that a training step keeps nothing else; the last two
    are empty where there is no bias or nobody wants its gradient, and no sink."""
    return cpu.gradients(grad_output, grad_lse, wants_bias, *args)


@attention_backward.register_fake
def _(
    grad_output: Tensor | None, grad_lse: Tensor | None, wants_bias: bool, *args: Any
) -> tuple[Tensor, ...]:
    query, key, value, bias, sink = (
        args[NAMES.index(n)] for n in ("query", "key", "value", "bias", "sink_logits")
    )
    found = [t.new_empty(t.shape) for t in (query, key, value)]
    for tensor, wanted in ((bias, wants_bias), (sink, True)):
        there = tensor is not None and wanted
        found.append(tensor.new_empty(tensor.shape) if there else query.new_empty(0))
    return tuple(found)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.save_for_backward(*(inputs[i] for i in ctx.tensors))
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    args: list[Any] = list(ctx.others)
    for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
        args[i] = tensor
    wants_bias = ctx.needs_input_grad[NAMES.index("bias")]
    found = attention_backward(grad_output, grad_lse, wants_bias, *args)
    result: list[Tensor | None] = [None] * len(args)
    names = ("query", "key", "value", "bias", "sink_logits")
    for i, gradient in zip((NAMES.index(n) for n in names), found, strict=True):
        if ctx.needs_input_grad[i]:
            result[i] = gradient
    return tuple(result)


for _op in (attention, attention_with_lse):
    _op.register_autograd(_backward, setup_context=_setup)
    register_mixer(_op, MixerSpec("kv_append", normalised=True))
    register_cpu(_op)
    register_autocast(_op, "query", "key", "value")
register_triton(attention)


@attention_with_lse.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    from rewriter.kernels.attention import triton

    return triton.forward_with_lse(*args)


@attention_backward.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from rewriter.kernels.attention import triton

    return triton.gradients(*args)
