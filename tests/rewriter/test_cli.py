"""The command line on bad input: one message, an exit code, no traceback, no folder."""

import hashlib
import json
import subprocess
import sys

import pytest
from pydantic import Field

import rewriter.cli
from rewriter.cli import run
from rewriter.inspection import check_files, hash_files
from rewriter.protocol import REGISTRY, Contract, Pass, PassConfig


@pytest.fixture(autouse=True)
def dummy():
    class Dummy(Pass):
        """A pass for tests."""

        name, contract = "dummy_window", Contract.EXACT

        class Config(PassConfig):
            window: int = Field(gt=0)

        def sites(self, graph):
            yield from ()

        def rewrite(self, graph, site):
            raise NotImplementedError

    yield
    del REGISTRY["dummy_window"]


GOOD = "steps:\n  - pass: dummy_window\n    window: 4\n"
STEP = "{pass: dummy_window, window: 4}"
BAD_PLANS = {
    "unknown pass": ("steps: [{pass: dummy_windo, window: 4}]", "did you mean 'dummy_window'"),
    "unknown option": ("steps: [{pass: dummy_window, windw: 4}]", "unknown option 'windw'"),
    "option missing": ("steps: [{pass: dummy_window}]", "'window' is missing"),
    "wrong type": ("steps: [{pass: dummy_window, window: many}]", "valid integer"),
    "number as text": ("steps: [{pass: dummy_window, window: '4'}]", "valid integer"),
    "negative window": ("steps: [{pass: dummy_window, window: -4}]", "greater than 0"),
    "window not a number": ("steps: [{pass: dummy_window, window: .nan}]", "window"),
    "negative layer": ("steps: [{pass: dummy_window, window: 4, layers: [-1]}]", "negative"),
    "bad pattern": ("steps: [{pass: dummy_window, window: 4, targets: ['re:(']}]", "regular"),
    "python tag": ("steps: !!python/object/apply:os.system ['touch pwned']", "not a plan"),
    "python name": ("steps: [{pass: !!python/name:os.system , window: 4}]", "not a plan"),
    "bad yaml": ("steps: [", "not a plan in YAML"),
    "tabs": ("steps:\n\t- pass: dummy_window", "not a plan in YAML"),
    "empty": ("", "is empty"),
    "only a comment": ("# nothing\n", "is empty"),
    "a list": ("- pass: dummy_window", "not a mapping"),
    "a string": ("hello", "not a mapping"),
    "no steps": ("version: 1", "'steps' is missing"),
    "steps null": ("steps:", "steps"),
    "steps not a list": ("steps: {pass: dummy_window}", "steps"),
    "step without pass": ("steps: [{window: 4}]", "names no pass"),
    "step is a string": ("steps: [dummy_window]", "names no pass"),
    "wrong version": (GOOD + "version: 2", "version"),
    "duplicate key": (GOOD + "    window: 5\n", "duplicate key 'window'"),
    "duplicate steps": (GOOD + GOOD, "duplicate key 'steps'"),
    "anchor": ("a: &a [1]\n" + GOOD, "anchors"),
    "unknown key": (GOOD + "sed: 3", "did you mean 'seed'"),
    "negative seed": (GOOD + "seed: -1", "seed"),
    "seed a word": (GOOD + "seed: x", "seed"),
    "gate option": (GOOD + "gate: {sequence: 4}", "did you mean 'sequences'"),
    "gate zero": (GOOD + "gate: {sequences: 0}", "sequences"),
    "data a number": (GOOD + "data: 3", "data"),
    "key not text": (GOOD + "1: x", "not a string"),
    "date": ("steps: [{pass: dummy_window, window: 2024-01-01}]", "not plain data"),
    "impossible date": ("steps: [{pass: dummy_window, window: 2024-99-99}]", "not a plan"),
    "deep": ("[" * 3000, "not a plan"),
    "control character": ("steps: \x00", "not a plan"),
}


def fails(capsys, arguments, message, code=2):
    assert run([str(a) for a in arguments]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err and captured.out == ""
    return captured.err


@pytest.mark.parametrize("name", BAD_PLANS)
def test_bad_plan(name, tmp_path, capsys):
    text, message = BAD_PLANS[name]
    plan, output = tmp_path / "plan.yaml", tmp_path / "out"
    plan.write_text(text)
    error = fails(capsys, ["apply", tmp_path, "--plan", plan, "--output", output], message)
    assert error.count("error:") == 1 and "fix:" in error
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(GOOD)
    return path


def test_bad_files(tmp_path, plan, capsys):
    output = tmp_path / "out"
    missing = tmp_path / "none.yaml"
    fails(capsys, ["apply", "m", "--plan", missing, "--output", output], "there is no plan file")
    fails(capsys, ["apply", "m", "--plan", tmp_path, "--output", output], "cannot read")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    fails(capsys, ["apply", "m", "--plan", binary, "--output", output], "not UTF-8")
    fails(capsys, ["apply", "./none", "--plan", plan, "--output", output], "no model './none'")
    fails(capsys, ["apply", "", "--plan", plan, "--output", output], "no model")
    fails(capsys, ["apply", "a b", "--plan", plan, "--output", output], "no model 'a b'")
    fails(capsys, ["inspect", "./none"], "no model './none'")
    fails(capsys, ["inspect", "./none", "--json"], "no model './none'")
    assert not output.exists()


def test_existing_output_is_never_touched(tmp_path, plan, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("keep")
    fails(capsys, ["apply", "m", "--plan", plan, "--output", output], "exists already")
    assert (output / "mine").read_text() == "keep"
    under_a_file = plan / "out"
    fails(capsys, ["apply", "m", "--plan", plan, "--output", under_a_file], "cannot write in")


def test_usage(tmp_path, plan, capsys):
    output = tmp_path / "out"
    fails(capsys, ["apply", "m", "--plan", plan], "--output")
    fails(capsys, ["apply", "m", "--output", output], "--plan")
    fails(capsys, ["apply", "m", "--plan", plan, "--output", output, "--export", "tf"], "onnx")
    fails(capsys, ["aply"], "No such command")
    fails(capsys, ["passes", "--jsn"], "No such option")
    fails(capsys, ["generate", tmp_path, "hi", "--max-new-tokens", "0"], "max-new-tokens")


def test_verify_and_generate_want_a_rewritten_model(tmp_path, capsys):
    fails(capsys, ["verify", tmp_path / "none"], "not a rewritten model")
    fails(capsys, ["verify", tmp_path], "not a rewritten model")
    fails(capsys, ["generate", tmp_path, "hello"], "not a rewritten model")
    lock = tmp_path / "lock.json"
    for text in ("{", "[]", "{}", '{"files": 3}'):
        lock.write_text(text)
        fails(capsys, ["verify", tmp_path], "damaged")
    (tmp_path / "config.json").write_text("{}")
    lock.write_text(json.dumps({"files": {"config.json": "0" * 64, "gone": "0", "../up": "0"}}))
    error = fails(capsys, ["verify", tmp_path, "--json"], "config.json has changed")
    assert "gone is missing" in error and "../up is missing" in error
    fails(capsys, ["generate", tmp_path, " "], "prompt is empty")


def test_hashes_are_the_ones_that_verify_checks(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"1")
    (tmp_path / "config.json").write_text("{}")
    hashes = hash_files(tmp_path)
    (tmp_path / "lock.json").write_text(json.dumps({"files": hashes}))
    assert check_files(tmp_path) == ["config.json", "onnx/model.onnx"]
    assert hash_files(tmp_path) == hashes


def test_verify_checks_tensors(tmp_path, capsys):
    import torch
    from safetensors.torch import save_file

    lock = {"tensors": {"a": hashlib.sha256(bytes(12)).hexdigest()}}
    (tmp_path / "lock.json").write_text(json.dumps(lock))
    fails(capsys, ["verify", tmp_path], "cannot be read")
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert check_files(tmp_path) == ["model.safetensors"]
    save_file({"a": torch.ones(3), "b": torch.ones(1)}, tmp_path / "model.safetensors")
    error = fails(capsys, ["verify", tmp_path], "a has changed")
    assert "b is not in the lock" in error
    save_file({"c": torch.ones(3)}, tmp_path / "model.safetensors")
    fails(capsys, ["verify", tmp_path], "a is missing")


def test_failures_of_a_run(tmp_path, plan, capsys, monkeypatch):
    """What a run raises becomes a message and a code; nothing is left behind."""
    from rewriter.errors import GateError, VerifyError

    class Model:
        report = {"model": "m", "plan": GOOD, "status": "exact"}

        def __init__(self, error=None):
            self.error = error

        def save_pretrained(self, folder):
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text("{}")
            print("chatter")
            if self.error:
                raise self.error

    output = tmp_path / "deep" / "er" / "out"
    arguments = ["apply", "org/m", "--plan", plan, "--output", output, "--json"]
    full = OSError(28, "No space left on device", "model.safetensors")
    cases = [
        (GateError("site a is wrong", "fix it"), 3, "site a is wrong"),
        (VerifyError("hole"), 4, "hole"),
        (KeyboardInterrupt(), 130, ""),
        (full, 2, "No space left on device: model.safetensors"),
        (PermissionError(13, "Permission denied", "x"), 2, "Permission denied: x"),
    ]
    for error, code, message in cases:
        for saving in (False, True):

            def rewrite(model, plan, data=None, error=error, saving=saving):
                if not saving:
                    raise error
                return Model(error)

            monkeypatch.setattr(rewriter, "rewrite", rewrite, raising=False)
            fails(capsys, arguments, message, code)
            assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]

    monkeypatch.setattr(rewriter, "rewrite", lambda *a, **k: 1 / 0, raising=False)
    assert run([str(a) for a in arguments]) == 1
    assert "bug in rewriter" in capsys.readouterr().err

    monkeypatch.setattr(rewriter, "rewrite", lambda *a, **k: Model(), raising=False)
    assert run([str(a) for a in arguments]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["report"]["status"] == "exact"
    assert [p.name for p in output.iterdir()] == ["config.json"]
    assert [p.name for p in output.parent.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder without weights, which is all that `inspect` reads."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(**sizes, **heads, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return folder


def test_inspect(model, tmp_path, capsys):
    assert run(["inspect", str(model), "--json"]) == 0
    found = {e["pass"]: e for e in json.loads(capsys.readouterr().out)["passes"]}
    assert [s["layer"] for s in found["sliding_window"]["sites"]] == [0, 1]
    assert run(["inspect", str(model)]) == 0
    assert "model.layers.1.self_attn" in capsys.readouterr().out

    plan = tmp_path / "plan.yaml"
    plan.write_text("steps: [{pass: sliding_window, window: 4, layers: [1]}, " + STEP + "]")
    assert run(["inspect", str(model), "--plan", str(plan), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["passes"]
    assert [s["layer"] for s in first["sites"]] == [1]
    assert "no site to rewrite" in second["problem"]
    assert run(["inspect", str(model), "--plan", str(plan)]) == 0
    capsys.readouterr()
    for options, message in [
        ("layers: [2]", "layer 2 does not exist"),
        ("targets: [x]", "nearest"),
    ]:
        plan.write_text("steps: [{pass: sliding_window, window: 4, " + options + "}]")
        fails(capsys, ["inspect", model, "--plan", plan, "--json"], message)


def test_passes_and_schema_print_one_json_object(capsys):
    assert run(["passes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["passes"]
    row = next(r for r in rows if r["name"] == "dummy_window")
    assert row == {"name": "dummy_window", "contract": "exact", "about": "A pass for tests."}
    assert run(["schema"]) == 0
    assert "dummy_window" in json.loads(capsys.readouterr().out)["$defs"]
    assert run(["passes"]) == 0


def test_help_is_light_and_tells_the_exit_codes():
    code = """
import sys
import rewriter
from rewriter.cli import run
code = run(["apply", "--help"])
assert "torch" not in sys.modules and "transformers" not in sys.modules
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "130 interrupted" in " ".join(done.stdout.split())
