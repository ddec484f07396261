"""What a task is: a value with a name, a maker of examples and a score."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from rewriter.calibration import SAMPLE
from rewriter.evaluate.prompts import score


@dataclass(frozen=True)
class Source:
    """What examples are made from; the same source makes the same examples."""

    tokenizer: Any
    text: str
    seed: int = 0

    def generator(self, *key: Any) -> random.Random:
        """Random numbers that depend on the seed and the key alone."""
        return random.Random(" ".join(map(str, (*key, self.seed))))


@dataclass(frozen=True)
class Task:
    """One task. `make(source, length, count)` returns `count` examples of at most `length`
    tokens; `score(model, examples, done)` returns their `Score`."""

    name: str
    about: str
    make: Callable[[Source, int, int], list[Any]]
    score: Callable[..., Any] = score


def each(
    one: Callable[[Source, int, random.Random], Any], name: str
) -> Callable[[Source, int, int], list[Any]]:
    """`make` from a function of one example; the first n of many examples are those of n."""

    def make(source: Source, length: int, count: int) -> list[Any]:
        return [
            one(source, length, source.generator(name, length, index)) for index in range(count)
        ]

    return make


@cache
def words() -> tuple[str, ...]:
    """Common lower-case words of four to eight letters, from the text that ships with rewriter."""
    counts = Counter(re.findall(r"\b[a-z]{4,8}\b", SAMPLE.read_text(encoding="utf-8")))
    return tuple(sorted(word for word, count in counts.items() if count >= 3))


@cache
def sentences(text: str) -> tuple[str, ...]:
    """The sentences of a text from a third in, in order, without line breaks."""
    parts = re.split(
        r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<=[.!?])\s+",
        re.sub(r"\s+", " ", text[len(text) // 3 :]),
    )
    return tuple(part for part in parts[1:-1] if 20 <= len(part) <= 400)
