"""The main job on a real model: rewrite SmolLM2-135M, recover, save, load, write, export."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from rich.console import Console
from transformers import AutoTokenizer

import rewriter
from rewriter.report import summary

ASSETS = Path(os.environ.get("REWRITER_ASSETS", Path.home() / ".cache/rewriter/assets"))
PLAN = """
version: 1
steps:
  - pass: sliding_window
    layers: {every: 2, from: 1}
    window: 128
    sinks: 4
  - pass: mamba2
    layers: [6, 20]
gate: {sequences: 2, length: 256}
"""


def main() -> None:
    console, start = Console(), time.perf_counter()
    source, out = ASSETS / "smollm2", Path("demo-output")
    shutil.rmtree(out, ignore_errors=True)

    console.rule("rewrite: a window in every other layer, two layers to Mamba-2")
    model = rewriter.rewrite(source, rewriter.Plan.from_yaml(PLAN))
    console.print(summary(model.report))

    console.rule("recover: a minute of training against the original, on another novel")
    text = str(ASSETS / "austen" / "persuasion.txt")
    stages = [{"stage": "transfer"}, {"stage": "distil", "length": 512}]
    model = rewriter.recover(model, source, stages, text, minutes=1.0, held_out=2048)
    console.print(model.report["recovery"]["perplexity"] | model.report["recovery"]["baselines"])

    console.rule("save and load")
    model.save_pretrained(out / "model")
    again = rewriter.load(out / "model")
    console.print(f"report with pictures and curves: {out / 'model' / 'report.html'}")

    console.rule("generate with a bounded state")
    tokenizer = AutoTokenizer.from_pretrained(source)
    question = [{"role": "user", "content": "What is gravity?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt")
    tokens = again.generate(**inputs, max_new_tokens=40, do_sample=False)
    console.print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :]))

    console.rule("export to ONNX, checked in ONNX Runtime")
    made = rewriter.export(again, out / "onnx", to="onnx")
    console.print({key: made[key] for key in ("bytes", "ops", "max_error", "fallbacks")})
    console.print(f"all of it in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
