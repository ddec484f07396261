"""What a rewrite method is: sites, near misses, configuration, contract."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.fx import Node

from rewriter.errors import PlanError
from rewriter.graph import Graph
from rewriter.plugins import discover


class Contract(enum.StrEnum):
    """What a pass promises about the rewritten model."""

    EXACT = "exact"
    APPROXIMATE = "approximate"
    NEEDS_RECOVERY = "needs_recovery"


class LayerRange(BaseModel):
    """Every `every`-th layer from `from` up to and including `to` (default: the last)."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    start: int = Field(0, alias="from", ge=0)
    to: int | None = Field(None, ge=0)
    every: int = Field(1, ge=1)


class PassConfig(BaseModel):
    """Options that every pass has; a pass adds its own by subclassing.

    layers: a list of indices, a range, or None for all.
    targets: module paths, exact or `re:` and a regular expression that matches fully.
    missing: what to do when the selection matches no site.
    policy: what to do when a site's error is above `tolerance`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    layers: list[int] | LayerRange | None = None
    targets: list[str] | None = None
    missing: str = Field("error", pattern="^(error|skip)$")
    policy: str = Field("fail", pattern="^(fail|roll_back|warn)$")
    tolerance: float | None = Field(None, gt=0)


@dataclass(frozen=True)
class Site:
    """One place that a pass rewrites.

    name: module path, unique within the pass. node: the node to look at (its output is what
    the gate compares). path/layer: for selection.
    """

    name: str
    node: Node
    layer: int | None = None
    about: str = ""


@dataclass(frozen=True)
class NearMiss:
    """A place that looks like a site and is none, and why, in one sentence."""

    name: str
    node: Node | None
    reason: str
    layer: int | None = None


@dataclass
class Made:
    """What a rewrite of one site made.

    output: the node that now stands for the site's output (the gate compares it with the
    original's). dropped: names or prefixes of source tensors that are meant to disappear.
    facts: figures for the report and the lock (rank, predicted loss, window …).
    """

    output: Node
    dropped: set[str] = field(default_factory=set)
    facts: dict[str, Any] = field(default_factory=dict)


class Calibration(ABC):
    """Real activations of the original model, for passes that need them."""

    @abstractmethod
    def inputs(self, nodes: list[Node]) -> dict[Node, Tensor]:
        """Values of `nodes` on the calibration text: [tokens, …] with padding removed."""

    @abstractmethod
    def sequences(self, groups: list[list[Node]]) -> Iterator[list[dict[Node, Tensor]]]:
        """Group by group, its nodes' values for every calibration sequence, unpadded.

        The text runs once, and only one group's values are held where the groups are in the
        graph's order. A value is [1, length, …].
        """

    @abstractmethod
    def grams(self, nodes: list[Node]) -> dict[Node, Tensor]:
        """XᵀX in float64 of every node's value seen as rows [tokens, features]."""

    @abstractmethod
    def output_grams(self, nodes: list[Node]) -> dict[Node, Tensor]:
        """E[g gᵀ], float64, of the loss gradient at every node (labels sampled by the model)."""


class Pass(ABC):
    """A rewrite method. Subclasses set `name` and `contract` and register themselves."""

    name: ClassVar[str]
    contract: ClassVar[Contract]
    Config: ClassVar[type[PassConfig]] = PassConfig
    needs_calibration: ClassVar[bool] = False
    #: By stage of recovery: rates of `new`, `copied` and `gate` tensors that differ from usual.
    learning_rates: ClassVar[dict[str, dict[str, float]]] = {}

    def __init__(self, config: PassConfig | None = None, **options: Any) -> None:
        self.config: Any = config if config is not None else self.Config(**options)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            REGISTRY[cls.name] = cls

    @abstractmethod
    def sites(self, graph: Graph) -> Iterator[Site | NearMiss]:
        """Every place in the graph, match or near miss; selection comes afterwards."""

    def prepare(self, graph: Graph, sites: list[Site], calibration: Calibration | None) -> None:
        """Look at all chosen sites together before any is rewritten (budgets, statistics)."""

    @abstractmethod
    def rewrite(self, graph: Graph, site: Site) -> Made:
        """Rewrite one site: graph and tensors together.

        May be called again for the same site, on a fresh copy of the graph, when another site
        of the step is rolled back: what `prepare` has chosen stays.
        """

    def check(self, graph: Graph, site: Site, made: Made) -> None:
        """Look at the rewritten site right after the step; raise VerifyError if it is wrong.

        For what no text can show: a window longer than every sequence of the gate, say.
        """

    def needs(self, site: Site) -> list[str]:
        """Names of the nodes, as `prepare` found them, whose values `expected` asks for.

        The gate keeps these values until the site is compared, and no others.
        """
        return []

    def expected(self, site: Site, original: Callable[[str], Any], output: Tensor) -> Tensor | None:
        """What the rewritten site must give on the original's activations, or None.

        An independent, slow statement of what the pass does, so that the gate can tell a wrong
        rewrite from a lossy one; it must not look at the rewritten graph.

        Args:
            original: value, before the step, of a node that `needs` lists.
            output: the site's output before the step.
        """
        return None


REGISTRY: dict[str, type[Pass]] = {}


def passes() -> dict[str, type[Pass]]:
    """All known passes by name: this package's and those of `rewriter.passes` entry points."""
    discover("rewriter.passes")
    return dict(sorted(REGISTRY.items()))


def get_pass(name: str) -> type[Pass]:
    known = passes()
    if name not in known:
        raise PlanError(f"unknown pass '{name}'", f"use one of: {', '.join(known)}")
    return known[name]
