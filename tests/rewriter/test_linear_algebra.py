"""The optimum, the pivot form, the rank budget and the sums, against float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rewriter.linear_algebra import (
    Choice,
    allocate,
    cost,
    decompose,
    gram,
    product,
    to_pivot,
    uniform_ranks,
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    """Correlated rows with a decaying spectrum, like activations."""
    scale = torch.logspace(0, -2, width, dtype=torch.float64)
    return normal(count, width, seed=seed) * scale @ normal(width, width, seed=seed + 1)


def weighted_loss(difference: Tensor, gram: Tensor, metric: Tensor | None = None) -> float:
    left = difference if metric is None else metric @ difference
    return float((left * (difference @ gram)).sum())


# ---- sums over tokens --------------------------------------------------------------------


@pytest.mark.parametrize("width", [5, 256, 600])  # of one block, of whole ones, of parts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gram_and_product(width, dtype):
    x, y = normal(1100, width, dtype=dtype), normal(1100, 7, seed=1, dtype=dtype)
    wide = x.double()
    assert gram(x).dtype is torch.float64
    assert torch.allclose(gram(x), wide.T @ wide, rtol=1e-12, atol=1e-9)
    error = product(x, y) - wide.T @ y.double()
    bound = 1e-12 if dtype is torch.float64 else 1e-6
    assert (error.abs() <= bound * wide.norm(dim=0)[:, None] * y.double().norm(dim=0)).all()


# ---- the optimum -------------------------------------------------------------------------

SHAPES = [(24, 24), (12, 40), (40, 12)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [200, 7])  # 7 rows: a singular Gram
def test_loss_is_the_tail_and_the_optimum(shape, count):
    weight, x = normal(*shape, seed=3), rows(count, shape[1])
    gram = x.T @ x
    fit = decompose(weight, gram)
    curve = fit.curve
    eigenvalues = torch.linalg.svdvals(weight @ x.T).square()
    tail = torch.zeros(len(curve), dtype=torch.float64)
    tail[: len(eigenvalues)] = eigenvalues.flip(0).cumsum(0).flip(0)[: len(curve)]
    assert (curve - tail).abs().max() <= 1e-9 * curve[0]
    assert (curve.diff() <= 0).all()
    for rank in range(1, min(shape) + 1):
        a, b = fit.factors(rank)
        measured = weighted_loss(weight - a @ b, gram)
        assert abs(measured - curve[rank]) <= 1e-9 * curve[0]
        assert torch.allclose(a.T @ a, torch.eye(rank, dtype=a.dtype), atol=1e-10)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    plain = (u[:, :4] * s[:4]) @ v[:4]
    assert curve[4] <= weighted_loss(weight - plain, gram) + 1e-9 * curve[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [200, 7])
def test_two_sided_loss_is_the_tail_and_beats_one_sided(shape, count):
    weight, x, g = normal(*shape, seed=3), rows(200, shape[1]), rows(count, shape[0], seed=5)
    gram, metric = x.T @ x, g.T @ g / count
    two, one = decompose(weight, gram, metric), decompose(weight, gram)
    for rank in range(1, min(shape)):
        a, b = two.factors(rank)
        loss = weighted_loss(weight - a @ b, gram, metric)
        # the fit sees the lifted metric, the measurement the original one
        assert loss <= two.curve[rank] + 1e-9 * two.curve[0]
        assert two.curve[rank] - loss <= 1e-3 * two.curve[0]
        a, b = one.factors(rank)
        assert loss <= weighted_loss(weight - a @ b, gram, metric) + 1e-5 * two.curve[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("count", [200, 7, 0])
def test_full_rank_is_the_weight_whatever_the_gram(shape, two_sided, count):
    weight, x, g = normal(*shape, seed=3), rows(count, shape[1]), rows(9, shape[0], seed=5)
    fit = decompose(weight, x.T @ x, g.T @ g if two_sided else None)
    a, b = fit.factors(min(shape))
    assert (a @ b - weight).abs().max() <= 1e-8
    pivot = to_pivot(a, b)
    assert pivot is not None
    rebuilt = torch.cat([pivot.pivot, pivot.rest @ pivot.pivot])[pivot.order]
    assert (rebuilt - weight).abs().max() <= 1e-7


def test_identity_gram_is_plain_svd():
    weight = normal(12, 20)
    a, b = decompose(weight, 3 * torch.eye(20, dtype=torch.float64)).factors(5)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    assert torch.allclose(a @ b, (u[:, :5] * s[:5]) @ v[:5], atol=1e-10)


@pytest.mark.parametrize("rank", [1, 5, 12, 24])
def test_pivot_is_the_product_and_its_rows(rank):
    a, b = torch.linalg.qr(normal(24, rank))[0], normal(rank, 30, seed=1)
    pivot = to_pivot(a, b)
    assert pivot is not None
    assert pivot.pivot.numel() + pivot.rest.numel() == cost(rank, (24, 30), pivot=True)
    rebuilt = torch.cat([pivot.pivot, pivot.rest @ pivot.pivot])[pivot.order]
    assert (rebuilt - a @ b).abs().max() <= 1e-12


def test_pivot_refuses_a_dependent_column():
    a = normal(10, 3)
    a[:, 2] = a[:, 0] + 1e-7 * a[:, 2]
    assert to_pivot(a, normal(3, 5)) is None


# ---- the budget --------------------------------------------------------------------------


def choices(count: int = 12) -> list[Choice]:
    found = []
    for seed in range(count):
        shape = SHAPES[seed % 3]
        energy = normal(min(shape), seed=seed).square().sort(descending=True).values
        tail = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
        found.append(Choice(shape, (tail * (1 + seed)).tolist()))
    return found


def spent(shapes: list[tuple[int, int]], ranks: list[int | None], pivot: bool) -> int:
    return sum(
        m * n if r is None else cost(r, (m, n), pivot)
        for (m, n), r in zip(shapes, ranks, strict=True)
    )


@pytest.mark.parametrize("pivot", [False, True])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.8, 0.95])
def test_budget_is_spent_and_beats_uniform(keep, pivot):
    sites = choices()
    shapes = [c.shape for c in sites]
    dense = sum(m * n for m, n in shapes)
    ranks = allocate(sites, keep * dense, pivot)
    assert ranks is not None
    assert (keep - 0.01) * dense <= spent(shapes, ranks, pivot) <= keep * dense

    def loss(chosen):
        return sum(0.0 if r is None else c.curve[r] for c, r in zip(sites, chosen, strict=True))

    uniform = uniform_ranks(shapes, keep, pivot)
    assert spent(shapes, uniform, pivot) <= keep * dense
    assert loss(ranks) <= loss(uniform)


def test_budget_rounds_ranks_and_reports_what_cannot_be_met():
    ranks = allocate(choices(), 0.5 * 12 * 500, True, multiple=4)
    assert ranks is not None and all(r is None or r % 4 == 0 for r in ranks)
    assert allocate(choices(), 10, True) is None


def test_allocation_is_optimal_on_a_small_case():
    sites = choices(2)
    shapes = [c.shape for c in sites]
    budget = 0.7 * sum(m * n for m, n in shapes)
    ranks = allocate(sites, budget, True)
    assert ranks is not None
    options = [[*range(1, min(s)), None] for s in shapes]
    best = min(
        sum(0.0 if r is None else c.curve[r] for c, r in zip(sites, (p, q), strict=True))
        for p in options[0]
        for q in options[1]
        if spent(shapes, [p, q], True) <= budget
    )
    found = sum(0.0 if r is None else c.curve[r] for c, r in zip(sites, ranks, strict=True))
    whole = sum(c.curve[0] for c in sites)
    assert found - best <= 0.01 * whole  # within one rank of the exhaustive optimum
