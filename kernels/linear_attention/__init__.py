"""Linear attention and its gated and delta-rule relatives: a K x V state for every head."""

from __future__ import annotations

from torch import Tensor

from rewriter.kernels.linear_attention import op

__all__ = ["linear_attention"]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float = 1.0,
    normalise: bool = False,
    state: Tensor | None = None,
    z: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t u_t^T;  y_t = scale q_t S_t, with u_t = v_t.

    With `beta` (the delta rule) u_t = beta_t (v_t - k_t exp(g_t) S_{t-1}). With `normalise`
    z_t = exp(g_t) z_{t-1} + k_t and y_t = q_t S_t / (q_t . z_t), 0 where the divisor is 0.
    Feature maps are applied outside: `rewriter.kernels.linear_attention.feature_maps`.

    Head counts may differ. There are S states, the largest number of heads among k, v, log_decay
    and beta, and H = max(heads of q, S) outputs. Every count divides H, and what has fewer heads
    is repeated (head h reads h // repeats). So a decay or value per query head makes a state per
    query head (Mamba-2), and without one the queries of a group share a state (GQA).

    Sources: Katharopoulos et al., arXiv 2006.16236 (normalised); Sun et al., arXiv 2307.08621
    (RetNet); Yang et al., arXiv 2312.06635 (GLA, chunks), 2406.06484 (the delta rule in WY form),
    2412.06464 (gated delta rule).

    Args:
        q, k: [B, T, heads, K], after their feature maps; floating point.
        v: [B, T, heads, V].
        log_decay: [B, T, heads] or, one per key channel, [B, T, heads, K]; at most 0. None: 0.
        beta: [B, T, heads], the writing strength of the delta rule, or None.
        scale: multiplies q; without effect when normalised.
        normalise: divide by the running sum; not together with beta.
        state: [B, S, K, V] before the first token; None means zeros.
        z: [B, S, K] when normalised, else [B, S, 0]; None means zeros.
        mask: [B, T] bool or int. Where it is 0 the state passes unchanged, y is 0, and whatever
            the token holds (NaN too) touches nothing.

    Returns:
        y: [B, T, H, V] in the dtype of v.
        final_state: [B, S, K, V], float32 (float64 when v is float64).
        final_z: [B, S, K] when normalised, else [B, S, 0]; dtype as final_state.

    Raises:
        ValueError: a shape is not as above, or beta and normalise are both given.
    """
    return op.linear_attention(q, k, v, log_decay, beta, scale, normalise, state, z, mask)
