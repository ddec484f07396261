"""Two tiny models that read bytes, and tokens to go with them."""

from __future__ import annotations

import pytest
import torch

import rewriter


@pytest.fixture(scope="session")
def original(byte_llama):
    return byte_llama(0)


@pytest.fixture(scope="session")
def other(byte_llama):
    return byte_llama(1)


@pytest.fixture(scope="session")
def rewritten(original):
    return rewriter.rewrite(original, {"steps": []})


@pytest.fixture(scope="session")
def tokens():
    return torch.randint(0, 256, (3, 700), generator=torch.Generator().manual_seed(0))
