"""The closed-form stage: last linears refitted to what the original put out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from tqdm import tqdm

from rewriter.graph import LINEAR, argument, as_linear
from rewriter.recover.graphs import Frozen, extract
from rewriter.recover.modules import input_values, inputs_of
from rewriter.recover.regions import Region
from rewriter.recover.stages import Fit


@torch.no_grad()
def fit_regions(
    student: GraphModule,
    teacher: GraphModule,
    regions: list[Region],
    tensors: dict[str, Tensor],
    frozen: Frozen,
    windows: Tensor,
    options: Fit,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Ridge regression of every region's last linear, on the teacher's inputs and outputs.

    Args:
        tensors: trained tensors by name. windows: tokens [N, T]; every eighth window (the last,
            if there are fewer) is kept out of the fit.

    Returns:
        New values of some of `tensors`, and for every region its held-out relative error
        before and after, or why it was left alone.
    """
    jobs, facts = [], []
    for region in regions:
        output = next(n for n in student.graph.nodes if n.name == region.output)
        linear = as_linear(output)
        weight = str(linear.weight.target) if linear is not None else ""
        if linear is None or output.target is not LINEAR or weight not in tensors:
            facts.append({"site": region.site, "left": "it does not end in a linear of its own"})
            continue
        bias = argument(output, "bias")
        name = str(bias.target) if bias is not None else ""
        piece = extract(student, region.inputs, [linear.input.name], tensors, frozen)
        jobs.append((region, piece, weight, name if name in tensors else ""))
    inside = set(inputs_of(teacher))
    taps = tuple(dict.fromkeys(n for r, *_ in jobs for n in (*r.inputs, r.target)))
    taps = tuple(t for t in taps if t not in inside)
    source = extract(teacher, inputs_of(teacher), taps, (), frozen) if jobs else None
    sums: dict[str, list[list[Any]]] = {r.site: [[0, 0, 0], [0, 0, 0]] for r, *_ in jobs}
    held = {i for i in range(len(windows)) if i % 8 == 7} or {len(windows) - 1}
    for index, row in enumerate(tqdm(windows, desc="fit", leave=False, disable=None)):
        if source is None:
            break
        values: dict[str, Any] = input_values(teacher, row[None].to(frozen.device))
        values |= dict(zip(taps, source(values, {}), strict=True))
        for region, piece, _, bias in jobs:
            features = piece(values, tensors)[0][0].double()
            if bias:
                features = torch.cat([features, features.new_ones(len(features), 1)], 1)
            truth = values[region.target][0].double()
            fixed = _fixed_bias(student, region, tensors, frozen) if not bias else None
            truth = truth if fixed is None else truth - fixed
            terms = (features.T @ features, features.T @ truth, truth.square().sum())
            where = sums[region.site][index in held]
            for i, term in enumerate(terms):
                where[i] = where[i] + term
    made: dict[str, Tensor] = {}
    for region, _, weight, bias in jobs:
        old = tensors[weight].T.double()
        old = torch.cat([old, tensors[bias].double()[None]]) if bias else old
        fitted, measured = sums[region.site] if len(windows) > 1 else [sums[region.site][1]] * 2
        new = _ridge(fitted[0], fitted[1], options.ridge, bool(bias))
        before, after = _error(old, measured), _error(new, measured)
        fact: dict[str, Any] = {"site": region.site, "before": before, "after": after}
        if after < before:
            rows = old.shape[0] - bool(bias)
            made[weight] = new[:rows].T.to(tensors[weight].dtype).contiguous()
            if bias:
                made[bias] = new[-1].to(tensors[bias].dtype)
        else:
            fact["left"] = "the fit is no better on held-out text"
        facts.append(fact)
    return made, facts


def _fixed_bias(
    student: GraphModule, region: Region, tensors: dict[str, Tensor], frozen: Frozen
) -> Tensor | None:
    output = next(n for n in student.graph.nodes if n.name == region.output)
    bias = argument(output, "bias")
    if bias is None:
        return None
    owner, _, leaf = str(bias.target).rpartition(".")
    value = getattr(student.get_submodule(owner), leaf)
    return frozen.tensor(value).double()


def _ridge(gram: Tensor, cross: Tensor, ridge: float, with_bias: bool) -> Tensor:
    """argmin |F W - Y|² + penalty |W|², from FᵀF and FᵀY; the bias (last row) is free."""
    features = gram.shape[0] - with_bias
    penalty = gram.new_full((gram.shape[0],), ridge * float(gram.diagonal()[:features].mean()))
    if with_bias:
        penalty[-1] = 0
    system = gram + torch.diag(penalty)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:  # fewer tokens than features and no ridge
        return torch.linalg.pinv(system, hermitian=True) @ cross
    return torch.cholesky_solve(cross, factor)


def _error(weight: Tensor, sums: list[Any]) -> float:
    """|F W - Y| / |Y| from FᵀF, FᵀY and |Y|²."""
    gram, cross, total = sums
    squared = total - 2 * (weight * cross).sum() + (weight * (gram @ weight)).sum()
    return float((squared.clamp_min(0) / total).sqrt())
