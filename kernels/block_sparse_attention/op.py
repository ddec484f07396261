"""`rewriter::block_sparse_attention`: schema, shapes, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.autograd import expect, register_autocast, register_cpu, register_triton
from rewriter.kernels.block_sparse_attention import cpu
from rewriter.kernels.block_sparse_attention.arguments import Arguments
from rewriter.kernels.mixer import MixerSpec, register_mixer
from rewriter.kernels.schema import inputs, names

INPUTS, NAMES = inputs(Arguments), names(Arguments)


@torch.library.custom_op(
    "rewriter::block_sparse_attention",
    mutates_args=(),
    schema=f"({INPUTS}) -> (Tensor output, Tensor lse)",
)
def block_sparse_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """Softmax attention over the listed blocks of keys, of `Arguments` in their order.

    Returns:
        output: [B, L, H, Dv]; a row that sees nothing is zero.
        lse: [B, H, L], float32 (float64 for float64), the log of the softmax's normaliser; -inf
            for a row that sees nothing. Differentiable, so that partial results can be merged.
    """
    check(*args)
    return cpu.block_sparse_attention(*args)


@block_sparse_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    check(query, key, value, *rest)
    batch, heads, length, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return (
        query.new_empty((batch, length, heads, value.shape[3])),
        query.new_empty((batch, heads, length), dtype=wide),
    )


@torch.library.custom_op(
    "rewriter::block_sparse_attention_backward",
    mutates_args=(),
    schema=f"(Tensor? grad_output, Tensor? grad_lse, Tensor output, Tensor lse, {INPUTS}) -> "
    "(Tensor query, Tensor key, Tensor value, Tensor key_bias)",
)
def block_sparse_attention_backward(
    grad_output: Tensor | None, grad_lse: Tensor | None, output: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and key_bias (empty without one), in their dtypes."""
    return cpu.gradients(grad_output, grad_lse, output, lse, *args)


@block_sparse_attention_backward.register_fake
def _(
    grad_output: Tensor | None, grad_lse: Tensor | None, output: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value, bias = (args[NAMES.index(n)] for n in ("query", "key", "value", "key_bias"))
    found = [t.new_empty(t.shape) for t in (query, key, value)]
    return (*found, query.new_empty(0) if bias is None else bias.new_empty(bias.shape))


def check(*args: Any) -> None:
    """ValueError that names the argument whose shape is wrong."""
    given, name = Arguments(*args), "block_sparse_attention"
    query, key, value, index = given.query, given.key, given.value, given.index
    if not query.dim() == key.dim() == value.dim() == index.dim() == 4:
        raise ValueError(f"{name}: query, key, value and index have 4 dimensions")
    (batch, heads, length, width), (_, groups, keys, _) = query.shape, key.shape
    some, plan_heads, tiles, _ = index.shape
    if heads % groups or heads % plan_heads:
        raise ValueError(
            f"{name}: {heads} query heads, {groups} key heads, {plan_heads} heads of the plan: "
            "the last two must divide the first"
        )
    if plan_heads not in (1, groups, heads) or some not in (1, batch):
        raise ValueError(
            f"{name}: a plan for batch {some} and {plan_heads} heads on batch {batch}, {heads} "
            f"query and {groups} key heads; heads must be one of these or 1"
        )
    expect(
        name,
        ("key", key, (batch, groups, keys, width)),
        ("value", value, (batch, groups, keys, value.shape[3])),
        ("count", given.count, (some, plan_heads, tiles)),
        ("full", given.full, (some, plan_heads, tiles)),
        ("mask", given.mask, (batch, keys)),
        ("pos_q", given.pos_q, (some, plan_heads, length)),
        ("pos_k", given.pos_k, (some, plan_heads, keys)),
        ("group_q", given.group_q, (some, plan_heads, length)),
        ("group_k", given.group_k, (some, plan_heads, keys)),
        ("key_bias", given.key_bias, (some, plan_heads, keys)),
    )
    if tiles != (length + given.block_q - 1) // given.block_q:
        raise ValueError(
            f"{name}: a plan of {tiles} query blocks of {given.block_q} for {length} queries"
        )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.save_for_backward(*output, *(inputs[i] for i in ctx.tensors))
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    output, lse, *saved = ctx.saved_tensors
    args: list[Any] = list(ctx.others)
    for i, tensor in zip(ctx.tensors, saved, strict=True):
        args[i] = tensor
    found = block_sparse_attention_backward(grad_output, grad_lse, output, lse, *args)
    result: list[Tensor | None] = [None] * len(args)
    for name, gradient in zip(("query", "key", "value", "key_bias"), found, strict=True):
        i = NAMES.index(name)
        if ctx.needs_input_grad[i]:
            result[i] = gradient
    return tuple(result)


block_sparse_attention.register_autograd(_backward, setup_context=_setup)
register_mixer(block_sparse_attention, MixerSpec("kv_append", normalised=True))
register_cpu(block_sparse_attention)
register_autocast(block_sparse_attention, "query", "key", "value")
register_triton(block_sparse_attention)


@block_sparse_attention_backward.register_kernel("cuda")
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from rewriter.kernels.block_sparse_attention import triton

    return triton.gradients(*args)
