"""Cheaper derivatives for training pieces on the CPU; the values are those of the ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu


class _Conv(torch.autograd.Function):
    """Depthwise causal convolution of [B, T, C] by [C, k], with sums in place of broadcasts."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.bias = bias is not None
        k = weight.shape[1]
        length = inputs.shape[1] - k + 1
        y = inputs[:, :length] * weight[:, 0]
        for i in range(1, k):
            y.addcmul_(inputs[:, i : i + length], weight[:, i])
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs, weight = ctx.saved_tensors
        k, length = weight.shape[1], grad.shape[1]
        of_inputs = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_inputs = torch.zeros_like(inputs)
            for i in range(k):
                of_inputs[:, i : i + length].addcmul_(grad, weight[:, i])
        if ctx.needs_input_grad[1]:
            sums = [(grad * inputs[:, i : i + length]).sum((0, 1)) for i in range(k)]
            of_weight = torch.stack(sums, 1)
        if ctx.bias and ctx.needs_input_grad[2]:
            of_bias = grad.sum((0, 1))
        return of_inputs, of_weight, of_bias


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> tuple[Tensor, None]:
    """`rewriter::causal_conv1d` without a past: y alone, no final state."""
    assert state is None, "training starts without a past"
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if mask is not None and not bool(mask.all()):
        x = x.masked_fill(~mask.bool()[..., None], 0)
    past = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    inputs = torch.cat([past, x], 1).to(wide)
    y = _Conv.apply(inputs, weight.to(wide), None if bias is None else bias.to(wide))
    y = silu(y) if activation == "silu" else y
    return y.to(x.dtype), None


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`rewriter::ssd`, differentiated through instead of computed twice."""
    from rewriter.kernels.ssd import cpu

    if mask is not None and bool(mask.all()):
        mask = None
    return cpu.ssd(x, dt, A, B, C, D, state, mask)


def attention(
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
) -> Tensor:
    """`rewriter::attention`; plain causal attention keeps what its backward would recompute."""
    length = query.shape[2]
    extra = (bias, sink_logits, key_positions)
    plain = all(x is None for x in extra) and not chunk and not softcap
    plain = plain and length == key.shape[2] and (not window or window >= length)
    if plain and (mask is None or (mask.dim() == 2 and bool(mask.all()))):
        gqa = query.shape[1] != key.shape[1]
        made = scaled_dot_product_attention(
            query, key, value, is_causal=causal and length > 1, scale=scale, enable_gqa=gqa
        )
        return made.transpose(1, 2)
    return torch.ops.rewriter.attention(
        query, key, value, mask, *extra, scale, causal, window, chunk, sinks, softcap
    )


def cut(value: Tensor, dim: int, sizes: list[int]) -> tuple[Tensor, ...]:
    """Parts of these sizes, and what is left: one concatenation in backward."""
    rest = value.shape[dim] - sum(sizes)
    return value.split([*sizes, rest] if rest else sizes, dim)


class _KL(torch.autograd.Function):
    """KL(teacher ‖ student) of every row [N, V] at temperature 1."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        p, q = teacher.softmax(-1), student.softmax(-1)
        gap = (p.unsqueeze(-2) @ (teacher - student).unsqueeze(-1)).flatten()
        value = gap - _log_sum(teacher, p) + _log_sum(student, q)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(q.sub_(p))
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None], None


def _log_sum(logits: Tensor, probabilities: Tensor) -> Tensor:
    """logsumexp of every row, from the probability of its largest entry."""
    largest, where = logits.max(-1)
    return largest - probabilities.gather(-1, where[:, None])[:, 0].log()


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) in nats, one value a row [N, V]; only the student gets a gradient."""
    return _KL.apply(student, teacher.detach())


def hybrid_attention(*arguments: Any) -> tuple[Tensor, ...]:
    """`rewriter::hybrid_attention`, differentiated through instead of computed twice."""
    from rewriter.kernels.hybrid_attention import cpu

    return cpu.hybrid_attention(*arguments)


#: What a training piece calls for an op of ours on the CPU, by the op's name.
FORMS = {
    "attention": attention,
    "causal_conv1d": causal_conv1d,
    "hybrid_attention": hybrid_attention,
    "ssd": ssd,
}
