"""What comes out of `rewrite`: one graph for all phases, that saves, loads and trains."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import rewriter
from rewriter.errors import RewriterError
from rewriter.state import Ring, State

PLANS = {
    "empty": {"steps": []},
    "window": {"steps": [{"pass": "sliding_window", "window": 8, "sinks": 2}]},
    "mamba2": {"steps": [{"pass": "mamba2", "layers": [1]}]},
    "low_rank": {"steps": [{"pass": "low_rank", "targets": ["re:.*mlp.*"], "keep": 0.8}]},
}


@pytest.fixture(scope="module", params=PLANS)
def rewritten(request, tiny_llama):
    return rewriter.rewrite(tiny_llama, PLANS[request.param])


def batch(rows: int = 3, length: int = 19) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 200, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


def closeness(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def logits(model, ids, mask, state=None, past=0):
    with torch.no_grad():
        return model(
            input_ids=ids[:, past:],
            attention_mask=mask,
            position_ids=positions(mask)[:, past:],
            past_key_values=state,
            use_cache=state is not None,
        ).logits


@pytest.mark.parametrize("cuts", [[19], [5, 12, 19], [1, 2, 3, 10, 19], list(range(1, 20))])
def test_prefill_equals_chunks_and_steps(rewritten, cuts):
    inputs = batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = logits(rewritten, ids, mask)
    state, parts, past = State(rewritten.graph.states), [], 0
    for cut in cuts:
        parts.append(logits(rewritten, ids[:, :cut], mask[:, :cut], state, past))
        past = cut
    real = mask.bool()
    assert closeness(torch.cat(parts, 1)[real], whole[real]) <= 1e-5


def test_left_padding_equals_none(rewritten):
    inputs = batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    padded = logits(rewritten, ids, mask)[1, 7:]
    alone = logits(rewritten, ids[1:2, 7:], mask[1:2, 7:])[0]
    assert closeness(padded, alone) <= 1e-5


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_cached_generation_equals_uncached(rewritten, options):
    inputs = batch()
    made = [
        rewritten.generate(**inputs, max_new_tokens=16, do_sample=False, use_cache=cache, **options)
        for cache in (True, False)
    ]
    assert torch.equal(*made)


def test_empty_plan_generates_what_the_original_does(tiny_llama):
    model = rewriter.rewrite(tiny_llama, PLANS["empty"])
    inputs = batch()
    for options in ({"do_sample": False}, {"num_beams": 4}, {"do_sample": True}):
        made = []
        for which in (model, tiny_llama):
            torch.manual_seed(3)
            made.append(which.generate(**inputs, max_new_tokens=16, **options))
        assert torch.equal(*made), options


def test_save_and_load_are_bit_equal(rewritten, tmp_path: Path):
    folder = tmp_path / "out"
    rewritten.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    inputs = batch()
    assert torch.equal(
        logits(again, inputs["input_ids"], inputs["attention_mask"]),
        logits(rewritten, inputs["input_ids"], inputs["attention_mask"]),
    )
    names = {p.name for p in folder.iterdir()}
    assert {"config.json", "graph.json", "lock.json", "plan.yaml", "report.html"} <= names
    assert again.plan == rewritten.plan


IN_A_NEW_PROCESS = """
import hashlib, sys, torch, rewriter
model = rewriter.load(sys.argv[1])
ids = torch.tensor([[int(i) for i in sys.argv[2].split(",")]])
with torch.no_grad():
    print(hashlib.sha256(model(input_ids=ids).logits.numpy().tobytes()).hexdigest())
"""
HYBRID = {
    "steps": [
        {"pass": "mamba2", "layers": [1]},
        {"pass": "sliding_window", "layers": [0, 2], "window": 8, "sinks": 2},
    ]
}


def same_in_a_new_process(model, folder: Path, ids: torch.Tensor) -> bool:
    """Save, load in another process, and compare the bytes of the logits [1, L, V]."""
    model.save_pretrained(folder)
    numbers = ",".join(map(str, ids[0].tolist()))
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(folder), numbers]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    with torch.no_grad():
        truth = model(input_ids=ids).logits
    return printed[-1] == hashlib.sha256(truth.numpy().tobytes()).hexdigest()


def test_logits_are_bit_equal_in_a_new_process(tiny_llama, tmp_path: Path):
    model = rewriter.rewrite(tiny_llama, HYBRID)
    assert same_in_a_new_process(model, tmp_path / "out", batch(3, 40)["input_ids"][:1])


@pytest.mark.slow
def test_smollm2_is_bit_equal_in_a_new_process(smollm2, tmp_path: Path):
    short = {"sequences": 2, "length": 128}
    model = rewriter.rewrite(smollm2, HYBRID | {"calibration": short, "gate": short})
    ids = torch.randint(3, 49_000, (1, 64), generator=torch.Generator().manual_seed(1))
    assert same_in_a_new_process(model, tmp_path / "out", ids)


def test_replay_gives_the_same_tensors(rewritten, tiny_llama):
    again = rewriter.rewrite(tiny_llama, rewritten.lock["plan"])
    assert again.lock["tensors"] == rewritten.lock["tensors"]


def test_trains(rewritten, tmp_path: Path):
    rewritten.save_pretrained(tmp_path / "out")
    model = rewriter.load(tmp_path / "out").train()
    model(**batch(), labels=batch()["input_ids"]).loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not without


def test_existing_folder_is_refused(rewritten, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RewriterError, match="exists"):
        rewritten.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_interrupted_save_leaves_nothing(rewritten, tmp_path: Path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rewriter.model.save_file", full)
    with pytest.raises(OSError, match="No space"):
        rewritten.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["schemas"].update({"aten.add.Tensor": "other"}), "schema of aten.add"),
        (lambda d: d.update(version=99), "version 99"),
        (lambda d: d["nodes"][-2].update(target="aten.no_such_op.default"), "no_such_op"),
        (lambda d: d["nodes"][-2].update(target="os.system"), "os.system"),
    ],
)
def test_damaged_graph_is_one_clear_error(rewritten, tmp_path: Path, change, message):
    folder = tmp_path / "out"
    rewritten.save_pretrained(folder)
    data = json.loads((folder / "graph.json").read_text())
    change(data)
    (folder / "graph.json").write_text(json.dumps(data))
    with pytest.raises(RewriterError, match=message):
        rewriter.load(folder)


def test_damaged_weights_are_one_clear_error(rewritten, tmp_path: Path):
    folder = tmp_path / "out"
    rewritten.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(RewriterError, match="damaged"):
        rewriter.load(folder)


def test_ring_is_bounded_and_measured():
    ring, rows, heads, width = Ring(window=8, sinks=2), 2, 3, 4
    formula = rows * (8 + 2) * (2 * heads * width * 4 + 9)  # fp32; column and flag of a slot
    for step in range(30):
        new = torch.randn(rows, heads, 1, width)
        ring.append(new, new, torch.ones(rows, step + 1))
        stored = sum(t.untyped_storage().nbytes() for t in ring.tensors().values())
        assert stored == formula


def test_makes_its_own_tensors_where_its_weights_are(rewritten, tmp_path):
    # The device of every machine; no value is computed there, but a wrong device is an error.
    rewritten.save_pretrained(tmp_path / "saved")
    moved = rewriter.load(tmp_path / "saved").to("meta")
    inputs = {n: t.to("meta") for n, t in batch().items()}
    assert moved(**inputs).logits.device.type == "meta"
