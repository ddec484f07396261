"""Causal attention to a window with sinks and linear attention over everything older."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch import Tensor
from torch.fx import Node

from rewriter.errors import PlanError, VerifyError
from rewriter.graph import Attention, Graph, argument, aten
from rewriter.kernels.hybrid_attention import reference
from rewriter.passes import _hybrid_linear_liger as liger
from rewriter.passes._hybrid_linear_fit import centroids, fit_gates
from rewriter.passes._hybrid_linear_maps import LEARNED, Maps, features, map_tensors
from rewriter.passes._region import Caller, Region
from rewriter.protocol import Calibration, Contract, Made, NearMiss, Pass, PassConfig, Site

HYBRID = torch.ops.rewriter.hybrid_attention.default
ARGUMENTS = ("query", "key", "value", "mask")


class Config(PassConfig):
    """Options of `hybrid_linear`.

    variant: shared_normaliser, or liger: the mean of a sliding softmax window and gated linear
        attention over all tokens, of keys and queries before their positions; no new parameter.
        As published with sinks: 0. Its own options are gate_normaliser (the log decay of a key
        channel is logsigmoid(k) / 16) and mix (the share of the linear part); of the others it
        has window and sinks only.
    window: tokens of a block; a query sees its own block and the one before exactly (window_kind
        block, the "terrace" of LoLCATs), or its latest `window` tokens (sliding).
    sinks: first tokens of a sequence that every query sees exactly.
    feature_map: centroid: φ_k assigns a key to k-means centres and φ_q weighs these by e^{q·c};
        starts close to softmax. hedgehog_split, hedgehog_joint: softmax of xW and -xW, each or
        together, from the identity; t2r: relu(xW + b); elu1, exp, identity: without a matrix.
    feature_dim: features of a head, where the map has a matrix.
    key_features: of each key head, or one set for each query head (a state as often as large).
    reference: what far weights are relative to: nothing, or the largest or the mean weight in
        the query's window. LoLCATs: max.
    gates: query_key: the far branch's weight depends on the query, a key's on the key; head: a
        constant a head.
    gate_init: fit on the calibration text, or the far branch's weight (LoLCATs: 10, its 1 / γ).
    far_cap: number of far tokens from which on their mass grows no more; 0: no limit.
    """

    variant: Literal["shared_normaliser", "liger"] = "shared_normaliser"
    window: PositiveInt = 64
    window_kind: Literal["block", "sliding"] = "block"
    sinks: NonNegativeInt = 4
    feature_map: Literal[
        "centroid", "hedgehog_split", "hedgehog_joint", "t2r", "elu1", "exp", "identity"
    ] = "centroid"
    feature_dim: PositiveInt = 128
    key_features: Literal["kv_heads", "heads"] = "kv_heads"
    reference: Literal["none", "max", "mean"] = "none"
    gates: Literal["query_key", "head"] = "query_key"
    gate_init: Literal["fit"] | NonNegativeFloat = "fit"
    far_cap: NonNegativeFloat = 1024.0
    gate_normaliser: PositiveFloat = 16.0
    mix: float = Field(0.5, ge=0, le=1)
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.sinks > self.window:
            raise ValueError(f"{self.sinks} sinks do not fit into a window of {self.window}")
        if self.gate_init == 0:
            raise ValueError("gate_init: 0 has no logarithm: use the pass `sliding_window`")
        if self.feature_map.startswith("hedgehog") and self.feature_dim % 2:
            raise ValueError("hedgehog has as many features of x as of -x: feature_dim is even")
        own, shared = {"gate_normaliser", "mix"}, {"variant", "window", "sinks", "seed"}
        other = set(Config.model_fields) - set(PassConfig.model_fields) - own - shared
        wrong = sorted(self.model_fields_set & (other if self.variant == "liger" else own))
        if wrong:
            raise ValueError(f"variant {self.variant} has no option {wrong[0]}")
        return self


@dataclass(frozen=True)
class _Promise:
    """The maps of a site (none: liger), and the nodes of the original that it reads, by role."""

    maps: Maps | None
    reads: dict[str, str]
    scale: float
    facts: dict[str, Any]


class HybridLinear(Pass):
    """Softmax over a window and the first tokens, linear attention over all tokens between.

    One normaliser for both; the attention's projections and positions stay. Decoding keeps a
    ring of keys and a matrix a head, whatever the length.
    Contract: needs recovery. Exact while a sequence has at most `window` tokens.
    Source: LoLCATs, Zhang et al., arXiv 2410.10254; sinks as in StreamingLLM, arXiv 2309.17453.
    """

    name, contract = "hybrid_linear", Contract.NEEDS_RECOVERY
    Config = Config
    needs_calibration = True
    learning_rates = {"transfer": {"new": 3e-3, "copied": 2e-4, "gate": 1e-2}}

    def __init__(self, config: PassConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        c = self.config
        self.needs_calibration = (  # type: ignore[misc]
            c.variant != "liger" and (c.gate_init == "fit" or c.feature_map == "centroid")
        )
        self._promised: dict[str, _Promise] = {}
        self._regions: dict[str, Region] = {}

    def sites(self, graph: Graph) -> Iterator[Site | NearMiss]:
        for a in graph.attention:
            reason = _reason(a)
            if reason is None and self.config.variant == "liger":
                reason = liger.reason(a)
            if reason is not None:
                yield NearMiss(a.path, a.node, reason, a.layer)
            else:
                yield Site(a.path, a.node, a.layer, a.kind)

    def prepare(self, graph: Graph, sites: list[Site], calibration: Calibration | None) -> None:
        """Place the centroids and fit the gates on the original's queries, keys and values.

        Raises:
            PlanError: there is something to fit and no calibration text.
        """
        self._promised = {}
        if self.needs_calibration and calibration is None:
            raise PlanError(
                "hybrid_linear starts from a fit on text, and there is none",
                "give calibration data, or set `gate_init: 10` and `feature_map: hedgehog_split` "
                "for a start that needs training",
            )
        groups = [[argument(s.node, n) for n in ARGUMENTS[:3]] for s in sites]
        seen: Iterator[list[dict[Node, Tensor]]] = ([] for _ in sites)
        if self.needs_calibration and calibration is not None:
            seen = calibration.sequences(groups)
        for site, values in zip(sites, seen, strict=True):
            given = {n: argument(site.node, n) for n in ARGUMENTS}
            reads = {n: node.name for n, node in given.items() if node is not None}
            maps: Maps | None = None
            facts: dict[str, Any] = {}
            if self.config.variant == "liger":
                region = liger.region_of(_attention(graph, site))
                self._regions[site.name] = region
                reads |= liger.reads(region)
            else:
                rows = [tuple(v[given[n]] for n in ARGUMENTS[:3]) for v in values]
                maps, facts = self._start(site, rows)
            scale = argument(site.node, "scale")
            self._promised[site.name] = _Promise(maps, reads, scale, facts)

    def _start(self, site: Site, seen: list[Any]) -> tuple[Maps, dict[str, Any]]:
        c, node = self.config, site.node
        query, key = (argument(node, n).meta["val"] for n in ARGUMENTS[:2])
        scale, heads, kv_heads = argument(node, "scale"), query.shape[1], key.shape[1]
        like = seen[0][0] if seen else torch.empty(0, dtype=query.dtype, device=query.device)
        groups = kv_heads if c.key_features == "kv_heads" else heads
        seed = c.seed + (site.layer or 0)
        tensors = _initial(c, seen, like, heads, groups, query.shape[3], scale, seed)
        maps = Maps(c.feature_map, tensors, heads, groups)
        if c.gate_init != "fit":
            return maps, {}
        return fit_gates(maps, seen, c, scale, c.gates == "query_key")

    def rewrite(self, graph: Graph, site: Site) -> Made:
        c, node = self.config, site.node
        promise = self._promised[site.name]
        query, key, value, mask = (argument(node, n) for n in ARGUMENTS)
        facts = {"variant": c.variant, "window": c.window, "sinks": c.sinks}
        with graph.module.graph.inserting_before(node):
            call = Caller(graph, f"{site.name}.hybrid_linear", node)
            latest = None
            if mask is not None:  # of the whole sequence: the last L columns are this call's
                length = call(aten.sym_size.int, query, 2)
                start = call(operator.neg, length)
                latest = call(aten.slice.Tensor, mask, 1, start, 2**63 - 1)
            if promise.maps is None:
                y = liger.build(call, _attention(graph, site), latest, c)
                node.replace_all_uses_with(y)
                return Made(output=y, facts=facts)
            p = {n: call.tensor(n, t) for n, t in promise.maps.tensors.items()}
            dtype = query.meta["val"].dtype
            query_features, key_features, gate = features(call, query, key, p, promise.maps, dtype)
            made = call(
                HYBRID, query, key, value, query_features, key_features, gate, latest,
                *(None,) * 8, promise.scale, c.window, c.window_kind == "block", c.sinks,
                c.reference, c.far_cap,
            )  # fmt: skip
            y = call(operator.getitem, made, 0)
        node.replace_all_uses_with(y)
        return Made(y, facts={**facts, "feature_map": c.feature_map, **promise.facts})

    # ---- what the gate compares with -----------------------------------------------------

    def check(self, graph: Graph, site: Site, made: Made) -> None:
        """The mixer has the plan's options, leaves out padding, and starts without a past."""
        node, c = made.output.args[0], self.config
        promise = self._promised[site.name]
        if promise.maps is None:
            return liger.check(graph, site.name, "mask" in promise.reads, c)
        if not isinstance(node, Node) or node.target is not HYBRID:
            raise VerifyError(f"{site.name}: {made.output.name} is no hybrid attention")
        wanted = {
            "count": None,
            "scale": promise.scale,
            "window": c.window,
            "block_aligned": c.window_kind == "block",
            "sinks": c.sinks,
            "reference": c.reference,
            "far_cap": c.far_cap,
        }
        for name, value in wanted.items():
            if argument(node, name) != value:
                raise VerifyError(f"{node.name}: {name} is {argument(node, name)}, not {value}")
        if (argument(node, "mask") is None) != ("mask" not in promise.reads):
            raise VerifyError(f"{node.name}: its mask is wrong after the rewrite")

    def needs(self, site: Site) -> list[str]:
        promise = self._promised.get(site.name)
        return list(promise.reads.values()) if promise else []

    def expected(self, site: Site, original: Callable[[str], Any], output: Tensor) -> Tensor | None:
        """The quadratic form in float64, from the original's own queries, keys and values."""
        promise = self._promised.get(site.name)
        if promise is None:
            return None
        c = self.config
        query, key, value = (original(promise.reads[n]).double() for n in ARGUMENTS[:3])
        mask = original(promise.reads["mask"]) if "mask" in promise.reads else None
        if promise.maps is None:
            rows = {n: original(promise.reads[n]).double() for n in liger.ROLES}
            region = self._regions[site.name]
            return liger.expected(region, rows, query, key, value, mask, promise.scale, c)
        if mask is not None:
            mask = mask[:, mask.shape[1] - query.shape[2] :]
        return reference.hybrid_attention(
            query,
            key,
            value,
            *map_tensors(query, key, promise.maps),
            mask,
            scale=promise.scale,
            window=c.window,
            block_aligned=c.window_kind == "block",
            sinks=c.sinks,
            reference=c.reference,
            far_cap=c.far_cap,
        )


def _attention(graph: Graph, site: Site) -> Attention:
    return next(a for a in graph.attention if a.node is site.node)


def _reason(a: Attention) -> str | None:
    """Why this attention cannot become a window with linear attention behind it, or None."""
    get = lambda name: argument(a.node, name)  # noqa: E731
    if not get("causal"):
        return "bidirectional: the window and the far tokens are defined for causal attention"
    if a.dense_mask:
        return "its mask is a dense [L, S] tensor, not a padding mask of tokens"
    for name, words in (("window", "a window of"), ("chunk", "chunks of")):
        if get(name):
            return f"already sees only {words} {get(name)} tokens: there is nothing far to add"
    if get("softcap"):
        return f"its logits are capped at {get('softcap'):g}, which the exact part would drop"
    if get("bias") is not None:
        return "a bias is added to its logits, which the far tokens' features cannot hold"
    if get("sink_logits") is not None:
        return "its normaliser has learned sink logits, which the hybrid would drop"
    query, key = a.query_projection, a.key_projection
    if query is not None and key is not None and query.input is not key.input:
        return "cross-attention: key and query are projections of different values"
    return None


def _initial(
    c: Config,
    seen: list[Any],
    like: Tensor,
    heads: int,
    groups: int,
    width: int,
    scale: float,
    seed: int,
) -> dict[str, Tensor]:
    """The maps' tensors before the gates are fitted; maps as `like`, gates in float32."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    zeros = lambda *shape: torch.zeros(*shape, dtype=wide, device=like.device)  # noqa: E731
    gate = zeros(heads)
    if c.gate_init != "fit":
        gate += torch.tensor(c.gate_init, dtype=wide).log()
    tensors = {"gate": gate}
    if c.gates == "query_key":
        tensors["query_gate"] = zeros(heads, width)
        tensors["key_gate.weight"], tensors["key_gate.bias"] = zeros(groups, width), zeros(groups)
    if c.feature_map not in LEARNED:
        return tensors
    if c.feature_map == "centroid":
        centre, spread = centroids([k for _, k, _ in seen], c.sinks, c.feature_dim, seed)
        by_query = centre.repeat_interleave(heads // len(centre), 0)
        by_key = centre.repeat_interleave(groups // len(centre), 0)
        sharp = (1 / spread).repeat_interleave(groups // len(centre), 0)
        made = {
            "query_map.weight": by_query * scale,
            "query_map.bias": zeros(*by_query.shape[:2]),
            "key_map.weight": by_key * sharp[:, None, None],
            "key_map.bias": by_key.square().sum(-1) * sharp[:, None] / -2,
        }
    else:
        rows = c.feature_dim // 2 if c.feature_map.startswith("hedgehog") else c.feature_dim
        identity = torch.eye(width, device=like.device)[torch.arange(rows) % width]
        made = {
            "query_map.weight": identity.expand(heads, -1, -1),
            "key_map.weight": identity.expand(groups, -1, -1),
        }
        if c.feature_map == "t2r":
            made |= {"query_map.bias": zeros(heads, rows), "key_map.bias": zeros(groups, rows)}
    return tensors | {n: t.to(like).clone() for n, t in made.items()}
