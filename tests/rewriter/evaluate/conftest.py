"""A tiny model that reads bytes, and tokens to go with it."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rewriter


def tiny(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=257,
        initializer_range=0.2,
        max_position_embeddings=4096,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def original():
    return tiny()


@pytest.fixture(scope="session")
def other():
    return tiny(1)


@pytest.fixture(scope="session")
def rewritten(original):
    return rewriter.rewrite(original, {"steps": []})


@pytest.fixture(scope="session")
def tokens():
    return torch.randint(0, 256, (3, 700), generator=torch.Generator().manual_seed(0))
