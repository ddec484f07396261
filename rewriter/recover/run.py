"""`recover(model, original, stages, data)`: the stages of a recovery, one after the other."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule
from transformers import PreTrainedModel, TrainingArguments

from rewriter.errors import PlanError, RewriterError
from rewriter.graph import place
from rewriter.model import RewrittenModel, load
from rewriter.recover import baselines
from rewriter.recover.data import Pattern, Text, training_text
from rewriter.recover.fit import fit_regions
from rewriter.recover.graphs import Frozen, Region, extract, find_regions, release, stateless
from rewriter.recover.lora import add_lora, fold
from rewriter.recover.modules import (
    DistilStage,
    Stage,
    TransferStage,
    input_values,
    inputs_of,
    region_error,
)
from rewriter.recover.stages import DEFAULT, RATES, Fit, Lora, Transfer, named
from rewriter.recover.teacher import teacher_graph
from rewriter.recover.trainer import Budget, StageTrainer, checkpoints

#: Time of a token, relative to transfer, where only minutes are given.
COST = {"transfer": 1.0, "distil": 3.0, "lora": 3.0}
EVALUATED = (512, 16384)  # held-out tokens: at least, at most


@dataclass
class Run:
    """What all stages of one recovery share.

    tensors: the student's trained tensors by name, as they now are.
    """

    student: GraphModule
    teacher: GraphModule
    sites: list[dict[str, Any]]
    regions: list[Region]
    tensors: dict[str, Tensor]
    frozen: Frozen
    text: Text
    seed: int
    work: Path
    options: dict[str, Any] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)

    def regions_for(self, target: str) -> list[Region]:
        if target == "mixer_out":
            return self.regions
        return find_regions(self.student, self.teacher, self.sites, whole_layer=True)

    def set(self, tensors: dict[str, Tensor]) -> None:
        for name, value in tensors.items():
            if name in self.tensors:
                self.tensors[name] = value
            else:
                self.folded[name] = value
            place(self.student, name, nn.Parameter(value, requires_grad=False))

    @torch.no_grad()
    def errors(self) -> list[float]:
        """Relative error |Δ| / |original| of every region on held-out text."""
        inside = set(inputs_of(self.teacher))
        taps = tuple(dict.fromkeys(n for r in self.regions for n in (*r.inputs, r.target)))
        taps = tuple(t for t in taps if t not in inside)
        source = extract(self.teacher, inputs_of(self.teacher), taps, (), self.frozen)
        pieces = [
            extract(self.student, r.inputs, [r.output], self.tensors, self.frozen)
            for r in self.regions
        ]
        sums = torch.zeros(len(pieces), dtype=torch.float64)
        rows = self.text.held_out[:4]
        for row in rows:
            values: dict[str, Any] = input_values(self.teacher, row[None].to(self.frozen.device))
            values |= dict(zip(taps, source(values, {}), strict=True))
            for i, (region, piece) in enumerate(zip(self.regions, pieces, strict=True)):
                sums[i] += float(region_error(region, piece, values, self.tensors, None))
        return (sums / len(rows)).sqrt().tolist()

    def perplexity(self) -> float:
        return baselines.perplexity(self.student, self.frozen, self.text.held_out, self.tensors)


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
    chosen = _stages(made, stages)
    if data is None and made.plan is not None:
        data = made.plan.data
    if data is None:
        raise RewriterError("recovery needs text", "give `data`: a file, a folder or a data set")
    budgets = _budgets(chosen, tokens, minutes)
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
    device = _arguments(Path(work or "."), Transfer(), seed, options).device  # joins torchrun
    own = _work_folder(work)
    if main_process():
        _remember(own, settings, resume)
    run = _start(made, original, data, tokenizer, seed, own, precision, device, options,
                 held_out or _held_out(budgets), chosen)  # fmt: skip
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
        report["baselines"] = _baselines(run, made, report["perplexity"])
    for index, (stage, budget) in enumerate(zip(chosen, budgets, strict=True), 1):
        folder = own / f"{index}-{stage.stage}"
        report["stages"].append(_run_stage(run, stage, budget, folder, resume))
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


# ---- before -----------------------------------------------------------------------------------


def _stages(model: RewrittenModel, stages: list[Any] | None) -> list[Any]:
    if stages is None:
        planned = list(model.plan.recover) if model.plan is not None else []
        return planned or list(DEFAULT)
    from rewriter.plan import Plan

    made = []
    for stage in stages:
        if isinstance(stage, str):
            made.append(named(stage))
        elif isinstance(stage, dict):
            made += Plan.model_validate({"recover": [stage]}).recover
        else:
            made.append(stage)
    if not made:
        raise PlanError("there is no stage to run", "leave `stages` out for the usual ones")
    return made


def _budgets(stages: list[Any], tokens: int | None, minutes: float | None) -> list[Budget]:
    """One budget a stage: its own, or its share of the run's."""
    open_ = [s for s in stages if not isinstance(s, Fit) and s.tokens is None and s.minutes is None]
    if open_ and tokens is None and minutes is None:
        raise PlanError(
            f"stage '{open_[0].stage}' has no end", "give --tokens or --minutes, or one in the plan"
        )
    taken = sum(s.tokens or 0 for s in stages if not isinstance(s, Fit))
    spent = sum(s.minutes or 0 for s in stages if not isinstance(s, Fit))
    by_tokens = sum(s.share for s in open_)
    by_time = sum(s.share * COST[s.stage] for s in open_)
    made = []
    for s in stages:
        if isinstance(s, Fit):
            made.append(Budget())
        elif s not in open_:
            made.append(Budget(s.tokens, s.minutes * 60 if s.minutes else None))
        else:
            n = None if tokens is None else max(1, int((tokens - taken) * s.share / by_tokens))
            left = None if minutes is None else max(0.01, minutes - spent) * 60
            seconds = None if left is None else left * s.share * COST[s.stage] / by_time
            made.append(Budget(n, seconds))
    return made


def _held_out(budgets: list[Budget]) -> int:
    """A hundredth of the training: evaluating takes a tenth of the time at most."""
    tokens = sum(b.tokens or int(200 * (b.seconds or 0)) for b in budgets)
    return min(max(tokens // 100, EVALUATED[0]), EVALUATED[1])


def _work_folder(work: str | Path | None) -> Path:
    """The same folder on every process; a temporary one if none is given."""
    made = work if work is not None else ""
    if work is None and main_process():
        made = tempfile.mkdtemp(prefix="rewriter-recover-")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shared = [str(made)]
        torch.distributed.broadcast_object_list(shared, 0)
        made = shared[0]
    return Path(made)


def _remember(work: Path, settings: dict[str, Any], resume: bool) -> None:
    """The settings of a run lie beside its checkpoints: another run must not go on with them."""
    path = work / "run.json"
    if path.exists():
        if not resume:
            raise RewriterError(
                f"{work} holds a run that has not ended",
                "go on with --resume, or remove the folder",
            )
        before = json.loads(path.read_text())
        wrong = [k for k in settings if before.get(k) != settings[k]]
        if wrong:
            raise RewriterError(
                f"{work} holds a run with another {wrong[0]}: {before.get(wrong[0])!s:.100}",
                "resume with the same settings, or remove the folder",
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))


def _start(
    model: RewrittenModel,
    original: Any,
    data: Any,
    tokenizer: Any,
    seed: int,
    work: Path,
    precision: str,
    device: torch.device,
    options: dict[str, Any],
    held_out: int,
    stages: list[Any],
) -> Run:
    from rewriter.rewrite import _tokenizer

    source = model.lock.get("original", {}).get("source", "")
    original = original if original is not None else source
    if not model.lock.get("sites"):
        raise RewriterError("nothing was rewritten in this model", "recover a rewritten one")
    teacher = stateless(teacher_graph(original, model))
    student = stateless(model.graph)
    regions = find_regions(student, teacher, model.lock["sites"])
    trained = {n: t for r in regions for n in r.tensors if _trains(t := model.graph.tensor(n))}
    if not trained:
        raise RewriterError("the rewritten sites have no parameters to train")
    first = model.companions[0].parent if model.companions else None
    for place_ in (original if isinstance(original, (str, Path)) else None, source, first):
        if tokenizer is None and place_:
            tokenizer = _tokenizer(str(place_))
    length = min(1024, max((s.length for s in stages), default=1024), held_out)
    text = training_text(data, tokenizer, held_out, length)
    half = half_precision(precision, device, next(iter(trained.values())).dtype)
    frozen = Frozen(device, half)
    # Copies: a view would keep the whole file that the model was loaded from.
    tensors = {n: t.detach().to(device, copy=True) for n, t in trained.items()}
    return Run(
        student, teacher, model.lock["sites"], regions, tensors, frozen, text, seed, work, options
    )


def _trains(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.is_floating_point()


def half_precision(precision: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether linears run in bfloat16: as asked, or where the processor computes in it."""
    if precision == "full" or dtype != torch.float32:
        return False
    if precision == "half":
        return True
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, n, lambda: False)() for n in known)


def _baselines(run: Run, model: RewrittenModel, perplexity: dict[str, float]) -> dict[str, Any]:
    """Perplexity on held-out text of what needs no training; the original goes to `perplexity`."""
    held, frozen, teacher = run.text.held_out, run.frozen, run.teacher
    perplexity["original"] = baselines.perplexity(teacher, frozen, held)
    text = run.text.sample(8192, held.shape[1], run.seed)
    window = baselines.windowed(teacher, run.regions)
    found: dict[str, Any] = {
        "deleted": baselines.perplexity(baselines.deleted(teacher, run.regions), frozen, held),
        "mean": baselines.perplexity(
            baselines.mean_output(teacher, run.regions, frozen, text[:4]), frozen, held
        ),
        "window": baselines.perplexity(window, frozen, held) if window is not None else None,
    }
    if all("relative_error" in s.get("facts", {}) for s in model.lock["sites"]):
        found["closed_form"] = perplexity["start"]  # the pass has fitted already
    else:
        new, _ = fit_regions(
            run.student, teacher, run.regions, run.tensors, frozen, text, Fit(tokens=8192)
        )
        found["closed_form"] = baselines.perplexity(run.student, frozen, held, run.tensors | new)
    return found


# ---- a stage ----------------------------------------------------------------------------------


def _run_stage(run: Run, stage: Any, budget: Budget, folder: Path, resume: bool) -> dict[str, Any]:
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
        _arguments(folder, stage, run.seed, run.options),
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
    new, kept = _better(trainer)
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


def _better(trainer: StageTrainer) -> tuple[dict[str, Tensor], str]:
    """The weights as they are or their average, whichever does better on held-out text."""
    last = trainer.result()
    if not trainer.average:
        return last, "last"
    value = trainer.perplexity()
    parameters = trainer.stage.tensors()
    with torch.no_grad():
        for name, average in trainer.average.items():
            parameters[name].copy_(average)
    averaged = trainer.perplexity()
    point = {"tokens": trainer.progress.tokens, "perplexity": min(value, averaged)}
    trainer.progress.evaluations.append(point)
    if averaged <= value:
        return {n: t.clone() for n, t in trainer.average.items()}, "average"
    return last, "last"


def _arguments(folder: Path, stage: Any, seed: int, options: dict[str, Any]) -> TrainingArguments:
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


def main_process() -> bool:
    """Whether this process writes: the only one, or the first."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


# ---- after ------------------------------------------------------------------------------------


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
    model.report = {
        **model.report,
        "status": "recovered",
        "recovery": report,
        "whole": {
            "perplexity_before": report["perplexity"].get("original"),
            "perplexity_after": report["perplexity"]["end"],
        },
    }
    kept = {k: report[k] for k in ("data", "tokens", "seconds", "precision", "perplexity")}
    model.lock = {**model.lock, "tensors": hashes, "recovery": settings | kept}
