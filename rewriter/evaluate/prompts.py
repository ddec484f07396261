"""Prompts with known answers, and their score by teacher forcing.

An answer is a hit when the model's most likely token is right at every one of its positions,
given the true tokens before: the same as greedy generation that matches exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.evaluate.readout import read


@dataclass(frozen=True)
class Example:
    """One prompt with its answers: token ids [T], and the positions of each answer's tokens."""

    tokens: Tensor
    answers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Score:
    """Per answer of each example: is it a hit, and the mean loss of its tokens in nats.

    `extra` holds further figures of a task by name.
    """

    hits: list[list[bool]]
    losses: list[list[float]]
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """Fraction of all answers that are hits."""
        return _mean([float(hit) for row in self.hits for hit in row])

    @property
    def nll(self) -> float:
        """Mean loss of an answer's tokens, over all answers, in nats."""
        return _mean([loss for row in self.losses for loss in row])

    def kept(self, original: Score) -> float | None:
        """Of the original's hits, the fraction that are hits here too; None if it has none."""
        pairs = zip(original.hits, self.hits, strict=True)
        both = [
            float(ours)
            for theirs_row, row in pairs
            for theirs, ours in zip(theirs_row, row, strict=True)
            if theirs
        ]
        return _mean(both) if both else None


@torch.no_grad()
def score(model: nn.Module, examples: list[Example], done: Callable[[int], object] = bool) -> Score:
    """Teacher-forced hits and losses; `done` is told the tokens of each example as it ends."""
    hits, losses = [], []
    for example in examples:
        positions = torch.tensor([p for answer in example.answers for p in answer])
        logits = read(model, example.tokens[None]).logits(positions - 1)[0].cpu()
        targets = example.tokens[positions]
        right = logits.argmax(-1) == targets
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        sizes = [len(answer) for answer in example.answers]
        hits.append([bool(part.all()) for part in right.split(sizes)])
        losses.append([float(part.mean()) for part in loss.split(sizes)])
        done(len(example.tokens))
    return Score(hits, losses)


def encode(tokenizer: Any, parts: list[str | tuple[str]]) -> Example:
    """Tokens of a text whose answers are marked: `["key: ", ("123",), ".\\n"]`.

    The text is tokenised as a whole; a token belongs to an answer when it holds one of its
    characters (with a tokenizer that gives no offsets, also the space before them). Special
    tokens that the tokenizer puts before a text are kept.
    """
    text, spans = "", []
    for part in parts:
        if isinstance(part, tuple):
            spans.append((len(text), len(text) + len(part[0])))
            text += part[0]
        else:
            text += part
    # What the tokenizer adds after a text (an end-of-sequence token) is no part of a prompt.
    before = prefix(tokenizer)
    if getattr(tokenizer, "is_fast", False):
        made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = made["input_ids"], made["offset_mapping"]
        answers = tuple(
            tuple(i + len(before) for i, (a, b) in enumerate(offsets) if a < end and b > start)
            for start, end in spans
        )
    else:
        encoded = lambda part: tokenizer(part, add_special_tokens=False)["input_ids"]  # noqa: E731
        ids = encoded(text)
        at = lambda end: len(before) + _common(encoded(text[:end].rstrip()), ids)  # noqa: E731
        answers = tuple(tuple(range(at(start), at(end))) for start, end in spans)
    if not all(answers) or any(answer[0] == 0 for answer in answers):
        raise RewriterError("an answer has no tokens of its own", "use another tokenizer")
    return Example(torch.tensor([*before, *ids]), answers)


def prefix(tokenizer: Any) -> list[int]:
    """Special tokens that the tokenizer puts before every text: `<s>`, or none."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def fit(make: Callable[[int], Example], length: int, most: int = 1 << 20) -> Example:
    """`make(n)` for the largest n (at least 0) whose prompt has no more than `length` tokens.

    Raises RewriterError: already `make(0)` is longer.
    """
    low, best = 0, make(0)
    if len(best.tokens) > length:
        raise RewriterError(
            f"the prompt has {len(best.tokens)} tokens without any filler, over {length}",
            "ask for a greater length",
        )
    # Prompts grow about evenly, so that the second guess is nearly right.
    high = 1
    while high < most and len((found := make(high)).tokens) <= length:
        low, best, high = high, found, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        found = make(middle)
        if len(found.tokens) <= length:
            low, best = middle, found
        else:
            high = middle
    return best


def _common(one: list[int], other: list[int]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
