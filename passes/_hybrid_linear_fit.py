"""Closed-form start of the `hybrid_linear` pass: centroids, gates, each checked on other text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.passes._hybrid_linear_maps import Maps, map_tensors

KEYS = 16384  # for the centroids of one head
ITERATIONS = 10
RIDGE = 1e-3
QUERIES = 1536  # of one site
#: Candidates for a head's log gate, added to the mean that gives the true far mass. The first
#: is as good as no far branch, and can still be trained.
GATES = torch.linspace(-8, 4, 25)


@dataclass(eq=False)
class _Sample:
    """Some queries of one sequence, and all that they see; n of them, S keys.

    q: [H, n, D]. k, v: [H, S, D]. far: [n, S]. near_y, near_total: [H, n, Dv] and [H, n], the
    exact part relative to e^top. far_logits: [H, n, S] relative to top; -inf: not far.
    far_mass: [H, n], their logsumexp. level: [H, n], log of what far weights are relative to,
    over e^top. truth: [H, n, Dv].
    """

    q: Tensor
    keys: Tensor
    far: Tensor
    near_y: Tensor
    near_total: Tensor
    far_logits: Tensor
    far_mass: Tensor
    level: Tensor
    v: Tensor
    truth: Tensor
    queries: Tensor


#: What the features give a sample from far tokens: the values' sum [H, n, Dv], the mass [H, n].
_Far = tuple[Tensor, Tensor]


@torch.no_grad()
def centroids(sequences: list[Tensor], sinks: int, number: int, seed: int) -> tuple[Tensor, Tensor]:
    """k-means of the keys that can be far, per key head.

    Args:
        sequences: keys [1, Hk, T, D].

    Returns:
        centres [Hk, number, D] and the mean squared distance to them per dimension, [Hk].
    """
    keys = torch.cat([k[0, :, sinks:] for k in sequences], 1).float()
    step = max(1, keys.shape[1] // KEYS)
    keys = keys[:, ::step]
    generator = torch.Generator().manual_seed(seed)
    found, spread = [], []
    for x in keys:
        choice = torch.randint(len(x), (number,), generator=generator)
        if len(x) >= number:
            choice = torch.randperm(len(x), generator=generator)[:number]
        centre = x[choice.to(x.device)].clone()
        for _ in range(ITERATIONS):
            nearest = (x @ centre.T - centre.square().sum(-1) / 2).argmax(-1)
            total = torch.zeros_like(centre).index_add_(0, nearest, x)
            size = torch.bincount(nearest, minlength=number)
            centre = torch.where(size[:, None] > 0, total / size.clamp_min(1)[:, None], centre)
        found.append(centre)
        nearest = (x @ centre.T - centre.square().sum(-1) / 2).argmax(-1)
        spread.append((x - centre[nearest]).square().mean().clamp_min(1e-6))
    return torch.stack(found), torch.stack(spread)


@torch.no_grad()
def fit_gates(
    maps: Maps,
    sequences: list[tuple[Tensor, Tensor, Tensor]],
    options: Any,
    scale: float,
    with_gates: bool,
) -> tuple[Maps, dict[str, Any]]:
    """Key gate, query gate and head gate by ridge regression and a grid, none where they hurt.

    A key's log weight is regressed on the key from the far attention that it truly gets
    relative to what the features give it; then what a query's far mass lacks, on the query.
    Every head keeps what lowers its error most on sequences that the regressions did not see
    (every fourth; with fewer than four the same), and next to no far branch where nothing does.

    Args:
        sequences: queries [1, H, T, D], keys [1, Hk, T, D], values [1, Hk, T, Dv].
        options: the pass's configuration.

    Returns:
        The maps, and the relative squared error of the attention output where something is
        far: of the window alone and of the start.
    """
    per = -(-QUERIES // len(sequences))
    samples = [s for q, k, v in sequences if (s := _sample(q, k, v, options, scale, per))]
    if not samples:  # every sequence fits into the window: nothing to learn from
        return maps, {"error_on": "nothing: every sequence fits into the window"}
    held = samples[3::4] or samples
    fitted = [s for i, s in enumerate(samples) if i % 4 != 3] if len(samples) >= 4 else samples
    starts = [maps]
    if with_gates:
        starts.append(keyed := _fit_key_gate(maps, fitted))
    candidates: list[Maps] = []
    rows: list[Tensor] = []
    for start in starts:
        far = {s: _far(start, s) for s in samples}  # the same for all that differ in q alone
        made = [_fit_constant(start, fitted, far)]
        if with_gates:
            made.append(_fit_query_gate(start, fitted, far))
        candidates += made
        rows += [_errors(m, held, far) for m in made]
    errors = torch.stack(rows)  # [candidates, gates, H]
    if with_gates:  # key gates are shared by the heads of a group, so the group decides
        least = errors.amin(1).unflatten(-1, (maps.groups, -1))
        keyed_group = least[2:].amin(0).sum(-1) <= least[:2].amin(0).sum(-1)
        keyed_head = keyed_group.repeat_interleave(maps.heads // maps.groups)
        errors[:2, :, keyed_head], errors[2:, :, ~keyed_head] = torch.inf, torch.inf
    best = errors.flatten(0, 1).argmin(0)
    heads = torch.arange(maps.heads, device=best.device)

    def chosen(name: str) -> Tensor:
        return torch.stack([m.tensors[name] for m in candidates])[best // len(GATES), heads]

    gate = GATES.to(best.device)[best % len(GATES)]
    new = {"gate": chosen("gate") + gate}
    if with_gates:
        new["query_gate"] = chosen("query_gate")
        for name in ("key_gate.weight", "key_gate.bias"):
            value = keyed.tensors[name]
            new[name] = value * keyed_group.view(-1, *(1,) * (value.dim() - 1))
    total = sum(float(s.truth.square().sum()) for s in held)
    window = sum(float((s.near_y / s.near_total[..., None] - s.truth).square().sum()) for s in held)
    return maps.with_(new), {
        "error_window": window / total,
        "error_start": float(errors.flatten(0, 1)[best, heads].sum()) / total,
        "far_heads": int((gate > GATES[0]).sum()),
        "error_on": "held-out sequences" if len(samples) >= 4 else "the fitted sequences",
    }


def _sample(
    query: Tensor, key: Tensor, value: Tensor, options: Any, scale: float, number: int
) -> _Sample | None:
    """`number` queries of a sequence that have far tokens, spread evenly."""
    w, sinks, length = options.window, options.sinks, query.shape[2]
    first = (sinks // w + 2) * w if options.window_kind == "block" else w + sinks
    if first >= length:
        return None
    i = torch.linspace(first, length - 1, min(number, length - first)).long().to(query.device)
    q, k, v = (t[0].float() for t in (query, key, value))
    keys, heads = k, len(q)
    k, v = (t.repeat_interleave(heads // len(t), 0) for t in (k, v))
    q = q[:, i]
    j = torch.arange(length, device=query.device)[None]
    start = ((i // w - 1) * w if options.window_kind == "block" else i - w + 1)[:, None]
    near = (j <= i[:, None]) & (j >= start)
    exact = near | ((j < sinks) & (j < start))
    far = (j < start) & ~exact
    logits = q @ k.mT * scale
    truth = logits.masked_fill(~(exact | far), -torch.inf).softmax(-1) @ v
    inside = logits.masked_fill(~near, -torch.inf)
    level = torch.zeros_like(logits[..., 0])
    if options.reference == "max":
        level = inside.amax(-1)
    elif options.reference == "mean":
        level = inside.logsumexp(-1) - near.sum(-1).float().log()
    seen = logits.masked_fill(~exact, -torch.inf)
    top = seen.amax(-1, keepdim=True)
    weights = (seen - top).exp()
    far_logits = (logits - top).masked_fill(~far, -torch.inf)
    if options.far_cap:
        level = level + (options.far_cap / far.sum(-1).float()).clamp_max(1).log()
    return _Sample(
        q, keys[None], far, weights @ v, weights.sum(-1), far_logits, far_logits.logsumexp(-1),
        level - top[..., 0], v, truth, query[:, :, i].float(),
    )  # fmt: skip


def _kernel(maps: Maps, s: _Sample) -> Tensor:
    """φ_q·φ_k over far tokens, [H, n, S]."""
    fq, fk, _ = map_tensors(s.queries, s.keys, maps)
    fk = fk.repeat_interleave(maps.heads // maps.groups, 1)
    return (fq[0] @ fk[0].mT) * s.far


def _log_factor(maps: Maps, s: _Sample) -> Tensor:
    """Log of what multiplies a query's φ_q·φ_k, [H, n]."""
    return map_tensors(s.queries, s.keys[:, :, :1], maps)[2][0] + s.level


def _far(maps: Maps, s: _Sample) -> _Far:
    a = _kernel(maps, s)
    return a @ s.v, a.sum(-1)


def _ridge(pairs: Iterator[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Weighted ridge regression with a free constant.

    pairs: features [H, n, D], targets and weights [H, n]. Returns [H, D] and [H].
    """
    gram = cross = None
    for x, y, weight in pairs:
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1).double()
        weighted = x * weight[..., None].double()
        terms = x.mT @ weighted, weighted.mT @ y[..., None].double()
        gram = terms[0] if gram is None else gram + terms[0]
        cross = terms[1] if cross is None else cross + terms[1]
    assert gram is not None and cross is not None
    penalty = RIDGE * gram.diagonal(dim1=1, dim2=2)[:, :-1].mean(-1).clamp_min(1e-12)
    system = gram + penalty[:, None, None] * torch.eye(gram.shape[-1], device=gram.device)
    solved = torch.linalg.solve(system, cross)[..., 0]
    return solved[:, :-1].float(), solved[:, -1].float()


def _fit_key_gate(maps: Maps, samples: list[_Sample]) -> Maps:
    def pairs() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for s in samples:
            a = _kernel(maps, s)
            log_mass = s.far_mass[..., None]
            importance = torch.sigmoid(log_mass - s.near_total.log()[..., None])
            true = ((s.far_logits - log_mass).exp() * importance).sum(1)
            ours = (a / a.sum(-1, keepdim=True).clamp_min(1e-20) * importance).sum(1)
            shape = (maps.groups, -1, true.shape[-1])  # a gate serves all heads of its group
            true, ours = (t.view(shape).mean(1) for t in (true, ours))
            y = (true / ours.clamp_min(1e-12)).clamp(1e-3, 1e3).log()
            keys = s.keys[0].repeat_interleave(maps.groups // s.keys.shape[1], 0)
            yield keys, y, s.far.any(0).float().expand_as(y)

    weight, bias = _ridge(pairs())
    return maps.with_({"key_gate.weight": weight, "key_gate.bias": bias})


def _missing(
    maps: Maps, samples: list[_Sample], far: dict[_Sample, _Far]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries, log of true over present far mass, and how much a query's output depends on it."""
    for s in samples:
        _, far_total = far[s]
        y = s.far_mass - _log_factor(maps, s) - far_total.clamp_min(1e-20).log()
        share = torch.sigmoid(s.far_mass - s.near_total.log())
        yield s.q, y, share * (1 - share) + 1e-3


def _fit_query_gate(maps: Maps, samples: list[_Sample], far: dict[_Sample, _Far]) -> Maps:
    weight, bias = _ridge(_missing(maps, samples, far))
    return maps.with_({"query_gate": weight, "gate": maps.tensors["gate"] + bias})


def _fit_constant(maps: Maps, samples: list[_Sample], far: dict[_Sample, _Far]) -> Maps:
    terms = [((y * w).sum(-1), w.sum(-1)) for _, y, w in _missing(maps, samples, far)]
    shift = sum(y for y, _ in terms) / sum(w for _, w in terms)
    return maps.with_({"gate": maps.tensors["gate"] + shift})


def _errors(maps: Maps, samples: list[_Sample], far: dict[_Sample, _Far]) -> Tensor:
    """Squared error of every head's output for every change of its gate, [GATES, H]."""
    total = torch.zeros(len(GATES), maps.heads, device=samples[0].q.device)
    for s in samples:
        far_y, far_total = far[s]
        log_factor = _log_factor(maps, s)
        for number, gate in enumerate(GATES.tolist()):
            f = (log_factor + gate).clamp(max=60).exp()
            y = (s.near_y + f[..., None] * far_y) / (s.near_total + f * far_total)[..., None]
            total[number] += (y - s.truth).square().sum((1, 2))
    return total
