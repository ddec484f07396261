"""Linears as a product of two thin ones: the best rank under the loss, and a rank budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.fx import Node

from rewriter.errors import PlanError, RewriterError
from rewriter.graph import LINEAR, Graph, Linear, as_linear
from rewriter.linear_algebra import (
    Choice,
    Decomposition,
    allocate,
    cost,
    decompose,
    root,
    to_pivot,
    uniform_ranks,
)
from rewriter.passes._low_rank_sequential import Moments, corrected, refit
from rewriter.protocol import Calibration, Contract, Made, NearMiss, Pass, PassConfig, Site

aten = torch.ops.aten

#: A two-sided fit holds a square matrix over the outputs; beyond this it is over 2 GB.
LARGEST_OUTPUT = 16384


@dataclass
class _Factored:
    """What a site becomes: named tensors in the weight's dtype (none: it stays dense)."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class LowRank(Pass):
    """Replaces `y = W x + b` by a weight of lower rank, chosen on real activations.

    Every rank of a site comes from one eigendecomposition of `W` weighted by the Gram of its
    inputs and, two-sided, by that of the loss gradient at its outputs. The ranks of all sites
    are chosen together under one budget; a site where no rank pays stays dense.

    Contract: approximate; exact at rank min(m, n).
    Source: SVD-LLM, PIFA; specs/compress.md §2.3, §2.6, §8.4.
    Memory: all Grams, then up to three weights' worth of float64 per site until the ranks
    are chosen; the sequential fit keeps the output Grams and one layer's activations of all
    the calibration text.
    """

    name, contract, needs_calibration = "low_rank", Contract.APPROXIMATE, True
    #: Factors are the model's own weights: at 1e-4, one sequence a step, they only get worse.
    learning_rates = {"distil": {"copied": 2e-5, "new": 2e-5}}

    class Config(PassConfig):
        """keep: share of the parameters of the selected linears that remains (biases not
        counted), or rank: the same for all; exactly one of the two. form: `factors`, r(m+n)
        parameters, or `pivot`, r(m+n-r) for the same function. weighting: `two_sided` needs
        a loss; left out, it falls back to `activation` where the model has none. allocation:
        how `keep` is spread over the sites. multiple: ranks under `keep` are multiples of it.
        sequential: after the ranks are chosen, fit each weight again, in the graph's order, to
        give the original's outputs from what the low-rank sites before it let through; closed
        form, for two more passes over the calibration text. residual: there, a linear whose
        output is added to a residual stream also makes up for what that has lost. ridge: pull
        towards the original weight in that fit, as a share of the mean square of an input.
        """

        keep: float | None = Field(None, gt=0, le=1)
        rank: int | None = Field(None, ge=1)
        form: Literal["factors", "pivot"] = "pivot"
        weighting: Literal["activation", "two_sided"] = "two_sided"
        allocation: Literal["loss_curve", "uniform"] = "loss_curve"
        multiple: int = Field(1, ge=1)
        sequential: bool = True
        residual: bool = True
        ridge: float = Field(0.01, gt=0)

        @model_validator(mode="after")
        def one_target(self) -> LowRank.Config:
            if (self.keep is None) == (self.rank is None):
                raise ValueError("give exactly one of 'keep' and 'rank'")
            return self

    config: Config

    def __init__(self, config: PassConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self._factored: dict[str, _Factored] = {}
        self._reads: dict[str, tuple[str, str | None]] = {}  # nodes: input, bias

    def sites(self, graph: Graph) -> Iterator[Site | NearMiss]:
        users = _weight_users(graph)
        for linear in graph.linears:
            weight = graph.tensor(linear.weight)
            m, n = _shape(linear, weight)
            others = [u for u in users[_storage(weight)] if u is not linear.node]
            reason = ""
            if ".low_rank." in linear.name:
                reason = "it is a factor of a linear that is low rank already"
            elif any(u.target is aten.embedding.default for u in others):
                reason = "its weight is tied to an embedding, which needs the full matrix"
            elif any(as_linear(u) is not None for u in others):
                reason = f"its weight is shared by {1 + len(others)} linears"
            elif others:
                reason = f"its weight is also used by {others[0].name}"
            elif min(m, n) < 2:
                reason = f"a weight of shape {m} x {n} has rank 1"
            elif self.config.weighting == "two_sided" and m > LARGEST_OUTPUT:
                reason = f"{m} outputs are too many for a two-sided fit; use weighting: activation"
            if reason:
                yield NearMiss(linear.name, linear.node, reason, linear.layer)
            else:
                yield Site(linear.name, linear.node, linear.layer, f"{m} x {n}")

    # ---- ranks ---------------------------------------------------------------------------

    def prepare(self, graph: Graph, sites: list[Site], calibration: Calibration | None) -> None:
        """Fit every rank of every site, choose the ranks, and keep only what they need."""
        if calibration is None:
            raise PlanError("low_rank needs calibration text", "give data: a text file or dataset")
        self._factored = {}
        linears = {site.name: _linear(site) for site in sites}
        self._reads = {
            name: (x.input.name, x.bias.name if x.bias is not None else None)
            for name, x in linears.items()
        }
        weighting, output_grams = self._output_grams(list(linears.values()), calibration)
        metrics = {x.node: output_grams.get(x.node) for x in linears.values()}
        fits = self._fit(graph, linears, calibration, output_grams)
        shapes = [_shape(x, graph.tensor(x.weight)) for x in linears.values()]
        found = self._ranks(list(fits.values()), shapes, relative=weighting == "activation")
        ranks = dict(zip(linears, found, strict=True))
        for name, shape in zip(linears, shapes, strict=True):
            if ranks[name] is not None and self.config.sequential:
                del fits[name]
                continue
            dtype = graph.tensor(linears[name].weight).dtype
            self._factored[name] = self._form(fits.pop(name), shape, ranks[name], dtype)
        if len(self._factored) < len(linears):
            self._refit(graph, linears, ranks, calibration, metrics)
        for made in self._factored.values():
            made.facts["weighting"] = weighting

    def _refit(
        self,
        graph: Graph,
        linears: dict[str, Linear],
        ranks: dict[str, int | None],
        calibration: Calibration,
        metrics: dict[Node, Tensor | None],
    ) -> None:
        """Factor every site that is not dense again, on the inputs of the low-rank model."""
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        batches = [[one[n] for n in inputs] for one in next(calibration.sequences([inputs]))]
        roots: list[tuple[Tensor, Tensor]] = []  # of the current Gram

        def root_of(gram: Tensor) -> Tensor:
            if not roots or roots[0][0] is not gram:
                roots[:] = [(gram, root(gram))]
            return roots[0][1]

        def solve(name: str, moments: Moments) -> Tensor | None:
            linear, rank = linears[name], ranks[name]
            if rank is None:
                return None
            stored = graph.tensor(linear.weight)
            weight = _weight(graph, linear)
            target = corrected(weight, moments, self.config.ridge)
            gram = moments.gram
            fit = decompose(target, gram, metrics.pop(linear.node), partial(root_of, gram))
            made = self._form(fit, _shape(linear, stored), rank, stored.dtype)
            made.facts["drift"] = float((target - weight).norm() / weight.norm())
            self._factored[name] = made
            a, b = fit.factors(rank)
            return (a @ b).to(stored)

        refit(graph.module, linears, batches, solve, self.config.residual)

    def _output_grams(
        self, linears: list[Linear], calibration: Calibration
    ) -> tuple[str, dict[Node, Tensor]]:
        if self.config.weighting == "activation":
            return "activation", {}
        try:
            return "two_sided", dict(calibration.output_grams([x.node for x in linears]))
        except (RewriterError, NotImplementedError):
            if "weighting" in self.config.model_fields_set:
                raise  # asked for by name: do not quietly do something else
            return "activation", {}

    def _fit(
        self,
        graph: Graph,
        linears: dict[str, Linear],
        calibration: Calibration,
        output_grams: dict[Node, Tensor],
    ) -> dict[str, Decomposition]:
        waiting: dict[Node, int] = {}
        for linear in linears.values():
            waiting[linear.input] = waiting.get(linear.input, 0) + 1
        grams = dict(calibration.grams(list(waiting)))
        roots: dict[Node, Tensor] = {}

        def root_of(node: Node) -> Tensor:
            if node not in roots:
                roots[node] = root(grams[node])
            return roots[node]

        fits = {}
        for name, linear in linears.items():
            node = linear.input
            fits[name] = decompose(
                _weight(graph, linear),
                grams[node],
                output_grams.pop(linear.node, None),
                partial(root_of, node),
            )
            waiting[node] -= 1
            if not waiting[node]:  # the last linear on this input: free its matrices
                del grams[node]
                roots.pop(node, None)
        return fits

    def _ranks(
        self, fits: list[Decomposition], shapes: list[tuple[int, int]], relative: bool
    ) -> list[int | None]:
        """One rank a site; None keeps it dense.

        Two-sided losses are in units of the model's loss and add up; without gradients only
        the relative error of an output can be compared between sites.
        """
        config, pivot = self.config, self.config.form == "pivot"
        if config.rank is not None:
            return [min(config.rank, *shape) for shape in shapes]
        assert config.keep is not None
        if config.allocation == "uniform":
            return uniform_ranks(shapes, config.keep, pivot, config.multiple)
        choices = []
        for fit, shape in zip(fits, shapes, strict=True):
            curve = fit.curve
            if relative:
                curve = curve / curve[0].clamp(min=torch.finfo(curve.dtype).tiny)
            choices.append(Choice(shape, curve.tolist()))
        budget = config.keep * sum(m * n for m, n in shapes)
        ranks = allocate(choices, budget, pivot, config.multiple)
        if ranks is None:
            raise PlanError(
                f"keep: {config.keep:g} is less than rank {config.multiple} everywhere",
                "raise keep, or lower multiple",
            )
        return ranks

    def _form(
        self, fit: Decomposition, shape: tuple[int, int], rank: int | None, dtype: torch.dtype
    ) -> _Factored:
        """The tensors of one site at its rank, cast to the dtype of the weight."""
        dense = shape[0] * shape[1]
        curve = fit.curve
        facts: dict[str, Any] = {
            "rank": rank if rank is not None else min(shape),
            "form": "dense",
            "parameters_before": dense,
            "parameters_after": dense,
            "predicted_loss": 0.0 if rank is None else float(curve[rank]),
            "total_energy": float(curve[0]),
        }
        if rank is None:
            return _Factored(facts=facts)
        a, b = fit.factors(rank)
        pivot = to_pivot(a, b) if self.config.form == "pivot" else None
        facts["parameters_after"] = cost(rank, shape, pivot is not None)
        if pivot is not None:
            facts["form"] = "pivot"
            tensors = {"pivot": pivot.pivot, "rest": pivot.rest, "order": pivot.order}
        else:
            facts["form"] = "factors"
            if self.config.form == "pivot":
                facts["fallback"] = "pivot rows are ill-conditioned"
            tensors = {"a": a, "b": b}
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        # clone: a slice would keep the whole decomposition alive
        return _Factored({k: v.clone() for k, v in cast.items()}, facts)

    # ---- graph ---------------------------------------------------------------------------

    def rewrite(self, graph: Graph, site: Site) -> Made:
        made = self._factored[site.name]
        if not made.tensors:
            return Made(site.node, facts=made.facts)
        linear = _linear(site)
        path = site.node.meta.get("path", linear.name)
        device = graph.tensor(linear.weight).device
        tensors = {k: v.to(device) for k, v in made.tensors.items() if v.numel()}
        with graph.module.graph.inserting_before(site.node):
            nodes = {
                k: graph.add_tensor(f"{linear.name}.low_rank.{k}", v) for k, v in tensors.items()
            }
            if "a" in nodes:
                inner = _call(graph, site.node, LINEAR, linear.input, nodes["b"], path=path)
                args = (inner, nodes["a"]) + ((linear.bias,) if linear.bias is not None else ())
                output = _call(graph, site.node, LINEAR, *args, path=path)
            else:
                value = _call(graph, site.node, LINEAR, linear.input, nodes["pivot"], path=path)
                if "rest" in nodes:  # none at rank m: the pivots are all the rows
                    rest = _call(graph, site.node, LINEAR, value, nodes["rest"], path=path)
                    value = _call(graph, site.node, aten.cat.default, [value, rest], -1, path=path)
                output = _call(
                    graph,
                    site.node,
                    aten.index_select.default,
                    value,
                    -1,
                    nodes["order"],
                    path=path,
                )
                if linear.bias is not None:
                    output = _call(
                        graph, site.node, aten.add.Tensor, output, linear.bias, path=path
                    )
        site.node.replace_all_uses_with(output)
        graph.module.graph.erase_node(site.node)
        return Made(output, {str(linear.weight.target)}, made.facts)

    # ---- what the gate compares with -----------------------------------------------------

    def needs(self, site: Site) -> list[str]:
        return [name for name in self._reads.get(site.name, ()) if name is not None]

    def expected(self, site: Site, original: Callable[[str], Any], output: Tensor) -> Tensor | None:
        """x W'ᵀ + b in float64, with the whole matrix W' of the rank that was chosen."""
        if site.name not in self._reads:
            return None
        tensors = self._factored[site.name].tensors
        if not tensors:  # it stays dense
            return output
        wide = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
        if "a" in wide:
            weight = wide["a"] @ wide["b"]
        else:
            rows = wide["pivot"]
            if wide["rest"].numel():
                rows = torch.cat([rows, wide["rest"] @ rows])
            weight = rows[wide["order"]]
        source, bias = self._reads[site.name]
        made = original(source).double() @ weight.T.to(output.device)
        return made if bias is None else made + original(bias).double()


def _call(graph: Graph, like: Node, target: Any, *args: Any, path: str) -> Node:
    """A call whose fake value has the leading sizes of `like`, as later passes expect."""
    node = graph.call(target, *args, path=path)
    value = like.meta.get("val")
    if isinstance(value, Tensor):
        width = value.shape[-1]
        if target is LINEAR:
            width = graph.tensor(args[1]).shape[0]
        node.meta["val"] = value.new_empty((*value.shape[:-1], width))
    return node


def _linear(site: Site) -> Linear:
    linear = as_linear(site.node)
    assert linear is not None, site.name
    return linear


def _weight(graph: Graph, linear: Linear) -> Tensor:
    """W (m, n) in float64 on the CPU, whichever way round it is stored."""
    weight = graph.tensor(linear.weight).detach().to("cpu", torch.float64)
    return weight.T.contiguous() if linear.transposed else weight


def _shape(linear: Linear, weight: Tensor) -> tuple[int, int]:
    """Outputs m, inputs n."""
    m, n = weight.shape
    return (n, m) if linear.transposed else (m, n)


def _storage(tensor: Tensor) -> int:
    """Identity of the memory: two names of one tensor are one."""
    return tensor.untyped_storage().data_ptr() or id(tensor)


def _weight_users(graph: Graph) -> dict[int, list[Node]]:
    users: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and isinstance(value := graph.tensor(node), Tensor):
            users.setdefault(_storage(value), []).extend(node.users)
    return users
