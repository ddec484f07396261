"""Encoders and encoder-decoders through the same export, and the runtimes that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import rewriter
from rewriter.errors import GateError, RewriterError

pytest.importorskip("onnxruntime")

from rewriter.backends.onnx.ops import attention  # noqa: E402
from rewriter.backends.onnx.registry import StateTensor  # noqa: E402
from rewriter.runtime import OnnxEncoder, OnnxModel, OnnxSeq2Seq  # noqa: E402

SMALL = {"d_model": 16, "decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}


def louder(model: Any) -> Any:
    """Weights large enough that a wrong mask shows."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(5)
    return model.eval()


@pytest.fixture(scope="module")
def whisper() -> rewriter.RewrittenModel:
    torch.manual_seed(0)
    config = WhisperConfig(
        **SMALL,
        vocab_size=99,
        bos_token_id=1,
        num_mel_bins=8,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=20,
        max_target_positions=128,
    )
    return rewriter.rewrite(louder(WhisperForConditionalGeneration(config)), {"steps": []})


@pytest.fixture(scope="module")
def folder(whisper: rewriter.RewrittenModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("whisper") / "out"
    rewriter.export(whisper, made, attention="standard", logits="last")
    return made


def test_an_encoder_runs_without_torch(tmp_path: Path) -> None:
    """Text padded on the right; the reference evaluator is of the same opinion."""
    from onnx.reference import ReferenceEvaluator

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    model = rewriter.rewrite(louder(BertModel(config)), {"steps": []})
    report = rewriter.export(model, tmp_path / "out", attention="standard")
    assert report["max_error"] < 1e-5
    ids = np.random.default_rng(0).integers(0, 99, (2, 9))
    mask = np.ones_like(ids)
    mask[0, 5:] = 0
    with torch.no_grad():
        want = model(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
    encoder = OnnxEncoder(tmp_path / "out")
    found = encoder(input_ids=ids, attention_mask=mask)["last_hidden_state"]
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids}
    judge = ReferenceEvaluator(str(tmp_path / "out/model.onnx")).run(None, feed)[0]
    for got in (found, judge):
        assert np.abs(got - want)[mask > 0].max() < 1e-5 * np.abs(want).max()
    with pytest.raises(RewriterError, match="input_ids"):
        encoder(pixel_values=ids)
    with pytest.raises(RewriterError, match="OnnxEncoder"):
        OnnxModel(tmp_path / "out")


def test_whisper_is_two_files_that_four_judges_accept(
    whisper: rewriter.RewrittenModel, folder: Path
) -> None:
    """Torch and ONNX Runtime, optimised or not, in the export; the reference evaluator here."""
    from onnx.reference import ReferenceEvaluator

    report = json.loads((folder / "export.json").read_text())
    phases = {"prefill", "decode", "chunked"}
    assert set(report["errors"]) == phases | {f"{p}, not optimised" for p in phases} | {"encoder"}
    assert report["max_error"] < 1e-5
    memory = report["encoder"]["outputs"][1:]
    assert len(memory) == 4 and set(memory) < set(report["inputs"])  # of two layers
    assert [s["input"] for s in report["states"]] == [
        f"past_{kind}_{layer}" for layer in (0, 1) for kind in ("key", "value")
    ]
    encoder, decoder = (
        ReferenceEvaluator(str(folder / file)) for file in ("encoder.onnx", "model.onnx")
    )
    features = torch.randn(2, 8, 40)
    made = encoder.run(None, {"input_features": features.numpy()})[1:]
    ids = torch.randint(3, 99, (2, 6))
    with torch.no_grad():
        want = whisper(input_features=features, decoder_input_ids=ids).logits
    held = {s["input"]: StateTensor(**s).start(2).numpy() for s in report["states"]}
    for now in (slice(0, 4), slice(4, 6)):
        feed = {
            "decoder_input_ids": ids[:, now].numpy(),
            "decoder_attention_mask": np.ones((2, now.stop), dtype=np.int64),
            "decoder_position_ids": np.tile(np.arange(now.start, now.stop), (2, 1)),
        }
        feed |= dict(zip(memory, made, strict=True)) | held
        out = dict(zip(report["outputs"], decoder.run(None, feed), strict=True))
        held = {s["input"]: out[s["output"]] for s in report["states"]}
        got = torch.from_numpy(out["logits"])
        assert (got[:, -1] - want[:, now][:, -1]).abs().max() < 1e-5 * want.abs().max()


def test_the_runtime_decodes_what_the_model_does(
    whisper: rewriter.RewrittenModel, folder: Path
) -> None:
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(1))
    ids = torch.ones(2, 1, dtype=torch.long)
    for _ in range(12):
        with torch.no_grad():
            logits = whisper(input_features=features, decoder_input_ids=ids).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    model, want = OnnxSeq2Seq(folder), ids.numpy()
    inputs = {"input_features": features.numpy()}
    options = {"max_new_tokens": 12, "eos_token_id": []}
    model.defaults |= {"suppress_tokens": [], "begin_suppress_tokens": []}
    assert np.array_equal(model.generate(inputs, **options), want)
    never = int(want[0, -1])
    model.defaults |= {"begin_suppress_tokens": [int(want[1, 1])], "suppress_tokens": [never]}
    other = model.generate(inputs, **options)
    assert other[1, 1] != want[1, 1] and never not in other
    with pytest.raises(RewriterError, match="encoded"):
        model.start(2)


@pytest.mark.slow
def test_t5_with_a_mask_of_its_encoder(tmp_path: Path) -> None:
    """A padded batch, relative positions, the model's own `generate`."""
    torch.manual_seed(0)
    config = T5Config(**SMALL, vocab_size=99, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model = rewriter.rewrite(T5ForConditionalGeneration(config).eval(), {"steps": []})
    rewriter.export(model, tmp_path / "out", logits="last")
    ids = torch.randint(3, 99, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    want = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False).numpy()
    inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    assert np.array_equal(OnnxSeq2Seq(tmp_path / "out").generate(inputs, max_new_tokens=20), want)


def test_a_wrong_encoder_is_caught_and_leaves_nothing(
    whisper: rewriter.RewrittenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attention.standard_attention

    def sharper(*args):
        return right(*args[:7], 2 * args[7], *args[8:])

    monkeypatch.setattr(attention, "standard_attention", sharper)
    with pytest.raises(GateError, match="encoder"):
        rewriter.export(whisper, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_minilm_on_text(smollm2: Path, tmp_path: Path) -> None:
    from benchmarks.onnx_parity import minilm

    found = minilm(tmp_path / "out")
    assert found["real_error"] < 1e-5 and found["max_error"] < 1e-5
