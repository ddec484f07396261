"""Low-rank approximation of a linear under input and output weights, and its rank budget.

Source: SVD-LLM's objective as PCA of the outputs; the two-sided form; PIFA's pivot form
(specs/compress.md §2.3, §2.5, §2.6). Everything here is float64; only `product` multiplies in
the precision of what it gets.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Eigenvalues below this share of the largest are rounding noise, not directions.
NOISE = 1e-12
#: Share of the largest eigenvalue that the output Gram is lifted by, so that it inverts.
OUTPUT_FLOOR = 1e-6
#: Columns of a Gram that are multiplied at once.
BLOCK = 256
#: A pivot whose QR diagonal is below this share of the largest is not safe to divide by.
PIVOT_FLOOR = 1e-4


def gram(rows: Tensor) -> Tensor:
    """`rowsᵀ rows`, (n, n) float64 on the CPU, of rows (tokens, n); one triangle is computed."""
    rows = rows.double()
    size = rows.shape[1]
    made = rows.new_empty(size, size)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        made[start:stop, start:] = rows[:, start:stop].T @ rows[:, start:]
        made[stop:, start:stop] = made[start:stop, stop:].T
    return made.cpu()


def product(left: Tensor, right: Tensor) -> Tensor:
    """`leftᵀ right`, (n, m) float64 on the CPU, of rows (tokens, n) and (tokens, m).

    In their own precision, at least float32, over 512 tokens at a time: an entry's relative error
    is about 1e-6 of the norms of its two columns. For what is not inverted.
    """
    made = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    for a, b in zip(left.to(wide).split(512), right.to(wide).split(512), strict=True):
        made += (a.T @ b).cpu()
    return made


def root(gram: Tensor) -> Tensor:
    """Symmetric square root (n, n) of a positive semi-definite matrix, singular or not."""
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def lift(gram: Tensor, floor: float = OUTPUT_FLOOR) -> Tensor:
    """`gram + floor λ_max I`: invertible, for the price of a few products."""
    vector = torch.ones(len(gram), dtype=gram.dtype) + gram.diagonal() / gram.diagonal().max()
    for _ in range(20):  # λ_max only sets a floor: two digits are plenty
        vector = gram @ (vector / vector.norm())
    return gram + floor * vector.norm() * torch.eye(len(gram), dtype=gram.dtype)


@dataclass
class Decomposition:
    """All ranks of one weight at once: rank r uses the first r columns and rows.

    left: (m, p) orthonormal, p = min(m, n). rows: (p, n). mix: (p, p) upper triangular, or
    None for the identity. energy: (p,), the loss that each direction saves.
    The best rank-r weight is `left[:, :r] @ mix[:r, :r]⁻¹ @ rows[:r]`.
    """

    left: Tensor
    rows: Tensor
    mix: Tensor | None
    energy: Tensor

    @property
    def curve(self) -> Tensor:
        """loss(r) for r = 0 … p: the sum of the energies left out. Falls, and ends at 0."""
        tail = self.energy.flip(0).cumsum(0).flip(0)
        return torch.cat([tail, tail.new_zeros(1)])

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """A (m, r) with orthonormal columns and B (r, n): the weight is `A @ B`."""
        rows = self.rows[:rank]
        if self.mix is not None:
            rows = torch.linalg.solve_triangular(self.mix[:rank, :rank], rows, upper=True)
        return self.left[:, :rank], rows


def decompose(
    weight: Tensor,
    gram: Tensor,
    output_gram: Tensor | None = None,
    gram_root: Callable[[], Tensor] | None = None,
) -> Decomposition:
    """Minimise `tr(F ΔW G ΔWᵀ)` over every rank with one eigendecomposition.

    weight W: (m, n). gram G: (n, n), may be singular. output_gram F: (m, m), or None for
    the identity; it is lifted to be invertible. gram_root: gives `root(gram)`, for callers
    that share it between linears with one input. All float64.
    No inverse of G is taken: the solution is a projection of W onto output directions.
    """
    outputs, inputs = weight.shape
    size = min(outputs, inputs)
    metric = output_gram
    if metric is not None and not metric.diagonal().max() > 0:
        metric = None  # no gradient reaches this linear: nothing to weight by
    if metric is not None:
        metric = lift(metric)

    if outputs <= inputs:
        covariance = weight @ gram @ weight.T
        if metric is None:
            values, vectors = torch.linalg.eigh(covariance)
        else:  # F = L Lᵀ; directions of Lᵀ W G Wᵀ L, seen from the outputs
            lower = torch.linalg.cholesky(metric)
            values, vectors = torch.linalg.eigh(lower.T @ covariance @ lower)
            vectors = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
        columns = vectors.flip(1)
    else:
        half = gram_root() if gram_root is not None else root(gram)
        inner = weight.T @ (weight if metric is None else metric @ weight)
        values, vectors = torch.linalg.eigh(half @ inner @ half)
        columns = weight @ (half @ vectors.flip(1))
    values = values.flip(0)
    known = int((values > NOISE * values[0].clamp(min=0)).sum())
    if known < size:
        columns = torch.cat([columns[:, :known], _complete(weight, metric, columns[:, :known])], 1)
    left, _ = torch.linalg.qr(columns[:, :size])
    rows, mix = _rows(left, weight, metric)
    energy = ((rows @ gram) * rows).sum(1).clamp(min=0)
    return Decomposition(left, rows, mix, energy)


def _rows(left: Tensor, weight: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if metric is None:
        return left.T @ weight, None
    weighted = left.T @ metric
    mix = torch.linalg.cholesky(weighted @ left).T
    rows = torch.linalg.solve_triangular(mix.T, weighted @ weight, upper=False)
    return rows, mix.contiguous()


def _complete(weight: Tensor, metric: Tensor | None, columns: Tensor) -> Tensor:
    """Directions that the calibration never excites, by their share of the weight itself.

    They cost nothing on the calibration text, but without them full rank would not be the
    original weight.
    """
    rest = weight
    if columns.shape[1]:
        left, _ = torch.linalg.qr(columns)
        rows, mix = _rows(left, weight, metric)
        if mix is not None:
            rows = torch.linalg.solve_triangular(mix, rows, upper=True)
        rest = weight - left @ rows
    missing = min(weight.shape) - columns.shape[1]
    if weight.shape[0] <= weight.shape[1]:
        return torch.linalg.eigh(rest @ rest.T)[1].flip(1)[:, :missing]
    return rest @ torch.linalg.eigh(rest.T @ rest)[1].flip(1)[:, :missing]


@dataclass
class Pivot:
    """`A @ B` as `cat(z, rest @ z)[order]` with `z = pivot @ x`.

    pivot: (r, n), r rows of `A @ B`. rest: (m - r, r). order: (m,) int64.
    """

    pivot: Tensor
    rest: Tensor
    order: Tensor


def to_pivot(a: Tensor, b: Tensor) -> Pivot | None:
    """Pivot form of `a @ b` (a: (m, r), b: (r, n)); None if no r rows are well conditioned.

    The rows are those of QR with pivoting of `aᵀ`, found as a pivoted Cholesky of `a aᵀ`:
    the same choice, half the memory traffic.
    """
    size, rank = a.shape
    kept = a.new_zeros(rank, size)
    left = a.square().sum(1)
    chosen: list[int] = []
    largest = float(left.max().sqrt())
    for step in range(rank):
        index = int(left.argmax())
        diagonal = math.sqrt(max(float(left[index]), 0.0))
        if diagonal <= PIVOT_FLOOR * largest:
            return None
        row = (a @ a[index] - kept[:step, index] @ kept[:step]) / diagonal
        kept[step] = row
        left = left - row.square()
        chosen.append(index)
        left[chosen] = -1.0
    picked = torch.tensor(chosen)
    mask = torch.ones(size, dtype=torch.bool)
    mask[picked] = False
    permutation = torch.cat([picked, mask.nonzero()[:, 0]])
    order = torch.empty(size, dtype=torch.int64)
    order[permutation] = torch.arange(size)
    rest = torch.linalg.solve(a[picked], a[mask], left=False)
    return Pivot(a[picked] @ b, rest, order)


# ---- ranks under a budget ----------------------------------------------------------------


def cost(rank: int, shape: tuple[int, int], pivot: bool) -> int:
    """Parameters of an (m, n) weight at a rank, as factors or in pivot form."""
    return rank * (sum(shape) - (rank if pivot else 0))


@dataclass
class Choice:
    """What one weight may become. curve: loss(r), r = 0 … min(m, n), as a list of floats."""

    shape: tuple[int, int]
    curve: Sequence[float]


def uniform_ranks(
    shapes: Sequence[tuple[int, int]], keep: float, pivot: bool, multiple: int = 1
) -> list[int | None]:
    """The largest rank of each weight that costs at most `keep` of it; None is dense."""
    ranks: list[int | None] = []
    for m, n in shapes:
        if keep >= 1:
            ranks.append(None)
            continue
        rank = keep * m * n / (m + n)
        if pivot:
            rank = ((m + n) - math.sqrt((m + n) ** 2 - 4 * keep * m * n)) / 2
        rank = int(rank) // multiple * multiple
        ranks.append(max(rank, min(multiple, m, n)))
    return ranks


def allocate(
    choices: Sequence[Choice], budget: float, pivot: bool, multiple: int = 1
) -> list[int | None] | None:
    """Ranks with the least total loss within `budget` parameters; None is dense.

    Walks down the lower convex hull of every weight's (parameters, loss) from dense, the
    cheapest loss per parameter first, then spends what the last step saved too much.
    Returns None when even the smallest ranks cost more.
    """
    options = [_options(c, pivot, multiple) for c in choices]
    place = [len(o) - 1 for o in options]  # dense is the last option
    total = float(sum(o[-1][0] for o in options))
    if sum(o[0][0] for o in options) > budget:
        return None
    steps = []
    for site, points in enumerate(options):
        hull = _hull(points)
        for low, high in zip(hull, hull[1:], strict=False):
            slope = (points[low][1] - points[high][1]) / (points[high][0] - points[low][0])
            steps.append((slope, -low, site))
    for _, low, site in sorted(steps):
        if total <= budget:
            break
        total -= options[site][place[site]][0] - options[site][-low][0]
        place[site] = -low

    def gain(site: int) -> tuple[float, int] | None:
        here = place[site]
        if here + 1 >= len(options[site]):
            return None
        (before, loss), (after, less) = options[site][here][:2], options[site][here + 1][:2]
        return (less - loss) / (after - before), site

    heap = [g for site in range(len(options)) if (g := gain(site)) is not None]
    heapq.heapify(heap)
    while heap:
        _, site = heapq.heappop(heap)
        extra = options[site][place[site] + 1][0] - options[site][place[site]][0]
        if total + extra > budget:
            continue  # no later option of this weight is cheaper
        total += extra
        place[site] += 1
        if (following := gain(site)) is not None:
            heapq.heappush(heap, following)
    return [options[site][at][2] for site, at in enumerate(place)]


Option = tuple[int, float, int | None]  # parameters, loss, rank


def _options(choice: Choice, pivot: bool, multiple: int) -> list[Option]:
    """Every rank that saves parameters, then dense, by rising parameters."""
    m, n = choice.shape
    dense: Option = (m * n, 0.0, None)
    ranks = range(min(multiple, m, n), min(m, n) + 1, multiple)
    saving = [(cost(r, choice.shape, pivot), choice.curve[r], r) for r in ranks]
    return [o for o in saving if o[0] < m * n] + [dense]


def _hull(points: list[Option]) -> list[int]:
    """Indices of the lower convex hull of (parameters, loss)."""
    hull: list[int] = []
    for index, (x, y, _) in enumerate(points):
        while len(hull) >= 2:
            (x0, y0, _), (x1, y1, _) = points[hull[-2]], points[hull[-1]]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append(index)
    return hull
