"""`s4d` on a GPU: the torch form. Its work is in FFTs and matrix products, which torch does best;
the Vandermonde sums are matrix products too, so a kernel of ours would have nothing to add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rewriter.kernels.autograd import _recompute
from rewriter.kernels.kernel import Compilation
from rewriter.kernels.s4d.cpu import s4d as forward

__all__ = ["backward", "compilations", "forward"]


def backward(grads: Sequence[Tensor | None], *args: Any) -> tuple[Tensor | None, ...]:
    """One gradient or None for each argument of the op."""
    needed = tuple(isinstance(a, Tensor) for a in args)
    return _recompute(forward, list(args), needed, tuple(grads))


def compilations() -> list[Compilation]:
    """None: there is no kernel."""
    return []
