"""Softmax over a window and the first tokens, linear attention over everything between them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rewriter.kernels.hybrid_attention import op

__all__ = ["HybridState", "hybrid_attention"]


class HybridState(NamedTuple):
    """What the op carries, all of fixed size, batch first. R = 2 window, or window if sliding.

    Tokens are counted by rank: the number of real tokens before them in their row. Rank t lies
    in slot t % R of the rings; slots not written yet hold zeros.

    ring_key: [B, Hk, R, D]. ring_value: [B, Hk, R, Dv]. ring_features: [B, G, R, F].
    sink_key: [B, Hk, sinks, D]. sink_value: [B, Hk, sinks, Dv]; rank t in slot t.
    far_value: [B, G, F, Dv], Σ φ_k(k_j) v_jᵀ over all j that the next token sees as far.
    far_mass: [B, G, F], Σ φ_k(k_j) over the same; both float32 (float64 for float64 inputs).
    count: [B] int64, real tokens so far.
    """

    ring_key: Tensor
    ring_value: Tensor
    ring_features: Tensor
    sink_key: Tensor
    sink_value: Tensor
    far_value: Tensor
    far_mass: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody asks for


def hybrid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    gate: Tensor,
    mask: Tensor | None = None,
    state: HybridState | None = None,
    *,
    scale: float,
    window: int,
    block_aligned: bool = True,
    sinks: int = 4,
    reference: str = "none",
    far_cap: float = 0.0,
) -> tuple[Tensor, HybridState]:
    """One normaliser for exact and linear attention.

    y_i = (Σ_{j near} e^{s_ij} v_j + f_i Σ_{j far} φ_q(q_i)·φ_k(k_j) v_j) / (the same with 1
    for v_j), where s_ij = scale q_i·k_j and f_i = exp(gate_i + level_i) min(1, far_cap / n_i)
    for n_i far tokens. Near are the window and the sinks, far is every earlier token.

    Source: LoLCATs, Zhang et al., arXiv 2410.10254 (block_aligned is its "terrace" form).

    Args:
        query: [B, H, L, D], after the rotary embedding. key: [B, Hk, L, D]. value:
            [B, Hk, L, Dv]. Hk divides H; query head h reads key head h // (H // Hk).
        query_features: [B, H, L, F], not negative. key_features: [B, G, L, F], not negative;
            Hk divides G and G divides H.
        gate: [B, H, L] float32, log weight of the far branch.
        mask: [B, L] bool or int; where it is 0 the token is not there and y is 0.
        state: of the tokens before; None at the start.
        window: with block_aligned, the query's block of this many tokens up to itself and the
            whole block before; else the latest `window` tokens, itself included.
        sinks: first tokens of a row that stay exact; at most `window`.
        reference: what far weights are relative to. none: absolute, like e^{s}; max: the
            largest e^{s} of the query's window (LoLCATs); mean: the mean one.
        far_cap: from this number of far tokens on their mass grows no more; 0: no limit.

    Returns:
        y: [B, L, H, Dv] in the dtype of query; the state after the last token.

    Raises:
        ValueError: a shape or an option is not as above.
    """
    before = state if state is not None else (None,) * 8
    y, *after = op.hybrid_attention(
        query,
        key,
        value,
        query_features,
        key_features,
        gate,
        mask,
        *before,
        scale,
        window,
        block_aligned,
        sinks,
        reference,
        far_cap,
    )
    return y, HybridState(*after)
