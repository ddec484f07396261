"""`long_conv` on a GPU: `torch.fft` calls the vendor's FFT. No kernel of ours would beat it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rewriter.kernels.autograd import _recompute
from rewriter.kernels.kernel import Compilation
from rewriter.kernels.long_conv.cpu import long_conv as forward

__all__ = ["backward", "compilations", "forward"]


def backward(
    grads: Sequence[Tensor | None], u: Tensor, kernel: Tensor, before: int, mask: Tensor | None
) -> tuple[Tensor | None, ...]:
    """One gradient or None for each argument of the op."""
    return _recompute(forward, [u, kernel, before, mask], (True, True, False, False), tuple(grads))


def compilations() -> list[Compilation]:
    """None: there is no kernel."""
    return []
