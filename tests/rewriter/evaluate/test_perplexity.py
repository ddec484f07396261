"""Losses, divergence and blocks against the same computed directly from whole logits."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import Gemma2Config, Gemma2ForCausalLM

import rewriter
from rewriter.errors import RewriterError
from rewriter.evaluate import compare, excess_by_block, perplexity, read, token_nll
from rewriter.evaluate.readout import _whole


def whole(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


def direct(model, tokens):
    logits = whole(model, tokens)[:, :-1]
    return cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


@pytest.fixture(scope="module")
def soft_capped():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=8)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, vocab_size=256)
    config = Gemma2Config(**sizes, **heads, initializer_range=0.5, pad_token_id=0)
    config.final_logit_softcapping = 2.0
    return Gemma2ForCausalLM(config).eval()


def test_perplexity_is_cross_entropy(original, rewritten, tokens):
    want = math.exp(direct(original, tokens).double().mean())
    for model in (original, rewritten):
        assert perplexity(model, tokens) == pytest.approx(want, rel=1e-6)
        assert perplexity(model, tokens, batch=2) == pytest.approx(want, rel=1e-6)
    assert perplexity(original, tokens[0]) == pytest.approx(
        math.exp(direct(original, tokens[:1]).double().mean()), rel=1e-6
    )


def test_the_head_runs_in_slices(original, rewritten, tokens):
    for model in (original, rewritten):
        found = read(model, tokens)
        assert found.hidden.shape == (3, 700, 32)
        logits = torch.cat([part for _, part in found.slices(size=64)], 1)
        assert torch.allclose(logits, whole(original, tokens), atol=1e-5)
        picked = torch.tensor([5, 698])
        assert torch.allclose(found.logits(picked), whole(original, tokens)[:, picked], atol=1e-5)


def test_what_follows_the_head_counts(soft_capped, tokens):
    """A soft cap: in the graph it is part of the head; elsewhere the model runs whole."""
    want = direct(soft_capped, tokens)
    assert torch.allclose(token_nll(soft_capped, tokens), want, atol=1e-5)
    assert soft_capped in _whole
    made = rewriter.rewrite(soft_capped, {"steps": []})
    assert read(made, tokens).hidden.shape == (3, 700, 32)
    assert torch.allclose(token_nll(made, tokens), want, atol=1e-5)


def test_any_module_with_logits(original, tokens):
    class Wrapper(torch.nn.Module):
        def forward(self, input_ids):
            return original(input_ids=input_ids)

    assert torch.allclose(token_nll(Wrapper(), tokens), direct(original, tokens), atol=1e-5)


def test_divergence_from_itself_is_zero(original, rewritten, tokens):
    for model in (original, rewritten):
        found = compare(model, original, tokens)
        assert found.kl.abs().max() < 1e-5 and found.excess.abs().max() < 1e-5
        assert found.same.float().mean() > 0.999


def test_divergence_is_direct(original, other, tokens):
    found = compare(other, original, tokens)
    theirs = whole(original, tokens)[:, :-1].log_softmax(-1)
    ours = whole(other, tokens)[:, :-1].log_softmax(-1)
    want = kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(found.kl, want, atol=1e-4)
    assert torch.equal(found.same, theirs.argmax(-1) == ours.argmax(-1))
    assert torch.allclose(found.original, direct(original, tokens), atol=1e-5)
    assert torch.allclose(found.model, direct(other, tokens), atol=1e-5)
    assert found.kl.mean() > 0.1


def test_excess_by_block_is_direct(original, other, tokens):
    found = excess_by_block(other, original, tokens, block=256)
    excess = direct(other, tokens) - direct(original, tokens)
    # column t is token t + 1: the first block lacks the first token
    want = [excess[:, a:b].mean() for a, b in ((0, 255), (255, 511), (511, 699))]
    assert found == pytest.approx([float(w) for w in want], abs=1e-5)
    assert excess_by_block(original, original, tokens) == [0.0]


def test_training_mode_comes_back(original, tokens):
    original.train()
    try:
        perplexity(original, tokens[:1, :8])
        assert original.training
    finally:
        original.eval()


@pytest.mark.parametrize("shape", [(0, 4), (2, 1), (1, 2, 3)])
def test_bad_tokens(original, shape):
    with pytest.raises(RewriterError, match="windows"):
        perplexity(original, torch.zeros(shape, dtype=torch.long))
