"""Causal attention to a Mamba-2 mixer that starts from the attention's own weights."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor

from rewriter.errors import PlanError, VerifyError
from rewriter.graph import Graph, argument, aten
from rewriter.passes._mamba2_mixer import (
    CONV,
    HALF_LIVES,
    SSD,
    Mixer,
    features,
    fit,
    initial_mixer,
    quadratic,
    state_size,
)
from rewriter.passes._region import Caller, Region, find_region
from rewriter.protocol import Calibration, Contract, Made, NearMiss, Pass, PassConfig, Site


class Config(PassConfig):
    """Options of `mamba2`.

    init: what the tensors that attention does not have start from.
        matvlm: as published; random gate, step and convolution.
        calibrated: convolution of the current token alone, no activation, gate 1, no skip,
            half-lives from 1 to 64 tokens over the heads. The best start after the fit.
        long_decay: the same with half-lives from 8 to 2048.
        linear_attention: neither decay, gate nor norm: y = tril(Q Kᵀ) V.
    fit: output_projection refits the output projection and its bias on the calibration text
        by ridge regression; none leaves it as it was (only a start for training).
    ridge: weight of the penalty, in units of the mean squared feature.
    bias: keep the attention's biases (and the gate's, which inits other than matvlm need).
    """

    init: Literal["calibrated", "matvlm", "long_decay", "linear_attention"] = "calibrated"
    fit: Literal["output_projection", "none"] = "output_projection"
    conv_kernel: PositiveInt = 4
    bias: bool = True
    seed: int = 0
    ridge: NonNegativeFloat = 1e-4

    @model_validator(mode="after")
    def _gate_needs_bias(self) -> Config:
        if not self.bias and self.init in HALF_LIVES:
            raise ValueError(f"init {self.init} keeps its gate open with a bias: set bias: true")
        return self


@dataclass(frozen=True)
class _Promise:
    """The mixer of a site, and what it reads of the original.

    projected: for value, key and query (x, B, C of the mixer) the original's projection and
    which of its outputs count; none where the plan drops the biases they hold.
    """

    mixer: Mixer
    hidden: str
    mask: str | None
    projected: tuple[tuple[str, Tensor], ...] = ()


class Mamba2(Pass):
    """Softmax attention becomes a Mamba-2 layer: C = query, B = key, x = value.

    Positions, softmax and scale are dropped; order comes from the decay and the convolution.
    Contract: needs recovery. init linear_attention with fit none is exactly unnormalised
    causal linear attention.
    Source: MaTVLM, arXiv 2503.13440 (weights); Dao and Gu, arXiv 2405.21060 (the mixer).
    """

    name, contract = "mamba2", Contract.NEEDS_RECOVERY
    Config = Config
    needs_calibration = True
    learning_rates = {"transfer": {"new": 6e-3, "copied": 1.5e-3}}

    def __init__(self, config: PassConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.needs_calibration = self.config.fit != "none"  # type: ignore[misc]
        self._fitted: dict[str, tuple[Mixer, dict[str, Any]]] = {}
        self._promised: dict[str, _Promise] = {}

    def sites(self, graph: Graph) -> Iterator[Site | NearMiss]:
        for a in graph.attention:
            found = find_region(a)
            if isinstance(found, str):
                yield NearMiss(a.path, a.node, found, a.layer)
            else:
                yield Site(a.path, found.output, a.layer, a.kind)

    def prepare(self, graph: Graph, sites: list[Site], calibration: Calibration | None) -> None:
        """Fit every site's output projection to what the original attention put out.

        Uses `calibration.sequences`: the recurrence needs whole sequences, not single tokens.

        Raises:
            PlanError: a fit is asked for and there is no calibration text.
        """
        self._fitted, self._promised = {}, {}
        if self.config.fit == "none":
            for s in sites:
                region = _find(graph, s)
                self._keep(region, self._mixer(graph, region), {})
            return
        if calibration is None:
            raise PlanError(
                "mamba2 fits its output projection on text, and there is none",
                "give calibration data, or set `fit: none` for a start that needs training",
            )
        regions = [_find(graph, s) for s in sites]
        seen = calibration.sequences([[r.hidden, r.output] for r in regions])
        for r, values in zip(regions, seen, strict=True):
            pairs = [(v[r.hidden], v[r.output]) for v in values]
            self._keep(r, *fit(self._mixer(graph, r), pairs, self.config.ridge))

    def _keep(self, region: Region, mixer: Mixer, facts: dict[str, Any]) -> None:
        a = region.attention
        mask = a.mask.name if a.mask is not None else None
        self._fitted[a.path] = mixer, facts
        roles = [(region.projection(n), region.rows[n]) for n in ("value", "key", "query")]
        biased = any(linear.bias is not None for linear, _ in roles)
        projected = tuple((linear.node.name, rows) for linear, rows in roles)
        self._promised[a.path] = _Promise(
            mixer, region.hidden.name, mask, projected if self.config.bias or not biased else ()
        )

    def rewrite(self, graph: Graph, site: Site) -> Made:
        region = _find(graph, site)
        mixer, facts = self._fitted.get(site.name) or (self._mixer(graph, region), {})
        a, path = region.attention, f"{region.attention.path}.mamba2"
        with graph.module.graph.inserting_before(region.output):
            call = Caller(graph, path, region.hidden)
            nodes = {n: call.tensor(n, t) for n, t in mixer.tensors.items()}
            mask = a.mask
            if mask is not None:  # of the whole sequence: the last L columns are this call's
                length = call(aten.sym_size.int, region.hidden, 1)
                start = call(operator.neg, length)
                mask = call(aten.slice.Tensor, mask, 1, start, 2**63 - 1)
            made = features(call, region.hidden, nodes, mixer, mask)
            made = call(
                aten.linear.default, made, nodes["out_proj.weight"], nodes.get("out_proj.bias")
            )
        region.output.replace_all_uses_with(made)
        return Made(
            output=made,
            dropped=region.tensors(),
            facts={"init": self.config.init, "state_floats": state_size(mixer), **facts},
        )

    # ---- what the gate compares with -----------------------------------------------------

    def check(self, graph: Graph, site: Site, made: Made) -> None:
        """Convolution and scan both leave out padding, and start without a past."""
        if (promise := self._promised.get(site.name)) is None:
            return
        prefix = f"{site.name}.mamba2"
        for target in (CONV, SSD):
            nodes = [n for n in graph.nodes if n.target is target and n.meta.get("path") == prefix]
            if len(nodes) != 1:
                raise VerifyError(f"{prefix} has {len(nodes)} {target} instead of one")
            for name, wanted in (("mask", promise.mask is not None), ("state", False)):
                if (argument(nodes[0], name) is not None) != wanted:
                    raise VerifyError(f"{nodes[0].name}: its {name} is wrong after the rewrite")

    def needs(self, site: Site) -> list[str]:
        promise = self._promised.get(site.name)
        if promise is None:
            return []
        names = (promise.hidden, promise.mask, *(name for name, _ in promise.projected))
        return list(dict.fromkeys(n for n in names if n is not None))

    def expected(self, site: Site, original: Callable[[str], Any], output: Tensor) -> Tensor | None:
        """The mixer as one lower triangular matrix a head, in float64.

        Query, key and value are the original's own: rows of in_proj that were copied wrongly
        do not pass.
        """
        promise = self._promised.get(site.name)
        if promise is None:
            return None
        hidden = original(promise.hidden)
        mask = original(promise.mask) if promise.mask is not None else None
        own = [
            original(name).reshape(*hidden.shape[:2], -1)[..., rows.to(hidden.device)]
            for name, rows in promise.projected
        ]
        return quadratic(hidden, promise.mixer, mask, torch.cat(own, 2) if own else None)

    def _mixer(self, graph: Graph, region: Region) -> Mixer:
        a = region.attention
        layer = a.layer if a.layer is not None else a.index
        generator = torch.Generator().manual_seed(self.config.seed + layer)
        return initial_mixer(graph, region, self.config, generator)


def _find(graph: Graph, site: Site) -> Region:
    found = find_region(next(a for a in graph.attention if a.path == site.name))
    assert isinstance(found, Region), found
    return found
