"""The numerical check of a rewrite: every site on the original's activations, then the whole."""

from __future__ import annotations

import math
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


@dataclass
class Rewritten:
    """One rewritten site, and what the gate has measured there."""

    step: Pass
    site: Site
    original: str  # name of the node of the original graph
    output: Node  # node of the rewritten graph
    facts: dict[str, Any]
    dropped: set[str] = field(default_factory=set)
    error: float = 0.0  # relative to the original: sqrt(Σ|Δ|² / Σ|reference|²)
    deviation: float = 0.0  # from what the pass says that it does
    _sums: list[float] = field(default_factory=lambda: [0.0, 0.0])


def measure_sites(
    reference: GraphModule,
    module: GraphModule,
    sites: list[Rewritten],
    batches: list[list[Tensor]],
    masks: list[Tensor],
) -> None:
    """Run both graphs in step; every rewritten site sees the original's inputs.

    After each site the original's value is put in its place, so errors do not add up. A node
    that no site owns must keep its value: if it does not, the rewrite reached outside.
    """
    outputs = {s.output.name: s for s in sites}
    originals = {n.name: n for n in reference.graph.nodes}
    for batch, mask in zip(batches, masks, strict=True):
        true: dict[str, Any] = {}
        runner = walk(reference, batch)
        wanted = {s.original for s in sites}

        def value_of(name: str, runner: Any = runner, true: dict[str, Any] = true) -> Any:
            while name not in true:
                node, value, _ = next(runner)
                true[node.name] = value
            return true[name]

        with torch.no_grad():
            for node, value, environment in walk(module, batch):
                site = outputs.get(node.name)
                name = site.original if site else node.name
                if not isinstance(value, Tensor) or not value.is_floating_point():
                    continue
                if node.op != "call_function" or name not in originals:
                    continue
                truth = value_of(name)
                if site is None:
                    _untouched(node, value, truth, mask)
                else:
                    _record(site, value, truth, environment, true, mask)
                    environment[node] = truth
                if name not in wanted:
                    _forget(true, originals[name])
    for site in sites:
        site.error = math.sqrt(site._sums[0] / site._sums[1]) if site._sums[1] else 0.0


def _forget(true: dict[str, Any], node: Node) -> None:
    """Keep the memory of one sequence small: large values go once they are compared."""
    for parent in node.all_input_nodes:
        if all(u.name in true for u in parent.users):
            true[parent.name] = None


def _real(value: Tensor, mask: Tensor) -> Tensor:
    """The rows of real tokens, when the value is [B, L, …]."""
    if value.shape[:2] == mask.shape:
        return value[mask.bool()]
    return value


def _untouched(node: Node, value: Tensor, truth: Any, mask: Tensor) -> None:
    if not isinstance(truth, Tensor) or truth.shape != value.shape:
        return
    left, right = _real(value, mask).double(), _real(truth, mask).double()
    scale = right.abs().max().item() if right.numel() else 0.0
    gap = (left - right).abs().max().item() if right.numel() else 0.0
    if value.shape[:2] != mask.shape and not bool(mask.all()):
        return  # padded positions cannot be told apart here
    if not gap <= EXACT.get(value.dtype, 1e-4) * max(scale, 1e-30):
        raise GateError(
            f"{node.name} ({node.meta.get('path') or 'model'}) has changed by {gap / scale:.2e}, "
            "but no rewritten site owns it: a rewrite reached outside of its site",
            "this is a bug in the pass; nothing was saved",
        )


def _record(
    site: Rewritten,
    value: Tensor,
    truth: Tensor,
    environment: dict[Node, Any],
    true: dict[str, Any],
    mask: Tensor,
) -> None:
    if value.shape != truth.shape:
        raise GateError(f"{site.site.name}: the output is {tuple(value.shape)}, not {tuple(truth.shape)}")
    left, right = _real(value, mask).double(), _real(truth, mask).double()
    if not bool(torch.isfinite(left).all()):
        raise GateError(f"{site.site.name}: the rewritten output has NaN or infinity")
    site._sums[0] += float((left - right).square().sum())
    site._sums[1] += float(right.square().sum())
    expected = site.step.expected(site.site, lambda name: true.get(name), truth)
    if expected is not None:
        wish = _real(expected, mask).double()
        scale = float(wish.abs().max().clamp_min(1e-30))
        site.deviation = max(site.deviation, float((left - wish).abs().max()) / scale)


def judge(sites: list[Rewritten], dtype: torch.dtype) -> tuple[list[Rewritten], list[str]]:
    """What to roll back, and warnings. Raises GateError where the policy says fail."""
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
        if site.step.contract is Contract.EXACT or config.policy == "fail":
            raise GateError(message, "loosen `tolerance`, choose other layers, or `policy: warn`")
        if config.policy == "roll_back":
            back.append(site)
            message += "; rolled back"
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
