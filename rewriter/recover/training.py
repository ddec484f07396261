"""One stage of a recovery, run or read from what it left."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.fx import GraphModule
from transformers import TrainingArguments

from rewriter.recover.data import Pattern
from rewriter.recover.fit import fit_regions
from rewriter.recover.lora import add_lora, fold
from rewriter.recover.modules import DistilStage, Stage, TransferStage
from rewriter.recover.session import Run, main_process
from rewriter.recover.stages import RATES, Fit, Lora, Transfer
from rewriter.recover.trainer import Budget, StageTrainer, checkpoints


def run_stage(run: Run, stage: Any, budget: Budget, folder: Path, resume: bool) -> dict[str, Any]:
    """Run one stage, or read what it made when it has ended before."""
    result, record = folder / "done.safetensors", folder / "done.json"
    if resume and record.exists():
        run.set(load_file(result, device=str(run.frozen.device)))
        return json.loads(record.read_text())
    clock = time.monotonic()
    if isinstance(stage, Fit):
        windows = run.text.sample(stage.tokens, stage.length, run.seed)
        new, facts = fit_regions(
            run.student, run.teacher, run.regions, run.tensors, run.frozen, windows, stage
        )
        made: dict[str, Any] = {"tokens": windows.numel(), "sites": facts}
    else:
        new, made = _train(run, stage, budget, folder, resume)
    run.set(new)
    made |= {"stage": stage.stage, "seconds": time.monotonic() - clock}
    if main_process():
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.detach().cpu().contiguous() for n, t in new.items()}, result)
        (folder / "done.part").write_text(json.dumps(made))
        (folder / "done.part").rename(record)
        for old in checkpoints(folder):
            shutil.rmtree(old, ignore_errors=True)
    return made


def _train(
    run: Run, stage: Any, budget: Budget, folder: Path, resume: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    student, trained = run.student, run.tensors
    pairs: dict[str, tuple[str, str]] = {}
    torch.manual_seed(run.seed)
    if isinstance(stage, Lora):
        student, trained, pairs = add_lora(student, stage, run.seed)
        trained = {n: t.to(run.frozen.device) for n, t in trained.items()}
    regions = run.regions_for(stage.target)
    parts = (student, run.teacher, regions, trained, run.frozen)
    module: Stage = TransferStage(*parts) if isinstance(stage, Transfer) else DistilStage(
        stage, *parts
    )  # fmt: skip
    pattern = Pattern(stage.length, stage.rows, stage.long, stage.long_share)
    seconds = run.options["checkpoint_minutes"]
    trainer = StageTrainer(
        module,
        training_arguments(folder, stage, run.seed, run.options),
        run.text.items(pattern, run.seed),
        pattern,
        budget,
        _rates(stage, module.names, run),
        stage,
        held_out=run.text.held_out,
        evaluations=run.options["evaluations"],
        label=stage.stage,
        checkpoint_seconds=seconds * 60 if seconds else None,
    )
    last = checkpoints(folder)[-1:] if resume else []
    trainer.train(resume_from_checkpoint=str(last[0]) if last else None)
    whole = not isinstance(stage, Transfer)  # which has another measure: every layer's error
    new, kept = _better(trainer, trained if whole else None)
    progress = trainer.progress
    if isinstance(stage, Lora):
        weights = {n: run.tensors.get(n) for n in pairs}
        current = {n: _tensor_of(run.student, n) if w is None else w for n, w in weights.items()}
        new = {n: fold(current[n], new[a], new[b], stage) for n, (a, b) in pairs.items()}
    return new, {
        "tokens": progress.tokens,
        "training_seconds": progress.seconds,
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "curve": progress.curve,
        "evaluations": progress.evaluations,
        "kept": kept,
    }


def _tensor_of(module: GraphModule, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def _better(
    trainer: StageTrainer, start: dict[str, Tensor] | None
) -> tuple[dict[str, Tensor], str]:
    """The weights as they are, their average, or those before the stage (`start`): whichever
    does best on held-out text. The weights as they are where there is nothing else."""
    last, seen = trainer.result(), trainer.progress.evaluations
    began = bool(start) and bool(seen) and seen[0]["tokens"] == 0
    if not trainer.average and not began:
        return last, "last"
    found = {"last": trainer.perplexity()}
    if trainer.average:
        parameters = trainer.stage.tensors()
        with torch.no_grad():
            for name, average in trainer.average.items():
                parameters[name].copy_(average)
        found["average"] = trainer.perplexity()
    if began:
        found["start"] = seen[0]["perplexity"]
    finite = {k: v for k, v in found.items() if v == v}
    best = min(finite, key=finite.__getitem__)
    seen.append({"tokens": trainer.progress.tokens, "perplexity": found[best]})
    if start and best == "start":
        return {n: start[n].detach().clone() for n in last}, "start"
    if best == "average":
        return {n: t.clone() for n, t in trainer.average.items()}, "average"
    return last, "last"


def training_arguments(
    folder: Path, stage: Any, seed: int, options: dict[str, Any]
) -> TrainingArguments:
    from rewriter.recover.data import ENDLESS

    steps = options["checkpoint_steps"]
    given = {
        "output_dir": str(folder),
        "max_steps": ENDLESS,
        "per_device_train_batch_size": 1,  # an item is a batch already
        "gradient_accumulation_steps": stage.accumulate,
        "max_grad_norm": stage.clip,
        "save_strategy": "steps",
        "save_steps": steps or ENDLESS,
        "save_total_limit": 2,
        "logging_steps": 10,
        "report_to": options["report_to"],
        "seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "logging_nan_inf_filter": False,
        "ddp_find_unused_parameters": False,
        "log_level": "error",
    }
    return TrainingArguments(**(given | options["arguments"]))


def _rates(stage: Any, names: list[str], run: Run) -> dict[str, float]:
    """Learning rate of every trained tensor."""
    from rewriter.protocol import passes

    known = passes()
    owner = {n: r.made_by for r in run.regions for n in r.tensors}
    theirs = {str(n.target) for n in run.teacher.graph.nodes if n.op == "get_attr"}
    made = {}
    for name in names:
        by = known[owner[name]].learning_rates if name in owner else {}
        rates = RATES[stage.stage] | by.get(stage.stage, {}) | stage.learning_rate
        made[name] = rates[_group(name, theirs)]
    return made


def _group(name: str, original: set[str]) -> str:
    """new, copied or gate: how far a tensor is from what it should become."""
    if re.search(r"\.gate$|\.\w*gate\.bias$", name):  # one number a head
        return "gate"
    copied = name in original or re.search(r"proj\.(weight|bias)$", name) or ".low_rank." in name
    return "copied" if copied else "new"
