"""Comparing the forms of one op: values and all gradients, against the reference in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def assert_close(actual: Tensor, expected: Tensor, name: str = "", limit: float = 1e-5) -> None:
    """Relative root mean square error; NaN and infinity fail."""
    assert actual.shape == expected.shape, name
    if expected.numel():
        error = (actual.double() - expected.double()).square().mean().sqrt()
        scale = expected.double().square().mean().sqrt()
        assert error <= limit * scale, f"{name}: {error / scale:.2e}"


def triton_form(module: Any) -> Callable[..., Any]:
    """The `forward` and `backward` of a `triton.py`, as autograd calls them on a GPU."""
    names = [n for n in inspect.signature(module.forward).parameters if n != "one_by_one"]

    class Form(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.args = args
            return module.forward(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            args = (a.detach() if isinstance(a, Tensor) else a for a in ctx.args)
            return module.backward(grads, *args)

    defaults = {n: p.default for n, p in inspect.signature(module.forward).parameters.items()}

    def form(**inputs: Any) -> Any:
        return Form.apply(*(inputs.get(n, defaults[n]) for n in names))

    return form


def values_and_gradients(
    form: Callable[..., Any], inputs: dict[str, Tensor], **options: Any
) -> dict[str, Tensor]:
    """Results by number and gradients by name, of a random projection of all results."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    outputs = form(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator().manual_seed(9)
    loss = sum(
        (o * torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype)).sum()
        for o in outputs
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    results = {f"result {i}": o for i, o in enumerate(outputs)}
    return results | dict(zip(leaves, gradients, strict=True))


def compare(
    form: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: dict[str, Tensor],
    limit: float = 1e-5,
    **options: Any,
) -> None:
    """`form` in float32 against `reference` in float64."""
    truth = values_and_gradients(reference, {n: t.double() for n, t in inputs.items()}, **options)
    for name, value in values_and_gradients(form, inputs, **options).items():
        assert_close(value, truth[name], name, limit)


def with_junk(inputs: dict[str, Tensor], mask: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """NaN wherever the mask [B, T] is 0, in the tensors [B, T, ...] of these names."""
    gone = ~mask.bool()
    return {
        n: t.masked_fill(gone.reshape(*gone.shape, *[1] * (t.dim() - 2)), float("nan"))
        if n in names
        else t
        for n, t in inputs.items()
    }
