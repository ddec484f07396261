"""A tiny model that reads bytes, and texts to go with it."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rewriter


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte: 256 of them, and `<s>` before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<s>"])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    from tokenizers.processors import TemplateProcessing

    made.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", pad_token="<s>")


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
