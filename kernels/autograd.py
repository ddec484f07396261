"""Autograd and GPU forms, shared by the ops of the dialect."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register_recompute(op: Any, forward: Callable[..., Any]) -> None:
    """Differentiate `op` by re-running `forward` (differentiable torch) in backward.

    Only the inputs are saved, so the memory of a training step is that of its inputs. On a GPU
    the op's Triton `backward` is used where `register_triton` gave one.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.tensors))
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        args: list[Any] = list(ctx.others)
        for i, saved in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            args[i] = saved.detach()
        triton_form = TRITON.get(op._name)
        if triton_form is not None and any(g is not None and g.is_cuda for g in grads):
            found = _load(triton_form).backward(grads, *args)
            return tuple(
                g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=True)
            )
        return _recompute(forward, args, ctx.needs_input_grad, grads)

    op.register_autograd(backward, setup_context=setup)


def _recompute(
    forward: Callable[..., Any],
    args: list[Any],
    needed: tuple[bool, ...],
    grads: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    leaves = {
        i: a.requires_grad_(True)
        for i, a in enumerate(args)
        if isinstance(a, Tensor) and needed[i] and a.is_floating_point()
    }
    with torch.enable_grad():
        outputs = forward(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [
        (o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad
    ]
    result: list[Tensor | None] = [None] * len(args)
    if pairs and leaves:
        found = torch.autograd.grad(
            [o for o, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True
        )
        for i, gradient in zip(leaves, found, strict=True):
            result[i] = gradient
    return tuple(result)


#: Module of an op's Triton form, by the op's name.
TRITON: dict[str, str] = {}


def register_triton(op: Any) -> None:
    """CUDA tensors run `forward` of the `triton.py` beside the op; it is imported when needed.

    The module has `forward(*args)` with the arguments and results of the op,
    `backward(grads, *args)` with one gradient or None for each argument, and
    `compilations()`, the `Compilation`s of its default configurations.
    """
    package = op._init_fn.__module__.rpartition(".")[0]
    TRITON[op._name] = f"{package}.triton"

    def forward(*args: Any) -> Any:
        return _load(TRITON[op._name]).forward(*args)

    op.register_kernel("cuda", forward)


def _load(module: str) -> Any:
    return importlib.import_module(module)
