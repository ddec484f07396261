"""A whole run on tiny models: rows, worst task, repetition, table, picture, command line."""

import io
import json

import pytest
import torch
from rich.console import Console

import rewriter
from rewriter.cli import run
from rewriter.errors import RewriterError
from rewriter.evaluate import SUITES, TASKS, Suite, evaluate
from rewriter.evaluate.show import compared, save_figure, table
from rewriter.evaluate.suite import Evaluation, Row

SMALL = Suite(
    book=((64, 4), (1536, 1)),
    others=((64, 1),),
    generation=(2, 8),
    tasks=(("passkey", 600, 2), ("niah_multivalue", 1536, 1), ("cloze", 1536, 2), ("copy", 256, 1)),
)


@pytest.fixture(scope="module", autouse=True)
def no_assets(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWRITER_ASSETS", str(tmp_path_factory.mktemp("none")))
        yield


@pytest.fixture(scope="module")
def found(other, original, tokenizer):
    return evaluate(other, original, tokenizer, suite=SMALL)


def test_rows(found, original, other):
    assert list(found.texts) == ["sample"]
    names = [(row.task, row.length) for row in found.rows]
    assert names == [("sample", 64), ("sample", 1536), ("generation", 128)] + [
        (task, length) for task, length, _ in SMALL.tasks
    ]
    text = found.rows[1]
    assert text.ratio == text.rewritten / text.original and text.ratio != 1
    assert len(text.details["excess_by_1024"]) == 2 and text.details["kl"] > 0.1
    blocks = text.details["curve"]
    assert len(blocks["original"]) == len(blocks["rewritten"]) == 16 and blocks["block"] == 96
    cloze = next(row for row in found.rows if row.task == "cloze")
    assert {"attentiveness", "certified", "nll"} <= set(cloze.details)
    assert found.rows[2].details["agreed"][0] <= 8


def test_a_model_beside_itself(rewritten, original, tokenizer):
    found = evaluate(rewritten, original, tokenizer, suite=SMALL)
    for row in found.rows:
        assert row.excess is None or abs(row.excess) < 1e-5
        assert row.kept in (None, 1.0)
        assert row.ratio is None or row.ratio == pytest.approx(1, abs=1e-5)
        assert row.difference in (None, 0.0)


def test_repetition_is_equal(found, other, original, tokenizer):
    again = evaluate(other, original, tokenizer, suite=SMALL)
    assert json.dumps(again.to_dict()) == json.dumps(found.to_dict())
    elsewhere = evaluate(other, original, tokenizer, suite=SMALL, seed=1)
    assert [row.excess for row in elsewhere.rows[3:]] != [row.excess for row in found.rows[3:]]


def test_progress_ends_at_its_total(other, original, tokenizer):
    seen = []
    suite = Suite(((64, 2),), (), (1, 4), (("passkey", 500, 2),))
    evaluate(other, original, tokenizer, suite=suite, progress=lambda *told: seen.append(told))
    done = [count for _, count, _ in seen]
    assert done == sorted(done) and done[0] == 0 and done[-1] == seen[-1][2]
    assert {what for what, _, _ in seen} == {"sample 64", "generation 128", "passkey 500", "done"}


def printed(what, width=250):
    console = Console(width=width, file=io.StringIO())
    console.print(what)
    return console.file.getvalue()


def row(task, excess, kept=None):
    return Row(task, 64, 1, "accuracy", 1.0, 0.5, excess=excess, kept=kept)


def test_the_worst_is_named():
    rows = [row("a", 0.1, 1.0), row("b", 0.5, 0.9), row("c", 0.2, 0.25), row("d", 0.0)]
    worst = Evaluation("own", 0, {}, rows, []).worst()
    assert (worst["excess"].task, worst["kept"].task) == ("b", "c")
    rows.append(row("broken", float("nan")))
    made = Evaluation("own", 0, {}, rows, [])
    assert made.worst()["excess"].task == "broken"
    shown = printed(table(made))
    assert "worst task: broken at 64 tokens" in shown
    assert "worst retrieval: c at 64 tokens keeps 25.0%" in shown


def test_the_table_fits_in_80_columns():
    found = Row("pride_and_prejudice", 1918, 20, "accuracy", 1.0, 0.0, None, -1.0, -12.25, 1.0)
    shown = printed(table(Evaluation("own", 0, {}, [found], [])), width=80)
    for value in ("pride_and_prejudice", "1,918", "100.0%", "-100.0pt", "-12.250"):
        assert value in shown
    assert "…" not in shown


def test_what_cannot_run_is_told(other, original, tokenizer):
    class Wrapper(torch.nn.Module):
        def forward(self, input_ids):
            return other(input_ids=input_ids)

    suite = Suite(((64, 1), (8192, 1)), (), (1, 4), ())
    found = evaluate(Wrapper(), original, tokenizer, suite=suite)
    assert [row.length for row in found.rows] == [64]
    assert found.skipped == [
        {"task": "sample", "length": 8192, "why": "the model takes 4,096 tokens"},
        {"task": "generation", "length": 128, "why": "the model does not generate"},
    ]


def test_suites_name_known_tasks():
    for suite in SUITES.values():
        assert {name for name, _, _ in suite.tasks} == set(TASKS)
    full = SUITES["full"]
    assert all(length * count >= 16384 for length, count in full.book)
    assert all(count == 20 for name, _, count in full.tasks if name == "passkey")
    lengths = {length for name, length, _ in full.tasks if name == "passkey"}
    assert lengths == {430, 1918}


def test_mistakes(other, original, tokenizer):
    with pytest.raises(RewriterError, match="no suite 'fast'"):
        evaluate(other, original, tokenizer, suite="fast")
    with pytest.raises(RewriterError, match="only 5 tokens"):
        evaluate(other, original, tokenizer, suite=SMALL, data=["short"])


def test_pictures_and_comparison(found, tmp_path):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    assert save_figure(found, first) and save_figure(found, second)
    assert first.read_bytes()[:4] == b"\x89PNG" and first.read_bytes() == second.read_bytes()
    assert not save_figure(Evaluation("own", 0, {}, [row("a", 0.1)], []), tmp_path / "none.png")
    shown = printed(compared({"one": found.to_dict(), "two": found.to_dict()}))
    assert f"× {found.rows[1].ratio:.3f}" in shown
    assert shown.count(found.worst()["excess"].task + f" {found.worst()['excess'].length}:") == 2


@pytest.fixture(scope="module")
def folders(original, tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    original.save_pretrained(root / "original")
    tokenizer.save_pretrained(root / "original")
    plan = {"steps": [{"pass": "sliding_window", "window": 16, "sinks": 1}]}
    made = rewriter.rewrite(str(root / "original"), plan | {"gate": {"length": 64}})
    made.save_pretrained(root / "out")
    return root


def test_command(folders, capsys, monkeypatch):
    monkeypatch.setitem(SUITES, "quick", SMALL)
    out = folders / "out"
    assert run(["eval", str(out)]) == 0
    path = folders / "out-eval-quick.json"
    first = path.read_bytes()
    found = json.loads(first)
    assert found["original"] == str(folders / "original")
    assert found["worst"]["excess"]["task"] and path.with_suffix(".png").is_file()
    assert "worst task: " in capsys.readouterr().out

    assert run(["eval", str(out), "--json", "--beside", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert path.read_bytes() == first

    # a plain folder needs to be told what to stand beside
    plain = str(folders / "original")
    result = str(folders / "self.json")
    assert run(["eval", plain, "--against", plain, "--output", result]) == 0
    rows = json.loads((folders / "self.json").read_text())["rows"]
    assert all(row["excess"] in (None, 0) for row in rows)


def test_command_mistakes(folders, capsys, tmp_path):
    out, plain = str(folders / "out"), str(folders / "original")
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xff\xfe\x00")
    wrong = tmp_path / "wrong.json"
    wrong.write_text("[1]")
    for arguments, message in (
        ([str(tmp_path / "none")], "no folder"),
        ([plain], "give --against"),
        ([out, "--against", "./none"], "no model './none'"),
        ([out, "--suite", "fast"], "no suite 'fast'"),
        ([out, "--data", str(text)], "give UTF-8 text"),
        ([out, "--output", str(tmp_path)], "cannot write"),
        ([out, "--beside", str(wrong)], "'rewriter eval' wrote"),
    ):
        assert run(["eval", *arguments]) == 2, arguments
        captured = capsys.readouterr()
        assert message in captured.err and "Traceback" not in captured.err
        assert captured.out == ""
