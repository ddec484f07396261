"""Real encoders, a vision model and an encoder-decoder through the empty plan, on real input."""

from __future__ import annotations

import re

import numpy
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

import rewriter

pytestmark = pytest.mark.slow

#: An esterification and an amide coupling, reactants >> product (written for this test).
REACTIONS = ["CC(=O)O.OCC>>CC(=O)OCC", "Nc1ccccc1.CC(=O)Cl>>CC(=O)Nc1ccccc1"]
SMILES = (
    r"\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%\d\d|\d"
)


def compare(original, inputs, lifted, keep=None):
    """Attention nodes, output class, and every tensor of the output; returns the rewritten one."""
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
    return model


def austen(assets, count):
    """Paragraphs of *Emma*, none of them short."""
    text = (assets / "austen" / "emma.txt").read_text().split("\n\n")
    return [p for p in text if 200 < len(p) < 600][:count]


def test_minilm(smollm2):
    folder = smollm2.parent / "minilm"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [*austen(smollm2.parent, 3), "She was first."]
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    assert inputs["attention_mask"].sum(1).unique().numel() > 1
    compare(AutoModel.from_pretrained(folder), inputs, 6, inputs["attention_mask"].bool())


def test_albert_shares_one_layer(smollm2):
    folder = smollm2.parent / "rxnmapper"
    vocabulary = (folder / "vocab.txt").read_text().split()
    rows = [["[CLS]", *re.findall(SMILES, r), "[SEP]"] for r in REACTIONS]
    assert all("".join(row[1:-1]) == r for row, r in zip(rows, REACTIONS, strict=True))
    rows[0][3] = "[MASK]"
    ids = torch.zeros(2, max(map(len, rows)), dtype=torch.long)
    for target, row in zip(ids, rows, strict=True):
        target[: len(row)] = torch.tensor([vocabulary.index(t) for t in row])
    mask = torch.tensor([[i < len(row) for i in range(ids.shape[1])] for row in rows])
    original = AutoModelForMaskedLM.from_pretrained(folder)
    model = compare(original, {"input_ids": ids, "attention_mask": mask.long()}, 12, mask)
    guess = model(input_ids=ids, attention_mask=mask.long()).logits[0, 3].argmax()
    assert vocabulary[guess] == "("  # chemistry that it has learnt


def test_dinov2(smollm2):
    model = AutoModel.from_pretrained(smollm2.parent / "dinov2")
    size = model.config.image_size
    pixels = []
    for name in ("chelsea", "astronaut"):
        image = Image.open(smollm2.parent / "images" / f"{name}.png").convert("RGB")
        side = min(image.size)
        square = image.crop((0, 0, side, side)).resize((size, size))
        pixels.append(torch.tensor(numpy.array(square)).permute(2, 0, 1) / 255)
    mean, spread = (
        torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    compare(model, {"pixel_values": (torch.stack(pixels) - mean) / spread}, 12)


@pytest.fixture(scope="module")
def whisper(smollm2):
    folder = smollm2.parent / "whisper"
    original = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    clips = [numpy.load(smollm2.parent / f"speech/{n}.npy") for n in ("front_center", "rear_left")]
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    features = extractor(clips, sampling_rate=16_000, return_tensors="pt").input_features
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ids = [50258, 50259, 50359, 50363]  # start, English, transcribe, no timestamps
    inputs = {
        "input_features": features,
        "decoder_input_ids": torch.tensor([[*ids, *tokenizer.encode(" Front center.")]] * 2),
    }
    return original, compare(original, inputs, 18), features, tokenizer


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"return_timestamps": True}], ids=["greedy", "beam", "time"]
)
def test_whisper_transcribes_the_same(whisper, options):
    original, model, features, tokenizer = whisper
    ours, truth = (m.generate(features, language="en", **options) for m in (model, original))
    assert torch.equal(ours, truth)
    words = [
        re.findall("[a-z]+", t.lower())
        for t in tokenizer.batch_decode(ours, skip_special_tokens=True)
    ]
    assert words == [["front", "center"], ["rear", "left"]]


def test_whisper_encodes_once(whisper):
    """Cross-attention keys and values stay as they were while tokens are added."""
    _, model, features, _ = whisper
    ids = torch.tensor([[50258, 50259]] * 2)
    with torch.no_grad():
        state = model(
            input_features=features, decoder_input_ids=ids, use_cache=True
        ).past_key_values
        kept = list(state.memory)
        model(decoder_input_ids=ids[:, :1], past_key_values=state)
    assert all(a is b for a, b in zip(state.memory, kept, strict=True))
    fixed = model.report["state"]["after"]["fixed"]
    assert fixed == 6 * 2 * 1500 * 512 * 4  # layers, key and value, positions, width, fp32
    assert 2 * fixed == sum(t.nbytes for t in kept)
