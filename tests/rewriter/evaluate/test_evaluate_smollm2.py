"""The real model on the held-out book: the figures of the project's notes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewriter.evaluate import held_out_texts, passkey, perplexity, windows
from rewriter.evaluate.text import SKIP

pytestmark = pytest.mark.slow


def test_perplexity_and_passkey(smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    book = held_out_texts()["pride_and_prejudice"]
    tokens = windows(tokenizer, book, 2048, 1, skip=SKIP)
    assert perplexity(model, tokens) == pytest.approx(27.54, abs=0.005)
    assert passkey(model, tokenizer, 430, prompts=3) == 1
    assert passkey(model, tokenizer, 1918, prompts=1) == 1
