"""Causal attention that keeps the first tokens and the latest ones."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import NonNegativeInt, PositiveInt

from rewriter.graph import Attention, Graph, argument, set_argument
from rewriter.protocol import Contract, Made, NearMiss, Pass, PassConfig, Site


class SlidingWindow(Pass):
    """Causal attention sees its `sinks` first and `window` latest tokens.

    Contract: approximate; exact while a sequence has at most `window` tokens. The state of a
    rewritten layer is a ring of `sinks + window` keys.
    Source: StreamingLLM, Xiao et al., arXiv 2309.17453 (keys keep their own positions here).
    """

    name, contract = "sliding_window", Contract.APPROXIMATE

    class Config(PassConfig):
        """window: latest tokens a query sees, itself included. sinks: first tokens it sees."""

        window: PositiveInt
        sinks: NonNegativeInt = 4

    def sites(self, graph: Graph) -> Iterator[Site | NearMiss]:
        for a in graph.attention:
            if (reason := self._reason(a)) is not None:
                yield NearMiss(a.path, a.node, reason, a.layer)
            else:
                yield Site(a.path, a.node, a.layer, a.kind)

    def _reason(self, a: Attention) -> str | None:
        """Why this attention gets no window, or None."""
        window = argument(a.node, "window")
        if not argument(a.node, "causal"):
            return "bidirectional: the window and the sinks are defined for causal attention"
        if a.dense_mask:
            return "its mask is a dense [L, S] tensor, which may hide the sinks or the window"
        if argument(a.node, "chunk"):
            return f"already sees only chunks of {argument(a.node, 'chunk')} tokens"
        if window and window <= self.config.window:
            return f"already has a window of {window}, no wider than {self.config.window}"
        return None

    def rewrite(self, graph: Graph, site: Site) -> Made:
        node, sinks = site.node, self.config.sinks
        if argument(node, "window"):  # it never saw its first tokens: do not show it new ones
            sinks = min(sinks, argument(node, "sinks"))
        set_argument(node, "window", self.config.window)
        set_argument(node, "sinks", sinks)
        return Made(output=node, facts={"window": self.config.window, "sinks": sinks})
