"""Low rank after low rank: each weight is fitted on what the sites before it let through.

A linear whose output is added to a residual stream is also fitted to what that stream has lost.
Source: SVD-LLM v2 and GPTQ's sequential order; specs/compress.md §2.3 "Sequential vs parallel".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from rewriter.calibration import walk
from rewriter.graph import Linear, aten
from rewriter.linear_algebra import gram, product


@dataclass
class Moments:
    """Sums over tokens of a site's inputs X (rows), of the original, and X̃, as they now are.

    gram: X̃ᵀX̃, (n, n). drift: X̃ᵀ(X - X̃), (n, n). lost: X̃ᵀ(H - H̃), (n, m), of the residual stream
    H that the output is added to; None where there is none. All float64, on the CPU.
    """

    gram: Tensor
    drift: Tensor
    lost: Tensor | None = None


def corrected(weight: Tensor, moments: Moments, ridge: float) -> Tensor:
    """The weight whose outputs on X̃, added to H̃, are nearest to `H + X Wᵀ`, (m, n).

    `Wᵀ + (G + ridge λ I)⁻¹ (D Wᵀ + L)` for G `gram`, D `drift`, L `lost`, and λ the mean of G's
    diagonal: least squares with a ridge towards W, so no drift and nothing lost is no change.
    """
    gram = moments.gram
    scale = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    lifted = gram + ridge * scale * torch.eye(len(gram), dtype=gram.dtype)
    missing = moments.drift @ weight.T
    if moments.lost is not None:
        missing = missing + moments.lost
    return weight + torch.linalg.solve(lifted, missing).T


#: What may stand between a linear and the addition of its output.
_SAME_ROWS = {
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default),
    *(aten.dropout.default, aten.clone.default, aten.contiguous.default),
}


def stream(linear: Linear) -> Node | None:
    """The residual stream that a linear's output is added to, if nothing else reads it."""
    node = linear.node
    width = node.meta["val"].shape[-1]
    while len(node.users) == 1:
        (user,) = node.users
        if user.target is aten.add.Tensor and not user.kwargs:
            first, second = user.args[:2]
            other = second if first is node else first
            if not isinstance(other, Node) or other is node:
                return None
            return other if other.meta["val"].shape == node.meta["val"].shape else None
        if user.target not in _SAME_ROWS or user.meta["val"].shape[-1] != width:
            return None
        node = user
    return None


@dataclass
class _Run:
    """One calibration batch on its way through the graph, with the weights made so far."""

    steps: Iterator[tuple[Node, Any, dict[Node, Any]]]
    sites: dict[Node, Linear]
    weights: dict[Node, Tensor]  # of sites, as they are made; shared by all runs
    environment: dict[Node, Any] = field(default_factory=dict)

    def until(self, goal: Node) -> Tensor:
        """Go on to a node; its value."""
        for node, value, environment in self.steps:
            self.environment = environment
            if node in self.weights:
                site = self.sites[node]
                bias = environment[site.bias] if site.bias is not None else None
                source = environment[site.input]
                made = torch.nn.functional.linear(source, self.weights[node], bias)
                environment[node] = made.reshape(value.shape)
            if node is goal:
                return environment[node]
        raise KeyError(goal.name)


def refit(
    module: GraphModule,
    linears: dict[str, Linear],
    batches: list[list[Any]],
    solve: Callable[[str, Moments], Tensor | None],
    residual: bool = True,
) -> None:
    """Visit the linears in the graph's order, each on what those before it give.

    Every batch waits at the current input, in the original and in the low-rank model, so each
    of the two is run once.

    Args:
        linears: sites by name, in any order.
        batches: graph inputs, one list a batch.
        solve: (name, moments) gives the new weight (m, n) like the stored one, or None where the
            linear stays as it is.
        residual: whether to say what the residual stream has lost.
    """
    sites = {x.node: x for x in linears.values()}
    weights: dict[Node, Tensor] = {}
    pairs = [
        (_Run(walk(module, b), sites, {}), _Run(walk(module, b), sites, weights)) for b in batches
    ]
    readers: dict[Node, list[str]] = {}
    for name, linear in linears.items():
        readers.setdefault(linear.input, []).append(name)
    streams = {name: stream(x) if residual else None for name, x in linears.items()}
    with torch.no_grad():
        for source in (n for n in module.graph.nodes if n in readers):
            total = drift = torch.zeros((), dtype=torch.float64)
            lost: dict[Node, Tensor] = {}
            for original, student in pairs:
                exact, actual = _rows(original.until(source)), _rows(student.until(source))
                total = total + gram(actual)
                drift = drift + product(actual, exact - actual)
                for node in {s for n in readers[source] if (s := streams[n]) is not None}:
                    if node not in original.environment:  # it is made later: nothing is known yet
                        continue
                    gap = _rows(original.environment[node]) - _rows(student.environment[node])
                    if len(gap) == len(actual):
                        lost[node] = lost.get(node, 0) + product(actual, gap)
            for name in readers[source]:
                found = streams[name]
                moments = Moments(total, drift, None if found is None else lost.get(found))
                made = solve(name, moments)
                if made is not None:
                    weights[linears[name].node] = made


def _rows(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])
