"""The scan of layers, against rewriting one layer at a time and comparing whole models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rewriter
from rewriter.cli import run
from rewriter.errors import RewriterError
from rewriter.evaluate.passkey import passkey_examples
from rewriter.recover import layers
from rewriter.recover.data import training_text
from rewriter.recover.layers import PASSKEY, scan

LENGTH = 64
MEASURED = {"tokens": 2 * LENGTH, "length": LENGTH}


@pytest.fixture(scope="module")
def model(byte_llama):
    return byte_llama(0)


@pytest.fixture(scope="module")
def text() -> Tensor:
    return torch.randint(0, 256, (6000,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """All in float32, and little text to fit on."""
    monkeypatch.setattr(layers, "half_precision", lambda *_: False)
    monkeypatch.setattr(layers, "FIT", 8 * LENGTH)


def alone(model, text, layer: int):
    """The model with one layer rewritten, on the text that the scan fits with."""
    data = training_text(text, None, 2 * LENGTH, LENGTH)
    plan = {"steps": [{"pass": "mamba2", "layers": [layer]}], "gate": {"length": LENGTH}}
    return rewriter.rewrite(model, plan, data=data.sample(layers.FIT, LENGTH, 0)), data.held_out


@torch.no_grad()
def logarithms(model, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.double().log_softmax(-1)


def divergence(truth: Tensor, made: Tensor) -> float:
    return float((truth.exp() * (truth - made)).sum(-1).mean())


def test_costs_are_those_of_whole_models(model, text):
    found = {r["layer"]: r for r in scan(model, "mamba2", text, **MEASURED).rows}
    assert sorted(found) == [0, 1]
    for layer, row in found.items():
        made, held_out = alone(model, text, layer)
        truth = logarithms(model, held_out)
        kl = divergence(truth, logarithms(made, held_out))
        assert row["kl"] == pytest.approx(kl, rel=1e-4)
        attention = model.model.layers[layer].self_attn
        without = attention.register_forward_hook(lambda _, __, out: (0 * out[0], *out[1:]))
        assert row["kl_deleted"] == pytest.approx(
            divergence(truth, logarithms(model, held_out)), rel=1e-4
        )
        without.remove()
        assert row["passkey"] is None and row["score"] == row["kl"]


def test_passkeys_have_the_length_that_is_asked_for(model, text, tokenizer):
    tokens = 500
    options = {"passkey_tokens": tokens, "prompts": 3}
    found = scan(model, "mamba2", text, tokenizer=tokenizer, **MEASURED, **options)
    prompts = passkey_examples(tokenizer, tokens, 3)
    assert all(tokens - 100 < len(p.tokens) <= tokens for p in prompts)
    row = found.rows[-1]
    made, _ = alone(model, text, row["layer"])

    def loss(of) -> float:
        total = 0.0
        for prompt in prompts:
            at = torch.tensor([p for answer in prompt.answers for p in answer])
            rows = logarithms(of, prompt.tokens[None])[0, at - 1]
            total -= float(rows.gather(1, prompt.tokens[at][:, None]).mean())
        return total / 3

    assert row["passkey"] == pytest.approx(loss(made) - loss(model), rel=1e-3)
    assert row["score"] == pytest.approx(row["kl"] + PASSKEY * max(0.0, row["passkey"]))


def test_the_cheapest_layers_are_chosen_and_the_plan_takes_them(model, text):
    found = scan(model, "mamba2", text, count=1, **MEASURED)
    scores = [r["score"] for r in found.rows]
    assert scores == sorted(scores)
    assert found.layers == sorted(r["layer"] for r in found.rows[:1])
    assert found.plan.steps[0].options["layers"] == found.layers
    assert len(scan(model, "mamba2", text, ratio=1.0, **MEASURED).layers) == 2


def test_mistakes_are_explained(model, text):
    with pytest.raises(RewriterError, match="3 layers are asked for, 2 have a site"):
        scan(model, "mamba2", text, count=3, **MEASURED)
    with pytest.raises(RewriterError, match="has no site"):
        scan(model, "mamba2", text, options={"targets": ["nothing"]}, **MEASURED)


def test_command_line(model, tokenizer, tmp_path: Path, capsys):
    folder, plan, words = tmp_path / "model", tmp_path / "plan.yaml", tmp_path / "text.txt"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words.write_text("a few words of a text, again and again. " * 300)
    given = ["scan", str(folder), "--pass", "mamba2", "--data", str(words), "--json"]
    given += ["--tokens", "128", "--length", "64", "--passkey-tokens", "300", "--prompts", "1"]
    assert run([*given, "--count", "1", "--plan", str(plan)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"] == [found["scores"][0]["layer"]]
    assert rewriter.Plan.from_yaml(plan.read_text()).steps[0].options["layers"] == found["layers"]
    assert run([*given, "--options", "{'window': 4}"]) == 2
    assert "--options is no JSON" in capsys.readouterr().err
