"""lm_eval scores a local task on a saved rewritten folder; nothing is downloaded."""

import json
import subprocess
import sys

import pytest
import torch

import rewriter

pytestmark = pytest.mark.slow

TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def folder(original, tokenizer, tmp_path):
    original.save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    made = rewriter.rewrite(str(tmp_path / "original"), {"steps": []})
    made.save_pretrained(tmp_path / "out")
    rows = [
        {"question": f"{a} and {b} is", "choices": [str(a + b), "cat"], "answer": a % 2}
        for a in range(4)
        for b in range(3)
    ]
    data = tmp_path / "rows.json"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(data=data))
    return tmp_path


def test_local_task(folder, original, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    import lm_eval
    from lm_eval.tasks import TaskManager

    from rewriter.evaluate.harness import RewriterLM

    model = RewriterLM(pretrained=str(folder / "out"), batch_size=4)
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=["local_choice"], task_manager=manager)
    samples = found["samples"]["local_choice"]
    assert len(samples) == 12
    right = []
    for sample in samples:
        scores = [log_probability(original, tokenizer, *pair) for pair in sample["arguments"]]
        given = [float(response[0]) for response in sample["filtered_resps"]]
        assert given == pytest.approx(scores, abs=1e-3)
        right.append(scores.index(max(scores)) == sample["doc"]["answer"])
    accuracy = found["results"]["local_choice"]["acc,none"]
    assert accuracy == pytest.approx(sum(right) / 12)


@torch.no_grad()
def log_probability(model, tokenizer, context, continuation):
    start = len(tokenizer(context)["input_ids"])
    tokens = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    steps = model(input_ids=tokens).logits[0].log_softmax(-1)[:-1].gather(-1, tokens[0, 1:, None])
    return float(steps[start - 1 :].sum())


def test_command_line(folder):
    command = [sys.executable, "-m", "rewriter.evaluate.harness", "run", "--model", "rewriter"]
    command += ["--model_args", f"pretrained={folder / 'out'}", "--tasks", "local_choice"]
    command += ["--include_path", str(folder / "tasks"), "--output_path", str(folder / "results")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (folder / "results").rglob("results*.json")
    assert "acc,none" in json.loads(written.read_text())["results"]["local_choice"]
