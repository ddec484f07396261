"""State tests: multi-query associative recall (Zoology, Arora et al. 2023) and copying
(Jelassi et al. 2024), on words instead of symbols so that pretrained models take part."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from rewriter.evaluate.prompts import Example, encode, fit
from rewriter.evaluate.task import Source, Task, each, words


def mqar(source: Source, length: int, generator: random.Random, power: float = 0.01) -> Example:
    """length / 16 pairs `key value`; then, among other words, every key once more with its value.

    The gaps before the second appearances follow a power law with exponent `power - 1`. Where
    words take many tokens there are fewer pairs, so that other words are half of the prompt.
    """
    pool = generator.sample(words(), len(words()))
    seed = generator.getrandbits(32)

    def make(pairs: int, count: int) -> Example:
        local = random.Random(seed)
        keys, values, others = pool[:pairs], pool[pairs : 2 * pairs], pool[2 * pairs :]
        order = local.sample(range(pairs), pairs)
        slots: list[int | None] = [None] * (pairs + count)
        free = list(range(len(slots)))
        for pair in order:
            weights = [(slot + 1) ** (power - 1) for slot in free]
            slot = local.choices(free, weights)[0]
            free.remove(slot)
            slots[slot] = pair
        parts: list[Any] = [" ".join(f"{k} {v}" for k, v in zip(keys, values, strict=True))]
        for filled in slots:
            if filled is None:
                parts.append(f" {local.choice(others)}")
            else:
                parts += [f" {keys[filled]} ", (values[filled],)]
        return encode(source.tokenizer, parts)

    pairs = max(2, min(length // 16, len(pool) // 3))
    while pairs > 2 and len(make(pairs, 0).tokens) > length // 2:
        pairs -= max(1, pairs // 8)
    return fit(partial(make, pairs), length)


def copy(source: Source, length: int, generator: random.Random) -> Example:
    """Random words, a line break, and the same words again; all but the first are asked for."""
    pool = generator.sample(words(), len(words()))

    def make(count: int) -> Example:
        chosen = pool[: count + 2]
        parts: list[Any] = [" ".join(chosen) + "\n" + chosen[0]]
        for word in chosen[1:]:
            parts += [" ", (word,)]
        return encode(source.tokenizer, parts)

    return fit(make, length, most=len(pool) - 2)


RECALL = [
    Task("mqar", "values of many keys", each(mqar, "mqar")),
    Task("copy", "random words once more", each(copy, "copy")),
]
