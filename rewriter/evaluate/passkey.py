"""Passkey retrieval: a five-digit key in meaningless filler (Mohtashami and Jaggi 2023)."""

from __future__ import annotations

import random
from typing import Any

from torch import nn

from rewriter.evaluate.prompts import Example, encode, fit, score
from rewriter.evaluate.task import Task

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def passkey_examples(tokenizer: Any, length: int, prompts: int, seed: int = 0) -> list[Example]:
    """Prompts of at most `length` tokens; the key lies at evenly spread depths, in random order.

    The answer is the key's five digits after "The pass key is".
    """
    generator = random.Random(f"passkey {length} {seed}")
    depths = [(i + 0.5) / prompts for i in range(prompts)]
    generator.shuffle(depths)
    made = []
    for depth in depths:
        key = str(generator.randint(10000, 99999))

        def prompt(fillers: int, key: str = key, depth: float = depth) -> Example:
            before = round(depth * fillers)
            lines = [FILLER] * fillers
            lines.insert(before, f"The pass key is {key}. Remember it. {key} is the pass key.")
            text = TASK + "\n".join(lines) + "\nWhat is the pass key? The pass key is "
            return encode(tokenizer, [text, (key,)])

        made.append(fit(prompt, length))
    return made


def passkey(
    model: nn.Module, tokenizer: Any, length: int, prompts: int = 20, seed: int = 0
) -> float:
    """Fraction of `prompts` keys that the model finds in prompts of at most `length` tokens."""
    return score(model, passkey_examples(tokenizer, length, prompts, seed)).accuracy


PASSKEY = [
    Task(
        "passkey",
        "a five-digit key in filler",
        lambda source, length, count: passkey_examples(
            source.tokenizer, length, count, source.seed
        ),
    )
]
