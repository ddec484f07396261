"""`recover(model, original, stages, data)`: the stages of a recovery, one after the other."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from torch import nn
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule
from transformers import PreTrainedModel

from rewriter.errors import RewriterError
from rewriter.graph import place
from rewriter.model import RewrittenModel, load
from rewriter.recover.graphs import release
from rewriter.recover.session import (
    Run,
    baselines_of,
    budgets_of,
    held_out_of,
    main_process,
    remember,
    stages_of,
    start,
    work_folder,
)
from rewriter.recover.stages import Lora, Transfer
from rewriter.recover.training import run_stage, training_arguments


def recover(
    model: RewrittenModel | str | Path,
    original: PreTrainedModel | str | Path | None = None,
    stages: list[Any] | None = None,
    data: Any = None,
    *,
    tokens: int | None = None,
    minutes: float | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    work: str | Path | None = None,
    resume: bool = False,
    held_out: int | None = None,
    evaluations: int = 5,
    with_baselines: bool = True,
    precision: str = "auto",
    report_to: str | list[str] = "none",
    checkpoint_minutes: float | None = 2.0,
    checkpoint_steps: int | None = None,
    arguments: dict[str, Any] | None = None,
) -> RewrittenModel:
    """Train a rewritten model against its original; nothing but the new mixers changes.

    Args:
        model: the rewritten model or its folder; on success its tensors are replaced.
        original: the model it was made from; by default what the lock names.
        stages: names, dictionaries or `Fit`, `Transfer`, `Distil`, `Lora`; by default the
            plan's `recover`, else transfer and distil.
        data: training text, as for `training_text`; by default the plan's.
        tokens, minutes: budget of all stages together, split by their `share`.
        work: folder for checkpoints; with `resume`, a stage goes on where it was.
        held_out: tokens set aside for evaluation (default: a hundredth of the budget).
        evaluations: how often a stage measures perplexity on them.
        precision: bfloat16 for linears: `auto` (where the processor has it), `half`, `full`.
        report_to, arguments: passed to transformers' TrainingArguments.

    Returns the model with `config.recovery == "recovered"` and `report["recovery"]`.
    Raises RewriterError: no data, no budget, another original, or a training that diverges.
    """
    clock = time.monotonic()
    made = model if isinstance(model, RewrittenModel) else load(model)
    if made.config.autocast is not None:
        raise RewriterError(
            f"the matrices were made {made.config.autocast} after the capture",
            "recover the float32 model (`precision` computes in bfloat16), then narrow it",
        )
    chosen = stages_of(made, stages)
    if data is None and made.plan is not None:
        data = made.plan.data
    if data is None:
        raise RewriterError("recovery needs text", "give `data`: a file, a folder or a data set")
    budgets = budgets_of(chosen, tokens, minutes)
    settings = {
        "stages": [s.model_dump(mode="json") for s in chosen],
        "tokens": tokens,
        "minutes": minutes,
        "seed": seed,
    }
    options = {
        "evaluations": evaluations,
        "report_to": report_to,
        "checkpoint_minutes": checkpoint_minutes,
        "checkpoint_steps": checkpoint_steps,
        "arguments": arguments or {},
    }
    device = training_arguments(
        Path(work or "."), Transfer(), seed, options
    ).device  # joins torchrun
    own = work_folder(work)
    if main_process():
        remember(own, settings, resume)
    run = start(made, original, data, tokenizer, seed, own, precision, device, options,
                 held_out or held_out_of(budgets), chosen)  # fmt: skip
    report: dict[str, Any] = {
        "data": run.text.source,
        "held_out_tokens": run.text.held_out.numel(),
        "seed": seed,
        "precision": "bfloat16 linears" if run.frozen.half else "float32",
        "perplexity": {},
        "stages": [],
    }
    folds = any(isinstance(s, Lora) for s in chosen)
    released = run.frozen.half and not folds and not isinstance(model, RewrittenModel)
    if released:
        release([run.student, run.teacher, made.graph.module], set(run.tensors))
    before = run.errors()
    report["perplexity"]["start"] = run.perplexity()
    if with_baselines:
        report["baselines"] = baselines_of(run, made, report["perplexity"])
    for index, (stage, budget) in enumerate(zip(chosen, budgets, strict=True), 1):
        folder = own / f"{index}-{stage.stage}"
        report["stages"].append(run_stage(run, stage, budget, folder, resume))
    after = run.errors()
    report["perplexity"]["end"] = run.perplexity()
    report["layers"] = [
        {"site": r.site, "before": b, "after": a}
        for r, b, a in zip(run.regions, before, after, strict=True)
    ]
    report["tokens"] = sum(s["tokens"] for s in report["stages"])
    report["seconds"] = time.monotonic() - clock
    if released:  # the frozen tensors come from the file again, as they were
        run.student = run.teacher = GraphModule(nn.Module(), FxGraph())
        made = load(model)  # type: ignore[arg-type]
    _finish(made, run, report, settings)
    if work is None:
        shutil.rmtree(own, ignore_errors=True)
    return made


def _finish(
    model: RewrittenModel, run: Run, report: dict[str, Any], settings: dict[str, Any]
) -> None:
    from rewriter.rewrite import tensor_hash

    hashes = dict(model.lock.get("tensors", {}))
    for name, value in (run.tensors | run.folded).items():
        old = model.graph.tensor(name)
        new = value.detach().to(old.device, old.dtype)
        place(model.graph.module, name, nn.Parameter(new.clone()))
        hashes[name] = tensor_hash(new)
    model.config.recovery = "recovered"
    unhelpful = [
        f"{stage['stage']} made the model worse on held-out text, so its weights are left as they "
        "were before it: give it more tokens, or a lower learning_rate"
        for stage in report["stages"]
        if stage.get("kept") == "start"
    ]
    model.report = {
        **model.report,
        "status": "recovered",
        "warnings": [*dict.fromkeys([*model.report.get("warnings", []), *unhelpful])],
        "recovery": report,
        "whole": {
            "perplexity_before": report["perplexity"].get("original"),
            "perplexity_after": report["perplexity"]["end"],
        },
    }
    about = {k: report[k] for k in ("data", "tokens", "seconds", "precision", "perplexity")}
    model.lock = {**model.lock, "tensors": hashes, "recovery": settings | about}
