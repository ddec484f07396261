"""The arguments of `rewriter::attention`, for all forms of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Arguments:
    """In the order of the op.

    query: [B, H, L, D]. The queries are the last L of the sequence.
    key: [B, Hk, S, D], Hk divides H; query head h reads key head h // (H // Hk).
    value: [B, Hk, S, Dv].
    mask: [B, S] (true: a real token) or [B or 1, H or 1, L, S] (true: visible).
    bias: added to the logits, broadcastable to [B, H, L, S] (ALiBi, relative positions).
    sink_logits: [H], one learned logit a head that only takes part in the normaliser.
    key_positions: [B, S] int, the column of each key, for a cache that has dropped some; its
        first `sinks` slots hold the sinks, and its largest entry is the last query.
    scale: multiplies the logits.
    causal: a query sees keys up to its own column.
    window: 0, or a query sees only keys with |distance| < window (and the sinks).
    chunk: 0, or a query sees only keys of its own chunk of this many columns, counted from the
        first real token of its row (from column 0 without a mask [B, S]).
    sinks: with a window, the first real tokens of a row stay visible.
    softcap: 0, or logits become softcap * tanh(logits / softcap).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    bias: Tensor | None
    sink_logits: Tensor | None
    key_positions: Tensor | None
    scale: float
    causal: bool
    window: int
    chunk: int
    sinks: int
    softcap: float

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def length(self) -> int:
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        return self.key.shape[2]

    @property
    def groups(self) -> int:
        return self.key.shape[1]

    @property
    def padding(self) -> Tensor | None:
        """The mask, if it is [B, S]."""
        return self.mask if self.mask is not None and self.mask.dim() == 2 else None

    @property
    def dense(self) -> Tensor | None:
        """The mask, if it is [B or 1, H or 1, L, S]."""
        return self.mask if self.mask is not None and self.mask.dim() == 4 else None
