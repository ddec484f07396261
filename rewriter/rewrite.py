"""`rewrite(model, plan)`: capture, passes, verifier, gate, state, model."""

from __future__ import annotations

import copy
import hashlib
import platform
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import AutoTokenizer, PreTrainedModel

from rewriter import gate
from rewriter.calibration import Activations, copy_module, graph_inputs, spread, token_batches
from rewriter.capture import capture, example_inputs
from rewriter.errors import CaptureError, GateError, PlanError, VerifyError
from rewriter.graph import Graph
from rewriter.inspection import total_layers
from rewriter.loading import load_model
from rewriter.model import RewriterConfig, RewrittenModel, companions
from rewriter.plan import Plan
from rewriter.protocol import Contract, Made, Pass, Site
from rewriter.selection import select
from rewriter.seq2seq import build
from rewriter.state import thread_state
from rewriter.state_size import pays_from, state_size


def rewrite(
    model: PreTrainedModel | str | Path,
    plan: Plan | dict[str, Any] | str | Path,
    data: Any = None,
    *,
    tokenizer: Any = None,
) -> RewrittenModel:
    """Rewrite a model by a plan; the result is checked against the original.

    Args:
        model: a transformers model (it is not changed), a folder, a `.gguf` file or a Hub id.
        plan: a Plan, its dictionary, or YAML (text or path).
        data: calibration text: a path, paths, a Hub data set, texts, or token ids [N, length].
            It wins over the plan's `data`; without either a small sample is used.
        tokenizer: for a model object whose tokenizer is not at `name_or_path`.

    Returns:
        The rewritten model with `.report`, `.lock`, `.plan` and `.graph`.

    Raises:
        PlanError, CaptureError: a mistake in the input. GateError: the result is wrong.
    """
    plan = plan if isinstance(plan, Plan) else _plan(plan)
    seconds: dict[str, float] = {}
    clock = time.perf_counter()
    source = None if isinstance(model, nn.Module) else str(model)
    original = model if isinstance(model, nn.Module) else load_model(model)
    if not isinstance(original, PreTrainedModel):
        raise CaptureError(
            "rewrite() returns a transformers model and needs one",
            "use rewriter.capture() for a plain module",
        )
    source = source or getattr(original, "name_or_path", "") or type(original).__name__
    seconds["load"], clock = time.perf_counter() - clock, time.perf_counter()
    torch.manual_seed(plan.seed)
    graph = capture(original)
    reference = copy_module(graph.module)
    seconds["capture"], clock = time.perf_counter() - clock, time.perf_counter()
    text = _is_text(graph)
    tokenizer = tokenizer or _tokenizer(source)
    before = _count(graph)
    state_before = state_size(graph)
    batches, about = _batches(graph, original, tokenizer, plan, data, text)
    run = _run_steps(graph, plan, reference, batches, text)
    sites = run.sites
    seconds["passes"], clock = time.perf_counter() - clock, time.perf_counter()
    report: dict[str, Any] = {
        "model": source,
        "plan": plan.to_yaml(),
        "status": _status(sites),
        "data": about,
        "near_misses": run.misses,
        "warnings": ([about["note"]] if about["note"] else []) + run.warnings,
    }
    report |= _check(graph, reference, run, plan, text)
    seconds["gate"], clock = time.perf_counter() - clock, time.perf_counter()
    state_after = state_size(graph)
    if graph.decodes:
        thread_state(graph)
    seconds["state"] = time.perf_counter() - clock
    report["parameters"] = {"before": before, "after": _count(graph)}
    report["state"] = {
        "before": state_before,
        "after": state_after,
        "pays_from": pays_from(state_before, state_after) if sites else None,
    }
    report["seconds"] = seconds
    config = RewriterConfig(original=original.config.to_dict(), recovery=report["status"])
    made = build(config, graph).eval()
    if original.can_generate():
        made.generation_config = copy.deepcopy(original.generation_config)
    made.plan, made.report = plan, report
    made.lock = _lock(source, plan, graph, reference, sites, about)
    made.companions = companions(source)
    return made


def _plan(plan: Any) -> Plan:
    if isinstance(plan, dict):
        return Plan(**plan)
    if isinstance(plan, (str, Path)):
        return Plan.from_yaml(plan)
    raise PlanError(f"a plan cannot be a {type(plan).__name__}", "give a Plan, a dict or YAML")


def _is_text(graph: Graph) -> bool:
    known = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}
    return set(graph.inputs) <= known and "input_ids" in graph.inputs


def _tokenizer(source: str) -> Any:
    path = Path(source)
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        if path.is_dir() and companions(path):
            return AutoTokenizer.from_pretrained(path)
        if source.count("/") == 1 and not path.exists():
            return AutoTokenizer.from_pretrained(source)
    except Exception:  # a model without a tokenizer is fine: the report says what was used
        return None
    return None


def _batches(
    graph: Graph, original: PreTrainedModel, tokenizer: Any, plan: Plan, data: Any, text: bool
) -> tuple[list[list[Tensor]], dict[str, Any]]:
    data = plan.data if data is None else data
    if not text:
        example = example_inputs(original)
        note = "random inputs: figures mean little"
        return [[example[n] for n in graph.inputs]], {"source": note, "tokens": 0, "note": note}
    if not plan.steps and data is None:
        return [], {"source": "none", "tokens": 0, "note": ""}
    asked = plan.calibration
    limit = getattr(graph.config.get_text_config(), "max_position_embeddings", None)
    length = min(asked.length, limit or asked.length)
    sequences = max(asked.sequences, plan.gate.sequences)
    return token_batches(graph, tokenizer, data, sequences, length, plan.seed)


@dataclass
class _Steps:
    """What the plan's steps did: rewritten sites, near misses, warnings, the gate's batches."""

    sites: list[gate.Rewritten] = field(default_factory=list)
    misses: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    batches: list[list[Tensor]] = field(default_factory=list)


def _run_steps(
    graph: Graph, plan: Plan, reference: Any, batches: list[list[Tensor]], text: bool
) -> _Steps:
    """Run the plan's steps in order, with the verifier and the gate after each."""
    run = _Steps()
    chosen = spread(batches, plan.gate.sequences)
    run.batches = [[t[:, : plan.gate.length] for t in b] for b in chosen] if text else chosen
    checked, masks = list(run.batches), [torch.ones(b[0].shape[:2]) for b in run.batches]
    if text and run.batches and "attention_mask" in graph.inputs:
        padded, mask = _padded(graph, run.batches)
        checked.append(padded)
        masks.append(mask)
    layers = total_layers(graph)
    for number, step in enumerate(plan.steps):
        before = reference if number == 0 else copy_module(graph.module)
        made_by = step.build()
        found = list(made_by.sites(graph))
        chosen, near = select(found, made_by.config, layers, made_by.name)
        run.misses += [{"pass": step.name, "site": m.name, "reason": m.reason} for m in near]
        gradients = plan.calibration.gradient_tokens
        calibration = Activations(reference, graph, batches, gradients) if batches else None
        made_by.prepare(graph, chosen, calibration if made_by.needs_calibration else None)
        earlier, dropped = list(run.sites), set(graph.dropped)
        while True:
            made = _apply(graph, made_by, chosen, run)
            gate.measure_step(before, graph.module, made, checked, masks)
            if number:
                gate.measure_sites(reference, graph.module, run.sites, checked, masks)
            back, warnings = gate.judge(made, _dtype(graph))
            run.warnings += warnings
            if not back:
                break
            left = {s.site.name for s in back}
            chosen = [s for s in chosen if s.name not in left]
            chosen = _restore(graph, before, reference, earlier, chosen)
            graph.dropped, run.sites = set(dropped), list(earlier)
            if not chosen:
                if number:
                    gate.measure_sites(reference, graph.module, run.sites, checked, masks)
                break
    return run


def _apply(graph: Graph, made_by: Pass, chosen: list[Site], run: _Steps) -> list[gate.Rewritten]:
    """Rewrite the chosen sites; `run.sites` then holds the newest rewrite of every value."""
    done = run.sites
    result: list[gate.Rewritten] = []
    checks: list[tuple[Site, Made]] = []
    for site in chosen:
        found, origin = site.node.name, _origin(site, done)
        made: Made = made_by.rewrite(graph, site)
        done = [d for d in done if d.output is not made.output and d.original != origin]
        result.append(
            gate.Rewritten(made_by, site, found, origin, made.output, made.facts, made.dropped)
        )
        done.append(result[-1])
        checks.append((site, made))
    run.sites = done
    declared = set().union(*(d.dropped for d in done)) if done else set()
    graph.sweep(declared)
    alive = set(graph.nodes)
    for earlier in done:
        if earlier.output not in alive and earlier not in result:
            raise PlanError(
                f"{made_by.name} replaces what {earlier.step.name} made at {earlier.site.name}",
                "give each of them its own layers",
            )
    verify(graph, done)
    for site, made in checks:
        made_by.check(graph, site, made)
    lost = [s for s in result if s not in done]
    if lost:
        raise VerifyError(f"{lost[0].site.name}: another site of {made_by.name} has its output")
    return result


def _restore(
    graph: Graph,
    before: GraphModule,
    reference: GraphModule,
    earlier: list[gate.Rewritten],
    chosen: list[Site],
) -> list[Site]:
    """Put the graph back to before the step; the chosen sites with their nodes in it."""
    graph.module = copy_module(before)
    nodes = {n.name: n for n in graph.module.graph.nodes}
    for other in reference.graph.nodes:  # values are compared by name: a name is never reused
        if other.name not in nodes:
            graph.module.graph._graph_namespace.create_name(other.name, None)
    for site in earlier:
        site.output = nodes[site.output.name]
    return [replace(s, node=nodes[s.node.name]) for s in chosen]


def _dtype(graph: Graph) -> torch.dtype:
    floats = (t.dtype for _, t in graph.parameters() if t.is_floating_point())
    return next(floats, torch.float32)


def _origin(site: Site, done: list[gate.Rewritten]) -> str:
    """Name in the original graph of the value that a site makes."""
    for earlier in done:
        if earlier.output is site.node:
            return earlier.original
    return site.node.name


def verify(graph: Graph, sites: list[gate.Rewritten]) -> None:
    """Invariants after a pass: the graph is well formed and every tensor is accounted for.

    Raises VerifyError naming the tensor or node.
    """
    try:
        graph.module.graph.lint()
    except Exception as error:
        raise VerifyError(f"the graph is not well formed: {error}") from error
    alive = {name for name, _ in graph.parameters()}
    lost = graph.source_tensors - alive - graph.dropped
    if lost:
        raise VerifyError(f"{sorted(lost)[0]} is neither used nor declared as dropped")
    nodes = set(graph.nodes)
    for site in sites:
        if site.output not in nodes:
            raise VerifyError(f"the output of {site.site.name} is not in the graph any more")


def _check(
    graph: Graph, reference: GraphModule, run: _Steps, plan: Plan, text: bool
) -> dict[str, Any]:
    """The gate on the whole model, and the report's entries for every site."""
    if not run.sites:
        return {"sites": [], "whole": {}}
    whole: dict[str, float] = {}
    decoder = graph.decodes or "position_ids" in graph.inputs
    if text and decoder and graph.outputs[:1] == ["logits"]:
        whole = gate.measure_whole(reference, graph.module, run.batches)
        limit = plan.gate.max_kl
        if limit is not None and not whole["kl"] <= limit:
            raise GateError(
                f"KL from the original is {whole['kl']:.3g} nats a token, above {limit:g}",
                "raise gate.max_kl, or rewrite less",
            )
    entries = [
        {
            "pass": s.step.name,
            "site": s.site.name,
            "layer": s.site.layer,
            "error": s.error,
            "facts": s.facts,
        }
        for s in run.sites
    ]
    return {"sites": entries, "whole": whole}


def _padded(graph: Graph, batches: list[list[Tensor]]) -> tuple[list[Tensor], Tensor]:
    """Two sequences (or the only one twice) as one batch with the second row left-padded."""
    column = graph.inputs.index("input_ids")
    first, second = batches[0][column], batches[min(1, len(batches) - 1)][column]
    length = min(first.shape[1], second.shape[1])
    short = max(1, length * 2 // 3)
    ids = torch.cat([first[:, :length], second[:, :length]])
    mask = torch.ones_like(ids)
    ids[1, : length - short] = 0
    ids[1, length - short :] = second[0, :short]
    mask[1, : length - short] = 0
    return graph_inputs(graph, ids, mask), mask


def _status(sites: list[gate.Rewritten]) -> str:
    contracts = {s.step.contract for s in sites}
    if Contract.NEEDS_RECOVERY in contracts:
        return "unrecovered"
    return "approximate" if Contract.APPROXIMATE in contracts else "exact"


def _count(graph: Graph) -> int:
    return sum(t.numel() for _, t in graph.parameters() if t.is_floating_point())


def _lock(
    source: str,
    plan: Plan,
    graph: Graph,
    reference: GraphModule,
    sites: list[gate.Rewritten],
    about: dict[str, Any],
) -> dict[str, Any]:
    import transformers

    tensors = {name: tensor_hash(t) for name, t in graph.parameters()}
    # Recovery takes from the new weights what did not change, and reads the rest.
    before = {
        name: tensors[name] if name in tensors and t is graph.tensor(name) else tensor_hash(t)
        for name, t in Graph(reference).parameters()
    }
    return {
        "version": 1,
        "original": {"source": source, "class": graph.model_class, "tensors": before},
        "plan": plan.to_yaml(),
        "data": about,
        "seed": plan.seed,
        "sites": [
            {
                "pass": s.step.name,
                "site": s.site.name,
                "output": s.output.name,  # names of the value in this graph and the original's
                "original": s.original,
                "error": s.error,
                "facts": s.facts,
            }
            for s in sites
        ],
        "dropped": sorted(graph.dropped),
        "tensors": tensors,
        "versions": {
            "rewriter": version("rewriter"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
    }


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


__all__ = ["rewrite", "tensor_hash", "verify"]
