"""Choosing the next token from its logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rewriter.errors import RewriterError


@dataclass
class Sampler:
    """Greedy at temperature 0, otherwise a draw from softmax(logits / temperature).

    top_p: draw from the fewest tokens whose probabilities sum to at least this. top_k: and from
    at most this many (0: all). seed: of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    random: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise RewriterError(
                f"temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}",
                "temperature >= 0, 0 < top_p <= 1, top_k >= 0",
            )
        self.random = np.random.default_rng(self.seed)

    def __call__(self, logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Token of each row of logits [B, V], int64 [B]."""
        if self.temperature == 0:
            return logits.argmax(-1).astype(np.int64)
        return np.array([self._draw(row) for row in logits.astype(np.float64)], dtype=np.int64)

    def _draw(self, logits: np.ndarray[Any, Any]) -> int:
        order = np.argsort(-logits, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        weights = np.exp((logits[order] - logits[order[0]]) / self.temperature)
        weights /= weights.sum()
        before = np.cumsum(weights) - weights  # the most likely token always stays
        order, weights = order[before < self.top_p], weights[before < self.top_p]
        return int(self.random.choice(order, p=weights / weights.sum()))
