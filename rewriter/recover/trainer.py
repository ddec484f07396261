"""transformers' Trainer for one stage: budget, curve, guard, average, atomic checkpoints."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import SequentialSampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

from rewriter.errors import RewriterError
from rewriter.recover.data import ENDLESS, Pattern
from rewriter.recover.modules import Stage

STATE, AVERAGE = "recovery.json", "average.safetensors"
DIVERGED = 5.0  # times the best smoothed loss
SETTLED = 20  # steps before a loss counts as the best so far


class Diverged(RewriterError):
    """The training stopped making sense; the last good state is kept."""

    exit_code = 5


@dataclass
class Budget:
    """When a stage ends: tokens or seconds, whichever comes first."""

    tokens: int | None = None
    seconds: float | None = None

    def used(self, tokens: int, seconds: float) -> float:
        shares = [0.0]
        if self.tokens:
            shares.append(tokens / self.tokens)
        if self.seconds:
            shares.append(seconds / self.seconds)
        return max(shares)


@dataclass
class Progress:
    """What a stage has done so far; saved with every checkpoint.

    curve: [tokens, loss] of every step. evaluations: {tokens, perplexity} on held-out text.
    """

    tokens: int = 0
    seconds: float = 0.0
    curve: list[list[float]] = field(default_factory=list)
    errors: list[list[float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    smooth: float | None = None
    best: float | None = None


class StageTrainer(Trainer):
    """Trains a `Stage` on items `{"input_ids": [rows, length]}`.

    rates: learning rate of every parameter by name. pattern: sizes of the items, from which
    tokens are counted alike on every process.
    """

    def __init__(
        self,
        stage: Stage,
        arguments: TrainingArguments,
        items: Any,
        pattern: Pattern,
        budget: Budget,
        rates: dict[str, float],
        options: Any,
        held_out: Tensor | None = None,
        evaluations: int = 5,
        label: str = "",
        checkpoint_seconds: float | None = None,
    ) -> None:
        self.pattern, self.budget, self.rates, self.options = pattern, budget, rates, options
        self.progress = Progress()
        self.held_out, self.evaluations, self.label = held_out, evaluations, label
        self.checkpoint_seconds = checkpoint_seconds
        self.average: dict[str, Tensor] = {}
        self._aside: str | None = None
        self._last: dict[str, Tensor] = {}
        super().__init__(
            model=stage,
            args=arguments,
            train_dataset=items,
            data_collator=lambda rows: rows[0],
        )
        self.stage: Stage = stage
        self.callback_handler.callbacks = [
            c for c in self.callback_handler.callbacks if type(c).__name__ != "PrinterCallback"
        ]
        self.add_callback(_Watch(self))

    # ---- what Trainer asks for -------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset or self.train_dataset)  # type: ignore[arg-type]  # shuffled already

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW with one group for every learning rate; vectors are not decayed."""
        if self.optimizer is None:
            module: Any = self.model if model is None else model
            groups: dict[tuple[float, float], list[Tensor]] = {}
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad:
                    continue
                rate = self.rates[_plain_name(name)]
                decay = self.options.weight_decay if parameter.dim() > 1 else 0.0
                groups.setdefault((rate, decay), []).append(parameter)
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": p, "lr": rate, "weight_decay": decay}
                    for (rate, decay), p in groups.items()
                ],
                betas=(0.9, 0.95),
                fused=not self.is_fsdp_enabled,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.create_optimizer(),
                lambda step: rate_factor(
                    self.budget.used(self._tokens(step), self.progress.seconds),
                    step,
                    self.options.warmup,
                    self.options.decay,
                ),
            )
        return self.lr_scheduler

    def _tokens(self, step: int) -> int:
        """Tokens that all processes have seen after so many steps."""
        processes = max(1, self.args.world_size)
        return self.pattern.tokens(step * self.args.gradient_accumulation_steps * processes)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        made = model(**inputs)
        self._last = {k: v.detach() for k, v in made.items()}
        return (made["loss"], made) if return_outputs else made["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs["tokens"] = self.progress.tokens
        super().log(logs, start_time)

    # ---- checkpoints -----------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return self._aside or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write beside, then rename: a checkpoint is whole or not there."""
        run, keep = Path(str(self.args.output_dir)), self.args.save_total_limit or 0
        name = f"checkpoint-{self.state.global_step}"
        aside = run / ".part"
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._aside = str(aside)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._aside = None
        if self.args.should_save:
            folder = aside / name
            if self.average:
                save_file({k: v.contiguous() for k, v in self.average.items()}, folder / AVERAGE)
            (folder / STATE).write_text(json.dumps(vars(self.progress)))
            shutil.rmtree(run / name, ignore_errors=True)
            os.replace(folder, run / name)
            shutil.rmtree(aside, ignore_errors=True)
            for old in checkpoints(run)[: -keep or None]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        self.progress = Progress(**json.loads((folder / STATE).read_text()))
        if (folder / AVERAGE).exists():
            self.average = load_file(folder / AVERAGE, device=str(self.args.device))

    # ---- results ---------------------------------------------------------------------------

    def perplexity(self) -> float:
        """On the held-out windows, with the weights as they are; every process takes part."""
        assert self.held_out is not None
        module = self.model_wrapped
        training = module.training
        module.eval()
        total = count = 0.0
        for row in self.held_out:
            nll = module(input_ids=row[None].to(self.args.device), score=True)["nll"]
            total, count = total + float(nll.double().sum()), count + nll.numel()
        module.train(training)
        return math.exp(min(total / count, 700))

    def result(self) -> dict[str, Tensor]:
        """The trained tensors by name, whole, on every process."""
        state = self.accelerator.get_state_dict(self.model_wrapped)
        names = self.stage.names
        if self.args.world_size > 1 and not state:
            state = {n: torch.empty(self.stage.shapes[n]) for n in names}
        found = {n: state[n].detach().to(self.args.device).clone() for n in names}
        if self.args.world_size > 1:
            for n in names:
                torch.distributed.broadcast(found[n], 0)
        return found


class _Watch(TrainerCallback):
    """Counts, times, averages, evaluates and stops a stage; draws the progress bar."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.t = trainer
        self.bar: Any = None
        self.due = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        t = self.t
        self.started = time.monotonic() - t.progress.seconds
        self.saved = self.step_start = time.monotonic()
        self.from_tokens, self.from_seconds = t.progress.tokens, t.progress.seconds
        if t.options.ema and not t.is_fsdp_enabled and not t.average:
            t.average = {n: p.detach().clone() for n, p in t.stage.tensors().items()}
        share = t.budget.used(t.progress.tokens, t.progress.seconds)
        self.due = int(share * t.evaluations) + 1
        self.bar = tqdm(
            total=100,
            initial=round(min(1.0, share) * 100, 1),
            desc=t.label,
            disable=not args.should_log or None,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}",
        )
        if not t.progress.evaluations and t.held_out is not None and t.evaluations:
            self._evaluate()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in self.t.stage.parameters() if p.grad is not None]
        if not all(bool(torch.isfinite(g).all()) for g in gradients):
            self._stop("a gradient is not finite", keep=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        t, p = self.t, self.t.progress
        p.tokens = t._tokens(state.global_step)
        p.seconds = time.monotonic() - self.started
        if t.budget.seconds and args.world_size > 1:
            shared = torch.tensor(p.seconds, device=args.device)
            torch.distributed.broadcast(shared, 0)
            p.seconds = float(shared)
        loss = float(t._last["loss"])
        p.curve.append([p.tokens, loss])
        if "errors" in t._last:
            p.errors = [*p.errors[-19:], t._last["errors"].tolist()]
        self._average()
        self._guard(loss, state)
        used = t.budget.used(p.tokens, p.seconds)
        self._show(used)
        if used >= 1 or state.global_step >= ENDLESS:
            control.should_training_stop = True
        if t.evaluations and t.held_out is not None and used * t.evaluations >= self.due:
            self.due = int(used * t.evaluations) + 1
            self._evaluate()
        every = t.checkpoint_seconds
        if every and args.world_size == 1 and time.monotonic() - self.saved >= every:
            control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def _average(self) -> None:
        decay = self.t.options.ema
        if not self.t.average:
            return
        with torch.no_grad():
            for name, parameter in self.t.stage.tensors().items():
                self.t.average[name].lerp_(parameter, 1 - decay)

    def _guard(self, loss: float, state: Any) -> None:
        p = self.t.progress
        if not math.isfinite(loss):
            self._stop(f"the loss is {loss}", keep=False)
        p.smooth = loss if p.smooth is None else 0.95 * p.smooth + 0.05 * loss
        if state.global_step > SETTLED:
            p.best = p.smooth if p.best is None else min(p.best, p.smooth)
            if p.smooth > DIVERGED * p.best:
                self._stop(f"the loss has grown to {p.smooth:.3g} from {p.best:.3g}", keep=False)

    def _stop(self, why: str, keep: bool) -> None:
        t = self.t
        if self.bar is not None:
            self.bar.close()
        t.stage.zero_grad()
        if keep and all(bool(torch.isfinite(p).all()) for p in t.stage.parameters()):
            t._save_checkpoint(t.model_wrapped, None)
        kept = checkpoints(Path(str(t.args.output_dir)))
        where = f"the last good state is {kept[-1]}" if kept else "no state was saved before"
        raise Diverged(
            f"{t.label}: {why} after {t.progress.tokens:,} tokens; {where}",
            "lower `learning_rate` or `clip`, or look at the text",
        )

    def _evaluate(self) -> None:
        t, clock = self.t, time.monotonic()
        value = t.perplexity()
        t.progress.evaluations.append({"tokens": t.progress.tokens, "perplexity": value})
        self.started += time.monotonic() - clock  # evaluating is not training time

    def _show(self, used: float) -> None:
        p = self.t.progress
        seconds = p.seconds - self.from_seconds
        speed = (p.tokens - self.from_tokens) / max(seconds, 1e-9)
        left = p.seconds * (1 - used) / used if used else 0.0
        text = f"loss {p.smooth:.4g}, {speed:,.0f} tok/s, {_clock(left)} left"
        if p.evaluations:
            text += f", perplexity {p.evaluations[-1]['perplexity']:.2f}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.n = round(min(1.0, used) * 100, 1)
        self.bar.refresh()


def rate_factor(used: float, step: int, warmup: float, decay: float) -> float:
    """Warm up, stay, and fall to a tenth; `used` is the share of the budget."""
    factor = 1.0
    if used < warmup:
        factor = max(used / warmup, 1e-2)
    if decay and used > 1 - decay:
        factor = 1 - 0.9 * min(1.0, (used - 1 + decay) / decay)
    return factor


def checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a stage, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if (p / STATE).exists()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def _plain_name(name: str) -> str:
    return name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
