"""Causal attention that keeps the first tokens and the latest ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.fx import Node

from rewriter.errors import VerifyError
from rewriter.graph import ATTENTION, ATTENTION_ARGS, Attention, Graph, argument, set_argument
from rewriter.protocol import Calibration, Contract, Made, NearMiss, Pass, PassConfig, Site


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

    def __init__(self, config: PassConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self._before: dict[str, dict[str, Any]] = {}

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

    def prepare(self, graph: Graph, sites: list[Site], calibration: Calibration | None) -> None:
        """Note every site's arguments as they are: literals, and values by their node's name."""
        self._before = {}
        for site in sites:
            given = {name: argument(site.node, name) for name in ATTENTION_ARGS}
            self._before[site.name] = {
                k: v.name if isinstance(v, Node) else v for k, v in given.items()
            }

    def rewrite(self, graph: Graph, site: Site) -> Made:
        node, sinks = site.node, self.config.sinks
        if argument(node, "window"):  # it never saw its first tokens: do not show it new ones
            sinks = min(sinks, argument(node, "sinks"))
        set_argument(node, "window", self.config.window)
        set_argument(node, "sinks", sinks)
        return Made(output=node, facts={"window": self.config.window, "sinks": sinks})

    # ---- what the gate compares with -----------------------------------------------------

    def _sinks(self, before: dict[str, Any]) -> int:
        old = before["sinks"] if before["window"] else self.config.sinks
        return min(self.config.sinks, old)

    def check(self, graph: Graph, site: Site, made: Made) -> None:
        """Only the window and the sinks differ from the attention that was there."""
        if (before := self._before.get(site.name)) is None:
            return
        if made.output.target is not ATTENTION:
            raise VerifyError(f"{site.name}: {made.output.name} is no attention")
        wanted = {**before, "window": self.config.window, "sinks": self._sinks(before)}
        for name, value in wanted.items():
            found = argument(made.output, name)
            found = found.name if isinstance(found, Node) else found
            if found != value:
                raise VerifyError(f"{site.name}: {name} is {found} after the rewrite, not {value}")

    def needs(self, site: Site) -> list[str]:
        before = self._before.get(site.name, {})
        return [v for v in before.values() if isinstance(v, str)]

    def expected(self, site: Site, original: Callable[[str], Any], output: Tensor) -> Tensor | None:
        """Softmax over the tokens that a query may see, in float64, head by head."""
        before = self._before.get(site.name)
        if before is None or before["key_positions"] is not None:
            return None
        given = {k: original(v) if isinstance(v, str) else v for k, v in before.items()}
        query, key, value = (given[n].double() for n in ("query", "key", "value"))
        (batch, heads, length, _), (kv_heads, total) = query.shape, key.shape[1:3]
        real = torch.ones(batch, total, dtype=torch.bool, device=query.device)
        real = real if given["mask"] is None else given["mask"].bool()
        column = torch.arange(total, device=query.device)
        distance = column[total - length :, None] - column[None, :]
        first = real.long().cumsum(1) - 1 < self._sinks(before)  # tokens before it in its row
        near = (distance >= 0) & (distance < self.config.window)
        seen = (near | ((distance >= 0) & first[:, None, :])) & real[:, None, :]  # [B, L, S]
        made = torch.empty(batch, length, heads, value.shape[3], dtype=torch.float64)
        for head in range(heads):
            group = head // (heads // kv_heads)
            logits = torch.einsum("bld,bsd->bls", query[:, head], key[:, group]) * given["scale"]
            if given["softcap"]:
                logits = given["softcap"] * (logits / given["softcap"]).tanh()
            if given["bias"] is not None:
                shape = (batch, heads, length, total)
                logits = logits + given["bias"].expand(shape)[:, head].double()
            logits = logits.masked_fill(~seen, -torch.inf)
            if given["sink_logits"] is not None:  # one more column, of no value
                extra = given["sink_logits"][head].double().expand(batch, length, 1)
                logits = torch.cat([logits, extra], -1)
            weights = logits.softmax(-1).nan_to_num()[..., :total]
            made[:, :, head] = torch.einsum("bls,bsd->bld", weights, value[:, group])
        return made
