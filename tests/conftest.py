"""Shared models and assets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a folder; `python tools/assets.py smollm2` makes it."""
    return ASSETS / "smollm2"
