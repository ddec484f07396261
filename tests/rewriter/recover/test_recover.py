"""Recovery on tiny models: stages, resuming, frozen tensors, folding, guards."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rewriter
from rewriter.errors import PlanError, RewriterError
from rewriter.recover.graphs import Frozen, extract, stateless
from rewriter.recover.modules import DistilStage, TransferStage
from rewriter.recover.regions import find_regions
from rewriter.recover.run import recover
from rewriter.recover.stages import Distil, Fit, Lora, Transfer
from rewriter.recover.teacher import teacher_graph
from rewriter.recover.trainer import Diverged, checkpoints

LENGTH = 32
CAPTURED: dict[int, object] = {}
REWRITTEN: dict[str, Path] = {}
FAST = {"with_baselines": False, "evaluations": 0, "checkpoint_minutes": None, "held_out": 64}


def text() -> Tensor:
    """Token ids in which the next is often the last one plus one: something to learn."""
    generator = torch.Generator().manual_seed(0)
    jumps = torch.where(torch.rand(6000, generator=generator) < 0.8, 1, 7)
    return jumps.cumsum(0) % 190 + 3


@pytest.fixture(autouse=True)
def one_capture(monkeypatch):
    """The tiny original is captured once; every use gets its own copy of the graph."""
    from rewriter.calibration import copy_module
    from rewriter.recover import teacher

    def cached(model, **options):
        if not isinstance(model, torch.nn.Module):
            return plain(model, **options)
        if id(model) not in CAPTURED:
            CAPTURED[id(model)] = plain(model)
        found = CAPTURED[id(model)]
        return dataclasses.replace(found, module=copy_module(found.module))

    plain = teacher.capture
    monkeypatch.setattr(teacher, "capture", cached)
    monkeypatch.setattr(importlib.import_module("rewriter.rewrite"), "capture", cached)


def rewritten(model, name="mamba2", **options):
    """Layers 0 and 2 rewritten; made once, then loaded from a folder."""
    key = f"{name} {options}"
    if key not in REWRITTEN:
        REWRITTEN[key] = Path(tempfile.mkdtemp()) / "made"
        _rewrite(model, name, options).save_pretrained(REWRITTEN[key])
    return rewriter.load(REWRITTEN[key])


def _rewrite(model, name, options):
    step = {"pass": name, "layers": [0, 2], **options}
    plan = {"steps": [step], "gate": {"sequences": 1, "length": 32}}
    return rewriter.rewrite(model, plan, data=text()[: 32 * 64].view(-1, 64))


def tensors(model) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.graph.parameters()}


def transfer(**options) -> Transfer:
    return Transfer(**{"length": LENGTH, "tokens": 40 * LENGTH, "ema": 0.0, **options})


def distil(**options) -> Distil:
    rates = {"new": 3e-3, "copied": 2e-3}
    given = {"length": LENGTH, "tokens": 30 * LENGTH, "ema": 0.0, "learning_rate": rates}
    return Distil(**(given | options))


def curve(model, stage: int = 0) -> list[float]:
    return [loss for _, loss in model.report["recovery"]["stages"][stage]["curve"]]


def test_stages_recover(tiny_llama):
    made = rewritten(tiny_llama)
    before = tensors(made)
    recover(made, tiny_llama, [transfer()], text(), **FAST)
    assert all(row["after"] < row["before"] for row in made.report["recovery"]["layers"])
    recover(
        made, tiny_llama, [distil(layer_weight=0.0, rows=4, tokens=80 * 4 * LENGTH)], text(), **FAST
    )
    losses = curve(made)
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    assert made.config.recovery == made.report["status"] == "recovered"
    changed = {n for n, t in made.graph.parameters() if not torch.equal(t, before[n])}
    assert changed and all(".mamba2." in n for n in changed)
    frozen = set(before) - changed
    assert all(torch.equal(before[n], made.graph.tensor(n)) for n in frozen)


def test_original_is_untouched(tiny_llama):
    """A window trains copies of the projections, whose memory the original shares."""
    before = {n: p.detach().clone() for n, p in tiny_llama.named_parameters()}
    made = rewritten(tiny_llama, "sliding_window", window=4, sinks=1)
    recover(made, tiny_llama, [transfer()], text(), **FAST)
    trained = made.graph.tensor("model.layers.0.self_attn.q_proj.weight")
    assert not torch.equal(trained, before["model.layers.0.self_attn.q_proj.weight"])
    for name, parameter in tiny_llama.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_low_rank_linears(tiny_llama):
    made = rewritten(tiny_llama, "low_rank", keep=0.5, targets=[r"re:.*mlp.*"])
    recover(made, tiny_llama, [transfer(tokens=1200)], text(), **FAST)
    layers = made.report["recovery"]["layers"]
    assert len(layers) == 6
    assert sum(r["after"] for r in layers) < sum(r["before"] for r in layers)


def parts(model, original, half=False):
    student, teacher = stateless(model.graph), stateless(teacher_graph(original, model))
    regions = find_regions(student, teacher, model.lock["sites"])
    trained = {n: model.graph.tensor(n) for r in regions for n in r.tensors}
    return student, teacher, regions, trained, Frozen(half=half)


def test_gradients_are_those_of_the_whole_graph(tiny_llama):
    """Regions, chunks and shared prefixes change how gradients are found, not what they are."""
    made = rewritten(tiny_llama)
    student, teacher, regions, trained, frozen = parts(made, tiny_llama)
    stage = DistilStage(Distil(layer_weight=0.0), student, teacher, regions, trained, frozen)
    ids = text()[:48].view(2, 24)
    stage(ids)["loss"].backward()
    logits = made(input_ids=ids).logits
    with torch.no_grad():
        truth = tiny_llama(input_ids=ids).logits.log_softmax(-1)
    loss = (truth.exp() * (truth - logits.log_softmax(-1))).sum(-1).mean()
    names = list(trained)
    wanted = torch.autograd.grad(loss, [made.graph.tensor(n) for n in names])
    for name, expected in zip(names, wanted, strict=True):
        found = stage.get_parameter(name).grad
        scale = expected.abs().max().clamp_min(1e-6)
        assert (found - expected).abs().max() <= 2e-4 * scale, name


def test_checkpointing_gives_the_same(tiny_llama):
    made = rewritten(tiny_llama)
    ids = text()[:48].view(2, 24)
    found = []
    for checkpointing in (False, True):
        options = Distil(layer_weight=0.0, checkpointing=checkpointing)
        stage = DistilStage(options, *parts(made, tiny_llama))
        stage(ids)["loss"].backward()
        found.append([p.grad for p in stage.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_masked_positions_do_not_count(tiny_llama):
    made = rewritten(tiny_llama)
    for cls, first in ((TransferStage, ()), (DistilStage, (Distil(ce_weight=0.5),))):
        stage = cls(*first, *parts(made, tiny_llama))
        ids = text()[:40].view(1, 40)
        mask = torch.ones_like(ids)
        mask[:, 30:] = 0
        other = ids.clone()
        other[:, 30:] = 5
        one, two = (stage(i, mask)["loss"] for i in (ids, other))
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
        short = stage(ids[:, :30])["loss"]
        torch.testing.assert_close(one, short, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("logits", ["kl", "rkl", "jsd", "ce", "l2"])
def test_logit_losses(tiny_llama, logits):
    made = rewritten(tiny_llama)
    options = Distil(logits=logits, temperature=2.0 if logits != "kl" else 1.0)
    stage = DistilStage(options, *parts(made, tiny_llama))
    losses = []
    optimizer = torch.optim.Adam(stage.parameters(), 3e-3)
    for _ in range(12):
        loss = stage(text()[:64].view(1, 64))["loss"]
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_lora_folds_exactly(tiny_llama):
    made = rewritten(tiny_llama, "sliding_window", window=4, sinks=1)
    lora = Lora(length=LENGTH, tokens=20 * LENGTH, ema=0.0, rank=4, targets=["re:.*mlp.*proj"])
    from rewriter.recover import training as engine
    from rewriter.recover.lora import add_lora

    kept = {}
    plain = engine._better

    def keep(trainer, start):
        new, which = plain(trainer, start)
        kept.update(new)
        return new, which

    engine._better = keep
    try:
        student = stateless(made.graph)
        recover(made, tiny_llama, [lora], text(), **FAST)
    finally:
        engine._better = plain
    with_additions, _, pairs = add_lora(student, lora, 0)
    names = [n for pair in pairs.values() for n in pair]
    assert len(pairs) == 9 and all(kept[n].abs().max() > 0 for n in names)
    ids = [n.name for n in with_additions.graph.nodes if n.op == "placeholder"]
    logits = with_additions.graph.output_node().args[0][0].name
    from rewriter.recover.modules import input_values

    piece = extract(with_additions, ids, [logits], names)
    tokens = text()[:64].view(2, 32)
    added = piece(input_values(with_additions, tokens), kept)[0]
    folded = made(input_ids=tokens).logits
    assert (added - folded).abs().max() <= 1e-5 * added.abs().max()
    assert not any("lora" in n for n, _ in made.graph.parameters())


def test_fit_is_least_squares(tiny_llama):
    made = rewritten(tiny_llama, fit="none")
    recover(made, tiny_llama, [Fit(tokens=1024, length=64)], text(), **FAST)
    report = made.report["recovery"]
    assert all(r["after"] < r["before"] for r in report["layers"])
    assert report["stages"][0]["sites"][0]["after"] < 1


def test_resumed_run_is_the_same(tiny_llama, tmp_path):
    to_text = {"ce_weight": 1.0, "logits_weight": 0.0, "layer_weight": 0.0}
    stages = [transfer(), distil(ema=0.9, **to_text)]
    options = {**FAST, "checkpoint_steps": 7, "evaluations": 2}
    whole = rewritten(tiny_llama)
    recover(whole, tiny_llama, stages, text(), **options)

    from rewriter.recover import modules

    plain, calls = modules.DistilStage.losses, [0]

    def stop(self, ids, mask):
        calls[0] += 1
        if calls[0] == 20:
            raise KeyboardInterrupt
        return plain(self, ids, mask)

    cut = rewritten(tiny_llama)
    modules.DistilStage.losses = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            recover(cut, tiny_llama, stages, text(), work=tmp_path / "w", **options)
    finally:
        modules.DistilStage.losses = plain
    assert checkpoints(tmp_path / "w/2-distil")[-1].name == "checkpoint-14"
    again = rewritten(tiny_llama)
    recover(again, tiny_llama, stages, text(), work=tmp_path / "w", resume=True, **options)
    assert whole.report["recovery"]["stages"][1]["kept"] != "start"
    for stage in (0, 1):
        one, two = curve(whole, stage), curve(again, stage)
        assert len(one) == len(two)
        assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-6
    for name, value in whole.graph.parameters():
        assert torch.equal(value, again.graph.tensor(name)), name


def test_another_run_is_not_resumed(tiny_llama, tmp_path):
    made = rewritten(tiny_llama)
    recover(made, tiny_llama, [transfer()], text(), work=tmp_path / "w", **FAST)
    again = rewritten(tiny_llama)
    with pytest.raises(RewriterError, match="another stages"):
        recover(
            again, tiny_llama, [transfer(tokens=99)], text(), work=tmp_path / "w", resume=True,
            **FAST,
        )  # fmt: skip
    with pytest.raises(RewriterError, match="not ended"):
        recover(again, tiny_llama, [transfer()], text(), work=tmp_path / "w", **FAST)


def test_nan_stops_and_keeps_the_last_good_state(tiny_llama, tmp_path):
    from rewriter.recover import modules

    plain, calls = modules.TransferStage.losses, [0]

    def poison(self, ids, mask):
        calls[0] += 1
        made = plain(self, ids, mask)
        return made | {"loss": made["loss"] * float("nan")} if calls[0] == 10 else made

    made = rewritten(tiny_llama)
    before = tensors(made)
    modules.TransferStage.losses = poison
    try:
        with pytest.raises(Diverged, match="not finite.*\n.*fix"):
            recover(made, tiny_llama, [transfer()], text(), work=tmp_path / "w", **FAST)
    finally:
        modules.TransferStage.losses = plain
    (kept,) = checkpoints(tmp_path / "w/1-transfer")
    assert kept.name == "checkpoint-9"
    assert all(torch.equal(before[n], t) for n, t in made.graph.parameters())


def test_divergence_stops(tiny_llama):
    made = rewritten(tiny_llama)
    wild = transfer(learning_rate={"new": 3.0, "copied": 3.0}, tokens=400 * LENGTH, clip=1e3)
    with pytest.raises(Diverged):
        recover(made, tiny_llama, [wild], text(), **FAST)


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_stage_that_makes_it_worse_changes_nothing(tiny_llama, ema):
    made = rewritten(tiny_llama)
    before = tensors(made)
    stage = distil(tokens=4 * LENGTH, ema=ema, learning_rate={"new": 0.3, "copied": 0.3})
    recover(made, tiny_llama, [stage], text(), **FAST | {"evaluations": 1})
    assert all(torch.equal(t, made.graph.tensor(n)) for n, t in before.items())
    (facts,) = made.report["recovery"]["stages"]
    assert facts["kept"] == "start"
    assert "made the model worse on held-out text" in made.report["warnings"][-1]
    assert facts["evaluations"][-1]["perplexity"] == facts["evaluations"][0]["perplexity"]


def test_shared_memory(tiny_llama, tmp_path):
    """From folders, the original brings only the tensors that the rewrite has dropped."""
    tiny_llama.save_pretrained(tmp_path / "original")
    step = {"pass": "mamba2", "layers": [1]}
    plan = {"steps": [step], "gate": {"sequences": 1, "length": 32}}
    rewriter.rewrite(tmp_path / "original", plan, data=text()[:512].view(-1, 64)).save_pretrained(
        tmp_path / "out"
    )
    made = rewriter.load(tmp_path / "out")
    teacher = teacher_graph(tmp_path / "original", made)
    own = {t.data_ptr() for _, t in made.graph.parameters()}
    others = {n for n, t in teacher.parameters() if t.data_ptr() not in own}
    assert others == {f"model.layers.1.self_attn.{p}_proj.weight" for p in "qkvo"}
    ids = text()[:20].view(1, 20)
    values = [ids, torch.ones_like(ids), torch.arange(20)[None]]
    logits = teacher.module(*values)[0]
    assert (logits - tiny_llama(input_ids=ids).logits).abs().max() <= 1e-5 * logits.abs().max()


def test_memory_of_folders(tiny_llama, tmp_path, monkeypatch):
    """Teacher and student together: bfloat16 linears once, float32 for the rest."""
    out = folder(tiny_llama, tmp_path)
    from rewriter.recover import run as engine
    from rewriter.recover.training import _tensor_of

    seen = []
    plain = engine.run_stage

    def count(run, *rest):
        held = {}
        for module in (run.student, run.teacher):
            for node in module.graph.nodes:
                if node.op == "get_attr":
                    tensor = _tensor_of(module, str(node.target))
                    held[tensor.data_ptr()] = tensor.nbytes
        held |= {c.data_ptr(): c.nbytes for _, c in run.frozen._placed.values()}
        seen.append(sum(held.values()))
        return plain(run, *rest)

    monkeypatch.setattr(engine, "run_stage", count)
    made = recover(out, None, [transfer()], text(), precision="half", **FAST)
    whole = sum(p.nbytes for p in tiny_llama.parameters())
    assert seen[0] <= 1.0 * whole
    before = rewriter.load(out)
    for name, value in before.graph.parameters():
        if ".mamba2." not in name:
            assert torch.equal(value, made.graph.tensor(name)), name


def test_half_precision_is_near(tiny_llama):
    made = rewritten(tiny_llama)
    ids = text()[:64].view(1, 64)
    losses = [
        float(TransferStage(*parts(made, tiny_llama, half))(ids)["loss"].detach())
        for half in (False, True)
    ]
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.02 * losses[0]


def test_no_data_and_no_budget(tiny_llama):
    made = rewritten(tiny_llama)
    with pytest.raises(RewriterError, match="needs text"):
        recover(made, tiny_llama, tokens=100)
    with pytest.raises(PlanError, match="no end"):
        recover(made, tiny_llama, ["transfer"], text())
    with pytest.raises(PlanError, match="unknown stage"):
        recover(made, tiny_llama, ["transform"], text(), tokens=100)
    with pytest.raises(PlanError, match="unknown option"):
        recover(made, tiny_llama, [{"stage": "distil", "tau": 1.0}], text(), tokens=100)


def folder(model, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "original")
    plan = {"steps": [{"pass": "mamba2", "layers": [1]}], "gate": {"sequences": 1, "length": 32}}
    made = rewriter.rewrite(tmp_path / "original", plan, data=text()[:512].view(-1, 64))
    made.save_pretrained(tmp_path / "out")
    import numpy as np

    np.save(tmp_path / "text.npy", text().numpy())
    return tmp_path / "out"


def test_command_line(tiny_llama, tmp_path):
    from rewriter.cli import run

    out = folder(tiny_llama, tmp_path)
    data = str(tmp_path / "text.npy")
    assert run(["recover", str(out), "--data", data, "--tokens", "20000", "--json"]) == 0
    assert not (tmp_path / "out.recovery").exists()
    report = json.loads((out / "report.json").read_text())
    assert set(report["recovery"]["baselines"]) == {"deleted", "mean", "window", "closed_form"}
    assert json.loads((out / "config.json").read_text())["recovery"] == "recovered"
    page = (out / "report.html").read_text()
    assert all(title in page for title in ("Recovery", "Error per layer", "Baselines"))
    assert run(["verify", str(out)]) == 0
    assert rewriter.load(out).report["status"] == "recovered"
    assert run(["recover", str(out), "--data", data, "--resume", "--tokens", "9"]) == 2


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
import torch
from rewriter.recover.run import recover
from rewriter.recover.session import main_process
from rewriter.recover.stages import Transfer, Distil
from test_recover import text, FAST
from safetensors.torch import save_file
made = recover({out!r}, None, [Transfer(length=32, tokens=640, ema=0.0, accumulate={accumulate}),
    Distil(length=32, tokens=320, ema=0.0, accumulate={accumulate})], text(),
    work={work!r}, precision="full", arguments={arguments!r}, **FAST)
if main_process():
    save_file({{n: t.detach().contiguous() for n, t in made.graph.parameters()}}, {result!r})
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_are_one(tiny_llama, tmp_path, kind):
    from safetensors.torch import load_file

    out = folder(tiny_llama, tmp_path)
    found = []
    for processes in (1, 2):
        arguments = {"fsdp": "full_shard"} if kind == "fsdp" and processes == 2 else {}
        result = str(tmp_path / f"{processes}.safetensors")
        script = tmp_path / f"run{processes}.py"
        script.write_text(
            SCRIPT.format(
                here=str(Path(__file__).parent),
                out=str(out),
                accumulate=2 // processes,
                work=str(tmp_path / f"work{processes}"),
                arguments=arguments,
                result=result,
            )  # fmt: skip
        )
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29555"]
        command = [sys.executable, *(launch if processes == 2 else []), str(script)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(load_file(result))
    for name, value in found[0].items():
        gap = (value - found[1][name]).abs().max()
        assert gap <= 1e-4 * value.abs().max().clamp_min(1e-3), (name, float(gap))
