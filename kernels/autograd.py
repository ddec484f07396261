"""Autograd, GPU forms and the checks of shapes, shared by the ops of the dialect."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl


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


#: Holds what `register_cpu` registers.
LIBRARY = torch.library.Library("rewriter", "FRAGMENT")


def register_cpu(op: Any) -> None:
    """Plain CPU tensors without a gradient go straight to the op's own function.

    `custom_op` dispatches twice and compares the storages of all arguments and results, 20 µs of
    a decode step's 80; `torch.library.opcheck` compares them in our tests. Everything else (a
    gradient, fake tensors, a dispatch mode) takes `custom_op`'s way.
    """
    run = torch._disable_dynamo(op._init_fn)
    usual = make_autograd_impl(op._opoverload, op)
    cpu, below = torch._C.DispatchKey.CPU, torch._C._after_ADInplaceOrView_keyset

    def autograd(keyset: Any, *args: Any) -> Any:
        plain = (keyset & below).highestPriorityTypeId() == cpu
        if not plain or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return usual(keyset, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return run(*args)

    LIBRARY.impl(op._name, run, "CPU")
    LIBRARY.impl(op._name, autograd, "AutogradCPU", with_keyset=True)


def register_autocast(op: Any, *names: str) -> None:
    """Under autocast these arguments get its type, as those of a matrix product do.

    Without it a rotated float32 query would meet the bfloat16 value of an autocast linear. Ops
    that are a recurrence (ssd, selective_scan) have no such rule: they compute in what they get.
    """
    overload = op._opoverload
    places = [i for i, a in enumerate(overload._schema.arguments) if a.name in names]
    for kind in ("cpu", "cuda"):
        key = getattr(torch._C.DispatchKey, f"Autocast{kind.upper()}")
        LIBRARY.impl(op._name, partial(_autocast, overload, places, kind, key), key.name)


def _autocast(overload: Any, places: list[int], kind: str, key: Any, *args: Any) -> Any:
    dtype, given = torch.get_autocast_dtype(kind), list(args)

    def cast(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [cast(each) for each in x]
        lower = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if lower else x

    for i in places:
        given[i] = cast(given[i])
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        return overload(*given)


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


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast on the device of x; the guard itself costs as much as several small ops."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def expect(op: str, *shapes: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    """ValueError that names the first tensor whose shape is not the one beside it."""
    for name, tensor, shape in shapes:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}, expected {shape}")
