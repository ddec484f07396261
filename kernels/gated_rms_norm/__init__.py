"""RMS normalisation in groups with a gate, in both orders."""

from __future__ import annotations

from torch import Tensor

from rewriter.kernels.gated_rms_norm import op

__all__ = ["gated_rms_norm"]


def gated_rms_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    group_size: int | None = None,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
) -> Tensor:
    """u / sqrt(mean_group(u^2) + eps) * weight with u = x silu(gate).

    With `norm_before_gate` u = x, and the result is multiplied by silu(gate).

    Source: Mamba-2's RMSNormGated (arXiv 2405.21060); specs/mixers.md, section 2.

    Args:
        x: [..., C] floating point.
        gate: the shape of x, or None: no gate.
        weight: [C].
        group_size: channels that are normalised together; divides C. None: all of them.
        eps: added to the mean square.
        norm_before_gate: which comes first.

    Returns:
        the shape and dtype of x; computed in float32 (float64 when x is float64).

    Raises:
        ValueError: a shape is not as above.
    """
    size = x.shape[-1] if group_size is None else group_size
    return op.gated_rms_norm(x, gate, weight, size, eps, norm_before_gate)
