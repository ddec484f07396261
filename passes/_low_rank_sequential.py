"""Low rank after low rank: each weight is fitted on what the sites before it let through.

Source: SVD-LLM v2 and GPTQ's sequential order; specs/compress.md §2.3 "Sequential vs parallel".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from rewriter.calibration import walk
from rewriter.graph import Linear


def corrected(weight: Tensor, gram: Tensor, drift: Tensor, ridge: float) -> Tensor:
    """The weight whose outputs on drifted inputs X̃ are nearest to `X Wᵀ`, (m, n).

    `W + W D (G + ridge λ I)⁻¹` for G = X̃ᵀX̃ `gram`, D = (X - X̃)ᵀX̃ `drift`, both (n, n), and λ
    the mean of G's diagonal: least squares with a ridge towards W, so no drift is no change.
    """
    scale = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    lifted = gram + ridge * scale * torch.eye(len(gram), dtype=gram.dtype)
    return weight + torch.linalg.solve(lifted, drift.T @ weight.T).T


@dataclass
class _Run:
    """One calibration batch on its way through the graph, with the weights made so far."""

    steps: Iterator[tuple[Node, Any, dict[Node, Any]]]
    sites: dict[Node, Linear]
    weights: dict[Node, Tensor]  # of sites, as they are made; shared by all runs

    def until(self, goal: Node) -> Tensor:
        """Go on to a node; its value."""
        for node, value, environment in self.steps:
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
    solve: Callable[[str, Tensor, Tensor], Tensor | None],
) -> None:
    """Visit the linears in the graph's order, each on what those before it give.

    Every batch waits at the current input, in the original and in the low-rank model, so each
    of the two is run once.

    Args:
        linears: sites by name, in any order.
        batches: graph inputs, one list a batch.
        solve: (name, gram X̃ᵀX̃, drift (X - X̃)ᵀX̃), float64 on the CPU, gives the new weight (m, n)
            like the stored one, or None where the linear stays as it is.
    """
    sites = {x.node: x for x in linears.values()}
    weights: dict[Node, Tensor] = {}
    pairs = [
        (_Run(walk(module, b), sites, {}), _Run(walk(module, b), sites, weights)) for b in batches
    ]
    readers: dict[Node, list[str]] = {}
    for name, linear in linears.items():
        readers.setdefault(linear.input, []).append(name)
    with torch.no_grad():
        for source in (n for n in module.graph.nodes if n in readers):
            gram = drift = torch.zeros((), dtype=torch.float64)
            for original, student in pairs:
                exact, actual = original.until(source), student.until(source)
                width = actual.shape[-1]
                seen = actual.reshape(-1, width).double()
                gap = exact.reshape(-1, width).double() - seen
                gram, drift = gram + (seen.T @ seen).cpu(), drift + (gap.T @ seen).cpu()
            for name in readers[source]:
                made = solve(name, gram, drift)
                if made is not None:
                    weights[linears[name].node] = made
