"""Autograd by recomputation, shared by the ops of the dialect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register_recompute(op: Any, forward: Callable[..., Any]) -> None:
    """Differentiate `op` by re-running `forward` (differentiable torch) in backward.

    Only the inputs are saved, so the memory of a training step is that of its inputs.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.tensors))
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        args: list[Any] = list(ctx.others)
        leaves: list[tuple[int, Tensor]] = []
        for i, saved in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            value = saved.detach()
            if ctx.needs_input_grad[i] and value.is_floating_point():
                value.requires_grad_(True)
                leaves.append((i, value))
            args[i] = value
        with torch.enable_grad():
            outputs = forward(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [
            (o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad
        ]
        result: list[Tensor | None] = [None] * len(args)
        if pairs and leaves:
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [x for _, x in leaves],
                [g for _, g in pairs],
                allow_unused=True,
            )
            for (i, _), gradient in zip(leaves, found, strict=True):
                result[i] = gradient
        return tuple(result)

    op.register_autograd(backward, setup_context=setup)
