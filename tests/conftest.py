"""Shared models and assets."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ASSETS = Path(os.environ.get("REWRITER_ASSETS", Path.home() / ".cache/rewriter/assets"))


@pytest.fixture(scope="session")
def tiny_llama() -> LlamaForCausalLM:
    """Three layers, GQA; large weights, so that a semantic slip shows in the logits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        initializer_range=0.2,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte: 256 of them, and `<s>` before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<s>"])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", pad_token="<s>")


@pytest.fixture(scope="session")
def byte_llama() -> Callable[[int], LlamaForCausalLM]:
    """Of a seed, a model of two layers that reads the tokenizer's bytes."""

    def made(seed: int) -> LlamaForCausalLM:
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

    return made


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a folder; `python tools/assets.py smollm2` makes it."""
    return ASSETS / "smollm2"
