"""Suites: which texts and tasks, how long and how many; and the run of one.

A new task is an entry in a table of its family, and a line in a suite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.evaluate.choice import CHOICE
from rewriter.evaluate.generation import agreement, generate
from rewriter.evaluate.passkey import PASSKEY
from rewriter.evaluate.perplexity import Divergence, by_block, compare, mean_exp
from rewriter.evaluate.prompts import Score
from rewriter.evaluate.recall import RECALL
from rewriter.evaluate.ruler import RULER
from rewriter.evaluate.task import Source, Task
from rewriter.evaluate.text import held_out_texts, start_of, windows

TASKS: dict[str, Task] = {task.name: task for task in (*PASSKEY, *RULER, *RECALL, *CHOICE)}


@dataclass(frozen=True)
class Suite:
    """What is run.

    book: (length, windows) on the first text. others: the same on each further text.
    generation: (prompts, new tokens each). tasks: (name, length in tokens, prompts).
    """

    book: tuple[tuple[int, int], ...]
    others: tuple[tuple[int, int], ...]
    generation: tuple[int, int]
    tasks: tuple[tuple[str, int, int], ...]


RECALLED = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery")
COUNTED = ("variable_tracking", "common_words", "frequent_words")

SUITES = {
    "quick": Suite(
        book=((512, 4), (2048, 1)),
        others=((1024, 1),),
        generation=(2, 24),
        tasks=(
            ("passkey", 430, 3),
            ("passkey", 1918, 1),
            *((name, 512, 1) for name in (*RECALLED, *COUNTED)),
            ("mqar", 256, 2),
            ("copy", 256, 2),
            ("cloze", 256, 6),
        ),
    ),
    "full": Suite(
        book=((512, 32), (2048, 8), (8192, 2)),
        others=((2048, 4),),
        generation=(8, 64),
        tasks=(
            ("passkey", 430, 20),
            ("passkey", 1918, 20),
            *((name, 1024, 10) for name in (*RECALLED, *COUNTED)),
            ("niah_multikey", 4096, 4),
            ("mqar", 512, 10),
            ("copy", 512, 10),
            ("cloze", 256, 40),
        ),
    ),
}


@dataclass(frozen=True)
class Row:
    """One measurement of both models on the same tokens.

    Attributes:
        metric: `perplexity` (lower is better), `accuracy` or `agreement` (fractions).
        ratio: rewritten / original, of perplexities; difference: of fractions.
        excess: loss over the original's in nats, per token of text or of the answers; of the
            right choice for multiple choice. Comparable between tasks.
        kept: of the original's hits, the fraction that the rewritten model has too.
        details: what else the task measures.
    """

    task: str
    length: int
    count: int
    metric: str
    original: float
    rewritten: float
    ratio: float | None = None
    difference: float | None = None
    excess: float | None = None
    kept: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """All rows of a run, and what was left out with the reason."""

    suite: str
    seed: int
    texts: dict[str, int]
    rows: list[Row]
    skipped: list[dict[str, Any]]

    def worst(self) -> dict[str, Row]:
        """The row with the greatest excess loss, and the row with the smallest fraction kept."""
        found = {}
        losses = [row for row in self.rows if row.excess is not None]
        if losses:
            found["excess"] = max(losses, key=lambda row: _broken_first(row.excess))
        hits = [row for row in self.rows if row.kept is not None]
        if hits:
            found["kept"] = max(hits, key=lambda row: _broken_first(-(row.kept or 0.0)))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: equal for equal seeds, models and machines."""
        worst = {
            by: {"task": row.task, "length": row.length, by: getattr(row, by)}
            for by, row in self.worst().items()
        }
        return {"version": 1, **asdict(self), "worst": worst}


def evaluate(
    model: nn.Module,
    original: nn.Module,
    tokenizer: Any,
    *,
    suite: str | Suite = "quick",
    data: Any = None,
    seed: int = 0,
    progress: Callable[[str, int, int], object] | None = None,
) -> Evaluation:
    """Measure a model and its original on the same texts and prompts.

    Args:
        model, original: causal language models with one vocabulary, as `read` takes them.
        suite: a name of `SUITES`, or one's own.
        data: text in place of the held-out texts: a path, or texts.
        seed: of all prompts.
        progress: called with (what, tokens done, tokens in all).

    Raises RewriterError: an unknown suite, unreadable or too little text, different vocabularies.
    """
    name = suite if isinstance(suite, str) else "own"
    if isinstance(suite, str):
        if suite not in SUITES:
            raise RewriterError(f"there is no suite '{suite}'", f"one of {', '.join(SUITES)}")
        suite = SUITES[suite]
    texts = held_out_texts(data)
    source = Source(tokenizer, next(iter(texts.values())), seed)
    skipped: list[dict[str, Any]] = []
    steps = []
    for step in _steps(suite, texts):
        why = step.impossible(model, original)
        if why:
            skipped.append({"task": step.task, "length": step.length, "why": why})
        else:
            steps.append(step)
    total, told = sum(step.tokens for step in steps), 0
    rows = []
    for step in steps:
        base, spent = told, 0

        def done(tokens: int, step: _Step = step, base: int = base) -> None:
            nonlocal spent
            spent = min(step.tokens, spent + tokens)
            if progress:
                progress(f"{step.task} {step.length}", base + spent, total)

        done(0)
        rows.append(step.run(model, original, source, texts, done))
        told += step.tokens
    if progress:
        progress("done", total, total)
    return Evaluation(name, seed, {n: len(t) for n, t in texts.items()}, rows, skipped)


@dataclass(frozen=True)
class _Step:
    task: str
    length: int
    count: int
    kind: str
    new: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that both models read, for the progress; one decoded is as slow as 20 read."""
        return 2 * self.count * (self.length + 20 * self.new)

    def impossible(self, *models: nn.Module) -> str:
        """Why these models cannot take part; '' if they can."""
        length = self.length + self.new
        for model in models:
            limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
            if limit and length > limit:
                return f"the model takes {limit:,} tokens"
            if self.kind == "generation" and not hasattr(model, "generate"):
                return "the model does not generate"
        return ""

    def run(
        self,
        model: nn.Module,
        original: nn.Module,
        source: Source,
        texts: dict[str, str],
        done: Callable[[int], object],
    ) -> Row:
        if self.kind == "task":
            task = TASKS[self.task]
            examples = task.make(source, self.length, self.count)
            return task_row(
                self, task.score(original, examples, done), task.score(model, examples, done)
            )
        text = next(iter(texts)) if self.kind == "generation" else self.task
        tokens = windows(
            source.tokenizer, texts[text], self.length, self.count, skip=start_of(text)
        )
        if self.kind == "generation":
            return generation_row(self, model, original, tokens, done)
        parts = []
        for window in tokens:
            parts.append(compare(model, original, window))
            done(2 * self.length)
        columns = zip(*((p.original, p.model, p.kl, p.same) for p in parts), strict=True)
        return text_row(self, Divergence(*(torch.cat(c) for c in columns)))


def _steps(suite: Suite, texts: dict[str, str]) -> Iterator[_Step]:
    for index, text in enumerate(texts):
        for length, count in suite.others if index else suite.book:
            yield _Step(text, length, count, "text")
    prompts, new = suite.generation
    yield _Step("generation", 128, prompts, "generation", new)
    for name, length, count in suite.tasks:
        yield _Step(name, length, count, "task")


def text_row(step: _Step, found: Divergence) -> Row:
    """Perplexity, KL and agreement on windows; losses by position, in 1,024s and finer."""
    original, rewritten = mean_exp(found.original), mean_exp(found.model)
    fine = max(64, step.length // 16)
    details: dict[str, Any] = {
        "kl": float(found.kl.double().mean()),
        "top1": float(found.same.double().mean()),
        "curve": {
            "block": fine,
            "original": by_block(found.original, fine),
            "rewritten": by_block(found.model, fine),
        },
    }
    if step.length > 1024:
        details["excess_by_1024"] = by_block(found.excess, 1024)
    return Row(
        step.task,
        step.length,
        len(found.kl),
        "perplexity",
        original,
        rewritten,
        ratio=rewritten / original,
        excess=float(found.excess.double().mean()),
        details=details,
    )


def task_row(step: _Step, theirs: Score, ours: Score) -> Row:
    """Accuracy, loss of the answers, and what the task measures besides."""
    details: dict[str, Any] = {
        "nll": {"original": theirs.nll, "rewritten": ours.nll},
        "answers": sum(map(len, theirs.hits)),
    }
    for key, value in theirs.extra.items():
        details[key] = {"original": value, "rewritten": ours.extra[key]}
    return Row(
        step.task,
        step.length,
        step.count,
        "accuracy",
        theirs.accuracy,
        ours.accuracy,
        difference=ours.accuracy - theirs.accuracy,
        excess=ours.nll - theirs.nll,
        kept=ours.kept(theirs),
        details=details,
    )


def generation_row(
    step: _Step,
    model: nn.Module,
    original: nn.Module,
    tokens: Tensor,
    done: Callable[[int], object],
) -> Row:
    """Fraction of greedily generated tokens before the first that differs from the original's."""
    agreed = []
    for prompt in tokens:
        theirs = generate(original, prompt, step.new)
        agreed.append(agreement(theirs, generate(model, prompt, step.new)))
        done(2 * (step.length + 20 * step.new))
    fraction = sum(agreed) / (len(agreed) * step.new)
    details = {"new_tokens": step.new, "agreed": agreed}
    return Row(
        step.task,
        step.length,
        len(agreed),
        "agreement",
        1.0,
        fraction,
        difference=fraction - 1.0,
        details=details,
    )


def _broken_first(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value
