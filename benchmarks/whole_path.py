"""Bars of the whole path on SmolLM2-135M: `python -m benchmarks.whole_path [name ...]`.

Writes benchmarks/results/whole_path.json: one entry a measurement, with versions and machine.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import rewriter

ASSETS = Path.home() / ".cache/rewriter/assets"
RESULT = Path(__file__).parent / "results" / "whole_path.json"


def original() -> transformers.PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(ASSETS / "smollm2", dtype=torch.float32).eval()


def perplexity(model: torch.nn.Module, text: str, windows: int = 4, length: int = 2048) -> float:
    """Mean over non-overlapping windows from the middle third; first token not scored."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "smollm2")
    ids = tokenizer(text[len(text) // 3 :][: windows * length * 6])["input_ids"]
    losses = []
    with torch.no_grad():
        for start in range(0, windows * length, length):
            x = torch.tensor([ids[start : start + length]])
            logits = model(input_ids=x).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, x[0, 1:]))
    return float(torch.stack(losses).mean().exp())


def texts() -> dict[str, str]:
    wikipedia = sorted((ASSETS / "wikipedia").glob("*.txt"))[::10]
    return {
        "pride_and_prejudice": (ASSETS / "austen/pride_and_prejudice.txt").read_text(),
        "wikipedia": "\n\n".join(p.read_text() for p in wikipedia),
    }


def compile_cost() -> dict[str, float]:
    """Bar 9: seconds and extra peak memory of the empty plan, over loading."""
    model = original()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    rewriter.rewrite(model, {"steps": []})
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": time.perf_counter() - start, "extra_mb": (after - before) / 1024}


def loading() -> dict[str, float]:
    """Bar 7: our loading against transformers', best of three."""
    folder = Path(tempfile.mkdtemp()) / "out"
    rewriter.rewrite(original(), {"steps": []}).save_pretrained(folder)
    ours, theirs = [], []
    for _ in range(3):
        start = time.perf_counter()
        original()
        theirs.append(time.perf_counter() - start)
        start = time.perf_counter()
        rewriter.load(folder)
        ours.append(time.perf_counter() - start)
    return {"rewriter_s": min(ours), "transformers_s": min(theirs)}


def low_rank() -> dict[str, float]:
    """Bar 5: 20 % fewer parameters in all linears, calibrated on 16k tokens of five novels."""
    books = sorted((ASSETS / "austen").glob("*.txt"))
    data = [b for b in books if b.stem != "pride_and_prejudice"]
    dense, plan = original(), {"steps": [{"pass": "low_rank", "keep": 0.8}]}
    start = time.perf_counter()
    model = rewriter.rewrite(ASSETS / "smollm2", plan, data=data)
    seconds = time.perf_counter() - start
    found = {"seconds": seconds, "tokens": model.report["data"]["tokens"]}
    for name, text in texts().items():
        found[name] = perplexity(model, text, 1) / perplexity(dense, text, 1)
    return found


def mamba2() -> dict[str, float]:
    """Bar 6, on the real model: the closed-form fit against none, layers 6, 8, 20, 22."""
    books = sorted((ASSETS / "austen").glob("*.txt"))
    data = [b for b in books if b.stem != "pride_and_prejudice"]
    step = {"pass": "mamba2", "layers": [6, 8, 20, 22]}
    text, found = texts()["pride_and_prejudice"], {}
    dense = perplexity(original(), text, 1)
    for fit in ("output_projection", "none"):
        plan = {"steps": [step | {"fit": fit}], "gate": {"sequences": 2}}
        model = rewriter.rewrite(ASSETS / "smollm2", plan, data=data)
        found[fit] = perplexity(model, text, 1) / dense
    return found


MEASURES = {f.__name__: f for f in (compile_cost, loading, mamba2, low_rank)}


def main() -> None:
    results = json.loads(RESULT.read_text()) if RESULT.exists() else []
    for name in sys.argv[1:] or MEASURES:
        entry = {
            "measure": name,
            **{k: round(v, 4) for k, v in MEASURES[name]().items()},
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }
        results = [r for r in results if r["measure"] != name] + [entry]
        print(entry, flush=True)
        RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
