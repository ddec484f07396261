"""Losses of recovery. All are means over real tokens, so weights do not depend on length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from rewriter.recover.fast import kl


def positions_at_once(x: Tensor) -> int:
    """Positions whose logits exist at once: few in a CPU's cache, many for a GPU's processors."""
    return 256 if x.device.type == "cpu" else 1024


def relative_error(made: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Σ|made - truth|² / Σ|truth|² over real tokens; values [B, L, D], mask [B, L]."""
    difference = (made.float() - truth.float()).square().sum(-1)
    scale = truth.float().square().sum(-1)
    if mask is not None:
        difference, scale = difference * mask, scale * mask
    return difference.sum() / scale.sum().clamp_min(1e-30)


def logits_loss(kind: str, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Distance of two rows of logits [N, V], one value a row.

    kl: τ² KL(teacher ‖ student). rkl: τ² KL(student ‖ teacher). jsd: the mean of both against
    their middle, times τ². ce: cross-entropy with the teacher's first choice. l2: |Δ|² / V.
    """
    student, teacher = student.float(), teacher.float()
    if kind == "ce":
        return cross_entropy(student, teacher.argmax(-1), reduction="none")
    if kind == "l2":
        return (student - teacher).square().mean(-1)
    if kind == "kl" and temperature == 1:
        return kl(student, teacher)
    p = log_softmax(teacher / temperature, -1)
    q = log_softmax(student / temperature, -1)
    if kind == "kl":
        value = (p.exp() * (p - q)).sum(-1)
    elif kind == "rkl":
        value = (q.exp() * (q - p)).sum(-1)
    else:
        middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, device=p.device))
        value = (p.exp() * (p - middle)).sum(-1) / 2 + (q.exp() * (q - middle)).sum(-1) / 2
    return value * temperature**2


class _Known(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return (None, None, *(g * grad for g in ctx.gradients))


def known_gradients(loss: Tensor, tensors: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """`loss` as a function of `tensors` with these gradients: its graph can be freed at once.

    Backward through the result is ordinary, so data parallelism, sharding and accumulation
    see nothing unusual.
    """
    return _Known.apply(loss.detach(), tuple(gradients), *tensors)


def in_chunks(
    loss: Callable[[Tensor, slice], Tensor], hidden: Tensor, trained: list[Tensor], training: bool
) -> Tensor:
    """Sum of `loss(rows of hidden, where)` over chunks of positions [N, D].

    The graph of a chunk (its logits are large) is freed before the next one. `trained` are the
    parameters that `loss` uses besides.
    """
    rows, chunk = hidden.shape[0], positions_at_once(hidden)
    total = torch.zeros((), device=hidden.device)
    if not training:
        for start in range(0, rows, chunk):
            where = slice(start, start + chunk)
            total = total + loss(hidden[where], where)
        return total
    gradient = torch.empty_like(hidden)
    sums = [torch.zeros_like(t) for t in trained]
    for start in range(0, rows, chunk):
        where = slice(start, start + chunk)
        part = hidden[where].detach().requires_grad_(True)
        with torch.enable_grad():
            value = loss(part, where)
        found = torch.autograd.grad(value, [part, *trained], allow_unused=True)
        gradient[where] = found[0]
        for total_of, new in zip(sums, found[1:], strict=True):
            if new is not None:
                total_of += new
        total = total + value.detach()
    return known_gradients(total, [hidden, *trained], [gradient, *sums])
