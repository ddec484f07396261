"""RULER's generated tasks (Hsieh et al. 2024): needles, variable tracking, common and frequent
words, with its templates and its counts.

Differences, the same for every model: the essay haystack is the held-out text instead of Paul
Graham's essays; no one-shot example; answers are scored by teacher forcing in a fixed order
(of appearance, or of frequency) instead of by matching strings in generated text.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from rewriter.evaluate.passkey import FILLER
from rewriter.evaluate.prompts import Example, encode, fit
from rewriter.evaluate.task import Source, Task, each, sentences, words

NEEDLE = "One of the special magic numbers for {key} is: {value}."
ASK = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n"
)
VARIABLES = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
)
COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three "
    "most frequently appeared coded words. "
)


def scatter(
    haystack: tuple[str, ...], needles: list[str], seed: int, count: int, separator: str
) -> str:
    """`count` lines of the haystack (repeated if need be) from a random place on, needles among
    them in their order; where they lie, as a fraction, does not depend on `count`."""
    generator = random.Random(seed)
    start = generator.randrange(len(haystack))
    lines = [haystack[(start + i) % len(haystack)] for i in range(count)]
    depths = sorted(generator.random() for _ in needles)
    for depth, needle in reversed(list(zip(depths, needles, strict=True))):
        lines.insert(round(depth * count), needle)
    return separator.join(lines)


def listing(answers: list[str], joint: str = ", ", last: str = ", and ") -> list[Any]:
    """Answers as marked parts: `a, b, and c`."""
    parts: list[Any] = [(answers[0],)]
    for index, answer in enumerate(answers[1:], 2):
        parts += [last if index == len(answers) else joint, (answer,)]
    return parts


def needle(
    source: Source, length: int, generator: random.Random, *, keys: int, values: int, asked: int
) -> Example:
    """`keys` needles with `values` numbers each, in held-out text; `asked` keys are asked for."""
    names = ["-".join(generator.sample(words(), 2)) for _ in range(keys)]
    numbers = {name: _numbers(generator, values) for name in names}
    wanted = names[:asked]
    needles = [NEEDLE.format(key=n, value=v) for n in names for v in numbers[n]]
    generator.shuffle(needles)
    answers = [v for n in wanted for v in numbers[n]]
    if asked == 1:  # several values of one key come in the order of the text
        answers.sort(key=lambda v: next(i for i, line in enumerate(needles) if v in line))
    query = wanted[0] if asked == 1 else ", ".join(wanted[:-1]) + f", and {wanted[-1]}"
    many = len(answers) > 1
    what = "are all the special magic numbers" if many else "is the special magic number"
    lead = "numbers" if many else "number"
    seed = generator.getrandbits(32)

    def make(count: int) -> Example:
        body = scatter(sentences(source.text), needles, seed, count, " ")
        question = (
            f"\nWhat {what} for {query} mentioned in the provided text? The special magic {lead} "
            f"for {query} mentioned in the provided text {'are' if many else 'is'} "
        )
        return encode(source.tokenizer, [ASK + body + question, *listing(answers)])

    return fit(make, length)


def variable_tracking(
    source: Source, length: int, generator: random.Random, hops: int = 4
) -> Example:
    """One chain `VAR B = VAR A` of `hops` hops in noise: all variables with the first's value."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names = ["".join(generator.choices(letters, k=5)) for _ in range(hops + 1)]
    value = str(generator.randint(10000, 99999))
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {new} = VAR {old}" for old, new in zip(names, names[1:], strict=False)]
    seed = generator.getrandbits(32)

    def make(count: int) -> Example:
        body = scatter((FILLER,), lines, seed, count, "\n")
        question = (
            f"\nQuestion: Find all variables that are assigned the value {value} in the text "
            "above. Answer: According to the chain(s) of variable assignment in the text above, "
            f"{hops + 1} variables are assigned the value {value}, they are: "
        )
        return encode(source.tokenizer, [VARIABLES + body + question, *listing(names, " ", " ")])

    return fit(make, length)


def common_words(source: Source, length: int, generator: random.Random) -> Example:
    """A numbered list in which ten words come 30 times and the others 3 times (6 and 1 in prompts
    of less than 4,096 tokens, as in RULER; fewer common words where ten do not fit)."""
    often, seldom = (30, 3) if length >= 4096 else (6, 1)
    pool = generator.sample(words(), len(words()))
    seed = generator.getrandbits(32)

    def make(common: int, count: int) -> Example:
        asked, others = pool[:common], pool[common : common + count]
        entries = asked * often + others * seldom
        random.Random(seed).shuffle(entries)
        answers = list(dict.fromkeys(word for word in entries if word in set(asked)))
        body = " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))
        question = (
            f"\nQuestion: What are the {common} most common words in the above list? Answer: The "
            f"top {common} words that appear most often in the list are: "
        )
        numbered = [part for i, a in enumerate(answers, 1) for part in (f"{i}. ", (a,), " ")]
        return encode(source.tokenizer, [COMMON + body + question, *numbered[:-1]])

    common = 10
    while common > 1 and len(make(common, common).tokens) > length:
        common -= 1
    return fit(partial(make, common), length, most=len(pool) - common)


def frequent_words(
    source: Source, length: int, generator: random.Random, alpha: float = 2.0
) -> Example:
    """Coded words with zeta(2) frequencies; the most frequent is noise `...`, the next three are
    asked for."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    coded = ["...", *("".join(generator.choices(letters, k=6)) for _ in range(49))]
    weights = [(rank + 1) ** -alpha for rank in range(len(coded))]
    seed = generator.getrandbits(32)

    def make(count: int) -> Example:
        # Counts rather than draws, so that the three are the most frequent at every length.
        total = sum(weights)
        counts = [round(count * weight / total) for weight in weights]
        entries = [word for word, n in zip(coded, counts, strict=True) for _ in range(n)]
        random.Random(seed).shuffle(entries)
        question = (
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are "
            "the three most frequently appeared words in the above coded text? Answer: According "
            "to the coded text above, the three most frequently appeared words are: "
        )
        text = FREQUENT + " ".join(entries) + question
        return encode(source.tokenizer, [text, *listing(coded[1:4])])

    return fit(make, length)


def _numbers(generator: random.Random, count: int) -> list[str]:
    return [str(generator.randint(1_000_000, 9_999_999)) for _ in range(count)]


def _needles(name: str, about: str, keys: int, values: int, asked: int) -> Task:
    one = partial(needle, keys=keys, values=values, asked=asked)
    return Task(name, about, each(one, name))


RULER = [
    _needles("niah_single", "one number in a text", keys=1, values=1, asked=1),
    _needles("niah_multikey", "one number of four", keys=4, values=1, asked=1),
    _needles("niah_multivalue", "four numbers of one key", keys=1, values=4, asked=1),
    _needles("niah_multiquery", "four numbers of four keys", keys=4, values=1, asked=4),
    Task("variable_tracking", "a chain of assignments", each(variable_tracking, "vt")),
    Task("common_words", "the most common words of a list", each(common_words, "cwe")),
    Task("frequent_words", "the most frequent coded words", each(frequent_words, "fwe")),
]
