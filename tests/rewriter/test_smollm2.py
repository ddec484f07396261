"""The real model: what the empty plan and each pass do to SmolLM2-135M."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rewriter
from rewriter.state import State
from rewriter.state_size import state_bytes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def original(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    found = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    found.pad_token = found.pad_token or found.eos_token
    return found


@pytest.fixture(scope="module")
def prompts(tokenizer):
    questions = [
        "What is gravity?",
        "Name three colours, and explain in one sentence why the sky has its own.",
        "Hi!",
    ]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True
        )
        for q in questions
    ]
    return tokenizer(texts, return_tensors="pt", padding=True)


@pytest.fixture(scope="module")
def text(smollm2, tokenizer):
    book = (smollm2.parent / "austen" / "pride_and_prejudice.txt").read_text()
    third = len(book) // 3
    return tokenizer(book[third : third + 20000], return_tensors="pt")["input_ids"]


@pytest.fixture(scope="module")
def unchanged(original):
    return rewriter.rewrite(original, {"steps": []})


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "max_new_tokens": 64},
        {"num_beams": 4, "do_sample": False, "max_new_tokens": 32},
        {"do_sample": True, "temperature": 0.8, "max_new_tokens": 64},
    ],
    ids=["greedy", "beam", "sample"],
)
def test_empty_plan_is_token_identical(original, unchanged, prompts, options):
    made = []
    for model in (unchanged, original):
        torch.manual_seed(1)
        made.append(model.generate(**prompts, **options))
    assert torch.equal(*made)


def test_empty_plan_keeps_perplexity(original, unchanged, text):
    ids = text[:, :2048]
    with torch.no_grad():
        found = [
            torch.nn.functional.cross_entropy(m(input_ids=ids).logits[0, :-1], ids[0, 1:]).exp()
            for m in (original, unchanged)
        ]
    assert f"{found[0]:.4g}" == f"{found[1]:.4g}"


def test_window_decodes_what_one_prefill_gives(smollm2, text):
    """256 + 4 in all layers, 1,000 tokens; resident bytes are the formula's and stop growing."""
    plan = {
        "steps": [{"pass": "sliding_window", "window": 256, "sinks": 4}],
        "gate": {"sequences": 2, "length": 384},
    }
    model = rewriter.rewrite(smollm2, plan)
    ids, state = text[:, :1000], State(model.graph.states)
    parts, sizes = [], []
    with torch.no_grad():
        whole = model(input_ids=ids).logits[0]
        for start, end in [(0, 600), *((i, i + 1) for i in range(600, 1000))]:
            made = model(
                input_ids=ids[:, start:end],
                attention_mask=torch.ones(1, end, dtype=torch.long),
                past_key_values=state,
                use_cache=True,
            )
            parts.append(made.logits[0])
            held = [t for m in state.mixers for t in m.tensors().values()]
            sizes.append(sum(t.untyped_storage().nbytes() for t in held))
    got = torch.cat(parts)
    assert float((got - whole).abs().max() / whole.abs().max()) <= 1e-4
    # 30 layers, 260 slots: key and value of 3 heads of 64 in fp32, column and flag
    formula = 30 * 260 * (2 * 3 * 64 * 4 + 9)
    assert set(sizes) == {formula}
    assert state_bytes(model.report["state"]["after"], 1000) == formula
