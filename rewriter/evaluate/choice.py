"""Multiple choice, with the probability that goes to any choice at all ("attentiveness").

Wiegreffe et al., EMNLP 2023; specs/compress.md §7.2. A fall of the attentiveness is an early
warning of damage to the format, even where the accuracy holds.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import RewriterError
from rewriter.evaluate.prompts import Score, encode
from rewriter.evaluate.readout import read
from rewriter.evaluate.task import Source, Task, each, sentences

SHOT = (
    "Passage: The night was cold and clear. He walked home along the river.\n"
    "Sentence: Above him shone the ___\n"
    "Choices: bread, winter, stars, letter\n"
    "Answer: stars\n\n"
)


@dataclass(frozen=True)
class Choice:
    """A prompt [T], the token sequences that count as each choice, and the right choice.

    `forms[k]` holds the disjoint surface forms of choice k.
    """

    tokens: Tensor
    forms: tuple[tuple[tuple[int, ...], ...], ...]
    answer: int


def check_disjoint(forms: Sequence[Sequence[Sequence[int]]]) -> None:
    """Raise RewriterError where one form begins with another: their probabilities overlap."""
    flat = sorted(tuple(form) for choice in forms for form in choice)
    for one, other in zip(flat, flat[1:], strict=False):
        if other[: len(one)] == one:
            raise RewriterError(
                f"the choices overlap: tokens {list(other)} begin with {list(one)}",
                "give choices of which none begins another",
            )


@torch.no_grad()
def probabilities(model: nn.Module, example: Choice) -> Tensor:
    """P(choice | prompt) for each choice, [K] in float64: the sum over its surface forms."""
    check_disjoint(example.forms)
    prompt = example.tokens
    first = read(model, prompt[None]).logits(slice(len(prompt) - 1, None))[0, 0].cpu()
    first = first.double().log_softmax(-1)
    totals = []
    for forms in example.forms:
        total = torch.zeros((), dtype=torch.float64)
        for form in forms:
            logp = first[form[0]]
            if len(form) > 1:
                rest = torch.tensor(form[1:])
                text = torch.cat([prompt, torch.tensor(form[:-1])])
                logits = read(model, text[None]).logits(slice(len(prompt), None))[0].cpu()
                logp = logp + logits.double().log_softmax(-1).gather(-1, rest[:, None]).sum()
            total = total + logp.exp()
        totals.append(total)
    return torch.stack(totals)


def choose(model: nn.Module, examples: list[Choice], done: Callable[[int], object] = bool) -> Score:
    """Accuracy and loss of the right choice, and in `extra`:

    attentiveness: mean over prompts of the sum of all choices' probabilities.
    certified: fraction of prompts whose margin between the two likeliest choices is greater than
        1 - attentiveness; other wordings of the choices could not change these predictions.
    """
    hits, losses, attention, certified = [], [], [], []
    for example in examples:
        found = probabilities(model, example)
        mass = float(found.sum())
        best = found.topk(2).values if len(found) > 1 else torch.cat([found, found * 0])
        hits.append([int(found.argmax()) == example.answer])
        losses.append([-float(found[example.answer].clamp_min(1e-300).log())])
        attention.append(mass)
        certified.append(float(best[0] - best[1]) > 1 - mass)
        done(len(example.tokens))
    count = max(1, len(examples))
    extra = {"attentiveness": sum(attention) / count, "certified": sum(certified) / count}
    return Score(hits, losses, extra)


def cloze(source: Source, length: int, generator: random.Random) -> Choice:
    """Which of four words of a passage ends its next sentence; one example comes before."""
    text = sentences(source.text)
    for _ in range(1000):
        at = generator.randrange(len(text))
        found = re.fullmatch(r"(.* )([a-z]{4,})[.!?]", text[at])
        if not found:
            continue
        passage = ""
        for before in reversed(text[max(0, at - 8) : at]):
            longer = f"{before} {passage}"
            if len(longer) > 2 * length:  # about half of the tokens
                break
            passage = longer
        others = sorted(set(re.findall(r"\b[a-z]{4,}\b", passage)) - {found[2]})
        if len(others) < 3:
            continue
        choices = [found[2], *generator.sample(others, 3)]
        generator.shuffle(choices)
        made = prompt(source.tokenizer, passage.strip(), found[1], choices, found[2])
        if len(made.tokens) <= length and _disjoint(made.forms):
            return made
    raise RewriterError(
        f"the text has no passages for multiple choice in {length} tokens", "give more prose"
    )


def prompt(tokenizer: Any, passage: str, sentence: str, choices: list[str], right: str) -> Choice:
    """The prompt of one question, and the tokens of ` choice` after it."""
    text = (
        f"{SHOT}Passage: {passage}\nSentence: {sentence}___\nChoices: {', '.join(choices)}\nAnswer:"
    )
    encoded = [encode(tokenizer, [text, (f" {choice}",)]) for choice in choices]
    start = encoded[0].answers[0][0]
    forms = tuple((tuple(e.tokens[e.answers[0][0] :].tolist()),) for e in encoded)
    return Choice(encoded[0].tokens[:start], forms, choices.index(right))


def _disjoint(forms: Sequence[Sequence[Sequence[int]]]) -> bool:
    try:
        check_disjoint(forms)
    except RewriterError:
        return False
    return True


CHOICE = [Task("cloze", "which of four words ends a sentence", each(cloze, "cloze"), choose)]
