"""Real encoders, a vision model and an encoder-decoder through the empty plan."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, WhisperForConditionalGeneration

import rewriter

pytestmark = pytest.mark.slow


def compare(original, inputs, lifted, keep=None):
    """Attention nodes, output class, and every tensor of the output."""
    model = rewriter.rewrite(original.eval(), {"steps": []})
    assert len(model.graph.attention) == lifted
    with torch.no_grad():
        truth, got = original(**inputs), model(**inputs)
    assert type(got) is type(truth)
    for name in model.graph.outputs:
        a, b = got[name], truth[name]
        if keep is not None and a.shape[:2] == keep.shape:
            a, b = a[keep], b[keep]
        assert (a - b).abs().max() <= 1e-5 * b.abs().max(), name


def test_minilm(smollm2):
    model = AutoModel.from_pretrained(smollm2.parent / "minilm")
    ids = torch.tensor([[101, 2023, 2003, 1037, 3231, 102], [101, 7592, 102, 0, 0, 0]])
    mask = (ids != 0).long()
    compare(model, {"input_ids": ids, "attention_mask": mask}, 6, mask.bool())


def test_albert_shares_one_layer(smollm2):
    model = AutoModelForMaskedLM.from_pretrained(smollm2.parent / "rxnmapper")
    ids = torch.tensor([[12, 20, 31, 20, 40, 13], [12, 33, 20, 13, 0, 0]])
    mask = (ids != 0).long()
    compare(model, {"input_ids": ids, "attention_mask": mask}, 12, mask.bool())


def test_dinov2(smollm2):
    model = AutoModel.from_pretrained(smollm2.parent / "dinov2")
    size = model.config.image_size
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    compare(model, {"pixel_values": pixels}, 12)


def test_whisper(smollm2):
    model = WhisperForConditionalGeneration.from_pretrained(
        smollm2.parent / "whisper", dtype=torch.float32
    )
    mel = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[50258, 50259, 50359, 50363, 1057, 13]])
    compare(model, {"input_features": mel, "decoder_input_ids": ids}, 18)
