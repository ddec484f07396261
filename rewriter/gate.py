"""The numerical check of a rewrite: every site on the original's activations, then the whole."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from rewriter.calibration import walk
from rewriter.errors import GateError
from rewriter.protocol import Contract, Pass, Site

#: Relative difference that floating point alone explains, by dtype of the model.
EXACT = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(eq=False)
class Rewritten:
    """One rewritten site, and what the gate has measured there.

    found: name of the site's value in the graph as its step found it. original: the same in
    the captured graph; a value that an earlier step has made has no such name there.
    """

    step: Pass
    site: Site
    found: str
    original: str
    output: Node  # node of the rewritten graph
    facts: dict[str, Any]
    dropped: set[str] = field(default_factory=set)
    error: float = 0.0  # relative to the original: sqrt(Σ|Δ|² / Σ|reference|²)
    deviation: float = 0.0  # from what the pass says that it does


def measure_step(
    before: GraphModule,
    module: GraphModule,
    sites: list[Rewritten],
    batches: list[list[Tensor]],
    masks: list[Tensor],
) -> None:
    """Compare a step's sites with the graph that it found: `error` and `deviation` of each.

    Raises GateError for a value that changed and that no site owns.
    """
    for site in sites:
        site.deviation = 0.0
    pairs = {s.output.name: (s.found, s) for s in sites}
    _compare(before, module, pairs, batches, masks, promises=True)


def measure_sites(
    reference: GraphModule,
    module: GraphModule,
    sites: list[Rewritten],
    batches: list[list[Tensor]],
    masks: list[Tensor],
) -> None:
    """Compare all sites after several steps with the original: `error` of each.

    A site that rewrites what an earlier step made keeps the error that `measure_step` found.
    """
    names = {n.name for n in reference.graph.nodes}
    pairs = {s.output.name: (s.original, s) for s in sites if s.original in names}
    _compare(reference, module, pairs, batches, masks, promises=False)


class _Truth:
    """Values of the reference graph by name, each computed once and kept while it is wanted."""

    def __init__(self, module: GraphModule, inputs: list[Tensor], wanted: Counter[str]) -> None:
        self._runner = walk(module, inputs)
        self._wanted = Counter(wanted)
        self._values: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        while name not in self._values:
            node, value, _ = next(self._runner, (None, None, None))
            if node is None:
                raise KeyError(name)
            if self._wanted[node.name] > 0:
                self._values[node.name] = value
        return self._values[name]

    def release(self, name: str) -> None:
        self._wanted[name] -= 1
        if self._wanted[name] <= 0:
            self._values.pop(name, None)


def _compare(
    reference: GraphModule,
    module: GraphModule,
    pairs: dict[str, tuple[str, Rewritten]],
    batches: list[list[Tensor]],
    masks: list[Tensor],
    promises: bool,
) -> None:
    """Run both graphs in step; every rewritten site sees the reference's inputs.

    After each site the reference's value is put in its place, so errors do not add up. A node
    that no site owns must keep its value: if it does not, the rewrite reached outside.

    Args:
        pairs: name of a site's output in `module`: its name in `reference`, and the site.
    """
    present = {n.name for n in reference.graph.nodes if n.op in ("call_function", "output")}
    needs: dict[str, list[str]] = {}
    wanted: Counter[str] = Counter()
    for output, (name, site) in pairs.items():
        needs[output] = [name, *(site.step.needs(site.site) if promises else ())]
        wanted.update(needs[output])
    for node in module.graph.nodes:
        if node.op in ("call_function", "output") and node.name not in pairs:
            wanted[node.name] += node.name in present
    sums = {output: [0.0, 0.0] for output in pairs}
    for batch, mask in zip(batches, masks, strict=True):
        truth = _Truth(reference, batch, wanted)
        with torch.no_grad():
            for node, value, environment in walk(module, batch):
                if node.name in pairs:
                    name, site = pairs[node.name]
                    reference_value = truth[name]
                    _record(site, value, reference_value, truth, mask, promises, sums[node.name])
                    environment[node] = reference_value
                    for used in needs[node.name]:
                        truth.release(used)
                elif node.op in ("call_function", "output") and node.name in present:
                    _untouched(node, value, truth[node.name], mask)
                    truth.release(node.name)
    for output, (_, site) in pairs.items():
        error, scale = sums[output]
        site.error = math.sqrt(error / scale) if scale else math.sqrt(error)


def _real(value: Tensor, mask: Tensor) -> Tensor:
    """The rows of real tokens, when the value is [B, L, …]."""
    if value.shape[:2] == mask.shape:
        return value[mask.bool()]
    return value


def _untouched(node: Node, value: Any, truth: Any, mask: Tensor) -> None:
    if isinstance(value, (tuple, list)) and isinstance(truth, (tuple, list)):
        for left, right in zip(value, truth, strict=False):
            _untouched(node, left, right, mask)
        return
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return
    if not isinstance(truth, Tensor):
        return
    where = f"{node.name} ({node.meta.get('path') or 'model'})"
    fix = "this is a bug in the pass; nothing was saved"
    if truth.shape != value.shape:
        raise GateError(
            f"{where} has the shape {tuple(value.shape)}, not {tuple(truth.shape)}, "
            "but no rewritten site owns it: a rewrite reached outside of its site",
            fix,
        )
    if torch.equal(value, truth):
        return
    if value.shape[:2] != mask.shape and not bool(mask.all()):
        return  # padded positions cannot be told apart here
    left, right = _real(value, mask), _real(truth, mask)
    if torch.equal(left, right):
        return
    # Infinities (of a mask) must be the same ones.
    same = (left == right) | (left.isnan() & right.isnan())
    gap = float((left - right).abs().masked_fill(same, 0).max())
    scale = float(right.abs().masked_fill(~right.isfinite(), 0).max())
    if not gap <= EXACT.get(value.dtype, 1e-4) * max(scale, 1e-30):
        raise GateError(
            f"{where} has changed by {gap / max(scale, 1e-30):.2e}, "
            "but no rewritten site owns it: a rewrite reached outside of its site",
            fix,
        )


def _record(
    site: Rewritten,
    value: Tensor,
    truth: Tensor,
    values: _Truth,
    mask: Tensor,
    promises: bool,
    sums: list[float],
) -> None:
    name = f"{site.step.name} at {site.site.name}"
    if not isinstance(value, Tensor) or value.shape != truth.shape:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise GateError(f"{name}: the output is {shape}, not {tuple(truth.shape)}")
    left, right = _real(value, mask).double(), _real(truth, mask).double()
    if not bool(torch.isfinite(left).all()):
        raise GateError(f"{name}: the rewritten output has NaN or infinity")
    sums[0] += float((left - right).square().sum())
    sums[1] += float(right.square().sum())
    if not promises:
        return
    needed = set(site.step.needs(site.site))

    def original(wanted: str) -> Any:
        if wanted not in needed:
            raise GateError(f"{name} asks for {wanted}, which its `needs` does not list")
        return values[wanted]

    expected = site.step.expected(site.site, original, truth)
    if expected is not None:
        if expected.shape != value.shape:
            raise GateError(f"{name}: the output is {tuple(value.shape)}, not what is expected")
        wish = _real(expected, mask).double()
        scale = float(wish.abs().max().clamp_min(1e-30)) if wish.numel() else 1.0
        gap = float((left - wish).abs().max()) / scale if wish.numel() else 0.0
        if not gap <= site.deviation:  # NaN stays
            site.deviation = gap


def judge(sites: list[Rewritten], dtype: torch.dtype) -> tuple[list[Rewritten], list[str]]:
    """Sites to roll back, and warnings. Raises GateError where the policy says fail.

    A site that does not compute what its pass promises fails under every policy: that is a
    wrong rewrite, not a lossy one.
    """
    back: list[Rewritten] = []
    warnings: list[str] = []
    exact = EXACT.get(dtype, 1e-4)
    for site in sites:
        name, config = f"{site.step.name} at {site.site.name}", site.step.config
        if not site.deviation <= exact:
            raise GateError(
                f"{name} does not compute what the pass promises (relative deviation "
                f"{site.deviation:.2e})",
                "this is a bug in the pass; nothing was saved",
            )
        bound = config.tolerance
        if bound is None and site.step.contract is Contract.EXACT:
            bound = exact
        if bound is None or site.error <= bound:
            continue
        message = f"{name} has a relative error of {site.error:.3g}, above {bound:g}"
        if config.policy == "roll_back":
            back.append(site)
            message += "; rolled back"
        elif site.step.contract is Contract.EXACT or config.policy == "fail":
            raise GateError(message, "loosen `tolerance`, choose other layers, or `policy: warn`")
        warnings.append(message)
    return back, warnings


def measure_whole(
    reference: GraphModule, module: GraphModule, batches: list[list[Tensor]]
) -> dict[str, float]:
    """Mean KL(original || rewritten) in nats a token, top-1 agreement, both perplexities."""
    kl = agree = count = 0.0
    nll = [0.0, 0.0]
    scored = 0
    for batch in batches:
        with torch.no_grad():
            before = reference(*batch)[0].float().log_softmax(-1)[0]
            after = module(*batch)[0].float().log_softmax(-1)[0]
        for start in range(0, before.shape[0], 128):  # float64 of a whole batch is large
            p, q = (x[start : start + 128].double() for x in (before, after))
            kl += float((p.exp() * (p - q)).sum())
            agree += float((p.argmax(-1) == q.argmax(-1)).sum())
            count += p.shape[0]
        labels = batch[0][0, 1:]
        rows = torch.arange(len(labels))
        for index, x in enumerate((before, after)):
            nll[index] -= float(x[rows, labels].double().sum())
        scored += len(labels)
    if not scored:
        return {}
    return {
        "kl": kl / count,
        "top1": agree / count,
        "perplexity_before": math.exp(nll[0] / scored),
        "perplexity_after": math.exp(min(nll[1] / scored, 700)),
    }
