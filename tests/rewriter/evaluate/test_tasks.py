"""Every task's prompts hold what their definition says, and fixed seeds fix them."""

import random
import re
from collections import Counter

import pytest
import torch

from rewriter.calibration import SAMPLE
from rewriter.errors import RewriterError
from rewriter.evaluate import TASKS, Source, passkey, passkey_examples, score
from rewriter.evaluate.choice import Choice, choose, probabilities
from rewriter.evaluate.prompts import Score, encode
from rewriter.evaluate.ruler import common_words, frequent_words, variable_tracking

LENGTH = 2048  # bytes here


@pytest.fixture(scope="module")
def source(tokenizer):
    return Source(tokenizer, SAMPLE.read_text())


def text(tokenizer, example):
    return tokenizer.decode(example.tokens, skip_special_tokens=True)


def answers(tokenizer, example):
    return [tokenizer.decode(example.tokens[list(a)]) for a in example.answers]


@pytest.mark.parametrize("name", TASKS)
def test_every_task(name, source, original):
    task = TASKS[name]
    made, again = (task.make(source, LENGTH, 3) for _ in range(2))
    assert len(made) == 3
    for one, other in zip(made, again, strict=True):
        assert torch.equal(one.tokens, other.tokens) and len(one.tokens) <= LENGTH
        assert one.tokens[0] == 256  # the tokenizer's <s>
    assert not torch.equal(made[0].tokens, made[1].tokens)
    elsewhere = task.make(Source(source.tokenizer, source.text, seed=1), LENGTH, 1)
    assert not torch.equal(made[0].tokens, elsewhere[0].tokens)
    assert name == "cloze" or len(made[0].tokens) > 0.7 * LENGTH
    found, same = (task.score(original, made) for _ in range(2))
    assert found == same and 0 <= found.accuracy <= 1 and found.nll > 0


def test_needles_are_in_the_text(source, tokenizer):
    for name, needles, asked in (
        ("niah_single", 1, 1),
        ("niah_multikey", 4, 1),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ):
        for example in TASKS[name].make(source, LENGTH, 4):
            prompt = text(tokenizer, example)
            body, question = prompt.split("\nWhat ", 1)
            found = re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", body)
            assert len(found) == needles
            wanted = answers(tokenizer, example)
            assert len(wanted) == asked and len(set(wanted)) == asked
            keys = [k for k in dict(found) if k in question]
            assert set(wanted) == {v for k, v in found if k in keys}
            assert len(keys) == (4 if name == "niah_multiquery" else 1)


def test_variables_form_a_chain(source, tokenizer):
    example = variable_tracking(source, LENGTH, random.Random(0))
    prompt = text(tokenizer, example)
    chain = answers(tokenizer, example)
    first, value = re.search(r"VAR (\w{5}) = (\d{5})\n", prompt).groups()
    assert chain[0] == first and len(chain) == 5 and f"value {value}" in prompt
    for old, new in zip(chain, chain[1:], strict=False):
        assert f"VAR {new} = VAR {old}\n" in prompt
        assert prompt.index(f"VAR {new} = VAR {old}") > prompt.index(f"VAR {old} =")


def test_word_counts(source, tokenizer):
    example = common_words(source, LENGTH, random.Random(0))
    counts = Counter(re.findall(r"\d+\. (\w+)", text(tokenizer, example).split("\nQuestion")[0]))
    wanted = answers(tokenizer, example)
    assert len(wanted) == 10 and all(counts.pop(w) == 6 for w in wanted)
    assert counts and set(counts.values()) == {1}

    example = frequent_words(source, LENGTH, random.Random(0))
    body = text(tokenizer, example).split("coded words. ")[1].split("\nQuestion")[0]
    ranked = [word for word, _ in Counter(body.split()).most_common(4)]
    assert ranked == ["...", *answers(tokenizer, example)]


def test_recall_and_copy(source, tokenizer):
    (example,) = TASKS["mqar"].make(source, 1024, 1)
    words = text(tokenizer, example).split(" ")
    count = len(example.answers)
    pairs = dict(zip(words[0 : 2 * count : 2], words[1 : 2 * count : 2], strict=True))
    assert len(pairs) == count > 10
    ids = example.tokens.tolist()
    for answer in example.answers:
        key = tokenizer.decode(ids[: answer[0]], skip_special_tokens=True).split()[-1]
        assert pairs[key] == tokenizer.decode(ids[answer[0] : answer[-1] + 1])

    (example,) = TASKS["copy"].make(source, 1024, 1)
    first, second = text(tokenizer, example).split("\n")
    assert first == second and answers(tokenizer, example) == second.split(" ")[1:]


def test_passkey_depths_are_even(source, tokenizer):
    examples = passkey_examples(tokenizer, 3000, 5)
    depths = [text(tokenizer, e).index("The pass key is") / len(e.tokens) for e in examples]
    assert [round(5 * d - 0.5) for d in sorted(depths)] == [0, 1, 2, 3, 4]
    for example in examples:
        (key,) = answers(tokenizer, example)
        assert re.fullmatch(r"\d{5}", key) and text(tokenizer, example).count(key) == 3


class Oracle(torch.nn.Module):
    """Puts a fixed text's next token first, with a logit of `confidence`."""

    def __init__(self, tokens, wrong=(), confidence=20.0):
        super().__init__()
        self.tokens, self.wrong, self.confidence = tokens, wrong, confidence

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, 257)
        for t in range(input_ids.shape[1]):
            right = t + 1 < len(self.tokens) and t + 1 not in self.wrong
            logits[0, t, self.tokens[t + 1] if right else 0] = self.confidence
        return type("Output", (), {"logits": logits})()


def test_hits_need_every_position(source, tokenizer):
    (example,) = TASKS["niah_multivalue"].make(source, LENGTH, 1)
    assert score(Oracle(example.tokens), [example]).hits == [[True] * 4]
    second = example.answers[1][3]
    found = score(Oracle(example.tokens, wrong={second}), [example])
    assert found.hits == [[True, False, True, True]] and found.accuracy == 0.75
    assert found.losses[0][1] > 1 and found.losses[0][0] < 1e-3


def test_passkey_is_a_fraction(tokenizer, original):
    assert passkey(original, tokenizer, 1000, prompts=2) == 0.0
    (example,) = passkey_examples(tokenizer, 1000, 1)
    assert passkey(Oracle(example.tokens), tokenizer, 1000, prompts=1) == 1.0


def test_kept_counts_the_originals_hits():
    theirs = Score([[True, False], [True]], [[0.0, 0.0], [0.0]])
    ours = Score([[True, True], [False]], [[0.0, 0.0], [0.0]])
    assert ours.kept(theirs) == 0.5
    assert theirs.kept(Score([[False, False], [False]], [])) is None


def test_answers_are_marked_without_offsets(tokenizer):
    class Slow:
        is_fast = False

        def __call__(self, *args, **kwargs):
            return tokenizer(*args, **kwargs)

    parts = ["The key is ", ("123",), ", and ", ("45",), "."]
    one, other = encode(tokenizer, parts), encode(Slow(), parts)
    assert torch.equal(one.tokens, other.tokens)
    # without offsets the space before an answer counts as its first token
    assert one.answers == tuple(a[1:] for a in other.answers)
    with pytest.raises(RewriterError, match="no tokens of its own"):
        encode(tokenizer, ["a", ("",)])


def test_attentiveness_over_all_tokens_is_one(original):
    everything = tuple(((token,),) for token in range(257))
    example = Choice(torch.arange(20), everything, 3)
    found = choose(original, [example])
    assert found.extra["attentiveness"] == pytest.approx(1, abs=1e-6)


def test_choices_of_many_tokens(original):
    """P of a choice is the product over its tokens, summed over its surface forms."""
    prompt = torch.arange(30)
    example = Choice(prompt, (((1, 2, 3), (4,)), ((5, 6),)), 0)

    def p(form):
        logits = original(input_ids=torch.cat([prompt, torch.tensor(form)])[None]).logits[0]
        steps = logits.double().log_softmax(-1)[len(prompt) - 1 :]
        return float(sum(steps[i, token] for i, token in enumerate(form)).exp())

    with torch.no_grad():
        want = [p((1, 2, 3)) + p((4,)), p((5, 6))]
    assert probabilities(original, example).tolist() == pytest.approx(want, rel=1e-5)
    assert choose(original, [example]).hits == [[want[0] > want[1]]]


def test_certified_margin():
    certain = Oracle([0] * 9 + [7, 0], confidence=20.0)
    example = Choice(torch.zeros(9, dtype=torch.long), (((7,),), ((8,),)), 0)
    found = choose(certain, [example]).extra
    assert found["certified"] == 1 and found["attentiveness"] > 0.99
    unsure = choose(Oracle([0] * 9 + [7, 0], confidence=1.0), [example]).extra
    assert unsure["certified"] == 0 and unsure["attentiveness"] < 0.1


@pytest.mark.parametrize("forms", [(((1,),), ((1, 2),)), (((1,), (2,)), ((2,),))])
def test_overlapping_choices_are_refused(original, forms):
    with pytest.raises(RewriterError, match="overlap"):
        probabilities(original, Choice(torch.arange(4), forms, 0))


def test_too_short_is_told(source):
    with pytest.raises(RewriterError, match="ask for a greater length"):
        TASKS["passkey"].make(source, 50, 1)
