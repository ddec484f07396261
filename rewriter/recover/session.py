"""What one recovery works with: models, text, budgets and folder, before it trains anything."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from rewriter.errors import PlanError, RewriterError
from rewriter.graph import place
from rewriter.model import RewrittenModel
from rewriter.recover import baselines
from rewriter.recover.data import Text, training_text
from rewriter.recover.fit import fit_regions
from rewriter.recover.graphs import Frozen, extract, stateless
from rewriter.recover.modules import input_values, inputs_of, region_error
from rewriter.recover.regions import Region, find_regions
from rewriter.recover.stages import DEFAULT, Fit, named
from rewriter.recover.teacher import teacher_graph
from rewriter.recover.trainer import Budget

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


def stages_of(model: RewrittenModel, stages: list[Any] | None) -> list[Any]:
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


def budgets_of(stages: list[Any], tokens: int | None, minutes: float | None) -> list[Budget]:
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


def held_out_of(budgets: list[Budget]) -> int:
    """A hundredth of the training: evaluating takes a tenth of the time at most."""
    tokens = sum(b.tokens or int(200 * (b.seconds or 0)) for b in budgets)
    return min(max(tokens // 100, EVALUATED[0]), EVALUATED[1])


def work_folder(work: str | Path | None) -> Path:
    """The same folder on every process; a temporary one if none is given."""
    made = work if work is not None else ""
    if work is None and main_process():
        made = tempfile.mkdtemp(prefix="rewriter-recover-")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shared = [str(made)]
        torch.distributed.broadcast_object_list(shared, 0)
        made = shared[0]
    return Path(made)


def remember(work: Path, settings: dict[str, Any], resume: bool) -> None:
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


def start(
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


def baselines_of(run: Run, model: RewrittenModel, perplexity: dict[str, float]) -> dict[str, Any]:
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


def main_process() -> bool:
    """Whether this process writes: the only one, or the first."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0
