"""Our ONNX exports against other runtimes: `python -m benchmarks.onnx [row ...] [options]`.

A row is a plan (`dense`, `mamba2-50%`, …), with `:int8` or `:int4` for its weights, or a peer
(`openvino`, `openvino:int8`); all by default. Rows and onnxruntime-genai fp32 run in turn on one
thread, each in a process of its own, whose peak memory is measured; a ratio is the median over
rounds of a row's time over that of onnxruntime-genai in the same round. Peers are installed in
an environment of their own under ~/.cache/rewriter/onnx-peers, models are kept there too.

Writes benchmarks/results/onnx.json after every round: what was measured stays, and calling
again goes on until there are `--rounds` (`--fresh` begins anew). Beside it onnx.versions.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
ASSETS = Path(os.environ.get("REWRITER_ASSETS") or Path.home() / ".cache/rewriter/assets")
MODEL = ASSETS / "smollm2"
WORK = Path.home() / ".cache/rewriter/onnx-peers"
RESULT = ROOT / "benchmarks/results/onnx.json"
SAMPLES = WORK / "samples.json"
LENGTHS = (512, 2048, 8192)
STEPS = 16  # tokens decoded at the end of a length: the builder's rotary table ends at 8,192
SCORED, SHORT = 2048, 512
BASE = "onnxruntime-genai"

#: Tolerance for plans that no training has repaired: they amplify rounding. Of mamba2-100% torch's
#: own answers in one call and call by call differ by 6e-3.
CHAOS = 2e-2

#: Layers as in benchmarks/recovery.py. Speed does not depend on weights: no fit.
MAMBA_50 = [5, 6, 7, 8, 9, 12, 17, 20, 22, 24, 25, 26, 27, 28, 29]
HYBRID_50 = [0, 1, 11, 12, 13, 16, 17, 19, 21, 22, 25, 26, 27, 28, 29]
MAMBA = {"pass": "mamba2", "fit": "none"}
HYBRID = {"pass": "hybrid_linear"}
PLANS: dict[str, list[dict[str, Any]]] = {
    "dense": [],
    "mamba2-50%": [MAMBA | {"layers": MAMBA_50}],
    "mamba2-100%": [MAMBA],
    "hybrid-50%": [HYBRID | {"layers": HYBRID_50}],
    "hybrid-100%": [HYBRID],
    "hybrid-100%-window-256": [HYBRID | {"window": 256}],  # that of benchmarks/recovery.py
}
PEERS = ("openvino", "openvino:int8")
#: Largest allowed ratio to onnxruntime-genai fp32, by row and length: (prefill, decode).
BARS = {
    ("dense", 512): (1.03, 1.03),
    ("dense", 2048): (1.03, 1.03),
    ("dense", 8192): (1.03, 1.03),
    ("mamba2-50%", 8192): (0.77, 0.67),
    ("hybrid-50%", 8192): (0.77, 0.67),
    ("mamba2-100%", 8192): (0.50, 0.63),
    ("hybrid-100%", 8192): (0.50, 0.63),
}
#: Largest allowed time of a decoded token at 8,192 over that at 512 where no cache grows.
FLAT = 1.05


# ---- models and peers ----------------------------------------------------------------------------


def environment() -> Path:
    """The peers' python. What they need and we have too (torch) is read from our environment."""
    python = WORK / "env/bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(WORK / "env")], check=True)
        ours = sysconfig.get_paths()["purelib"]
        tag = f"python{sys.version_info.major}.{sys.version_info.minor}"
        (WORK / f"env/lib/{tag}/site-packages/rewriter_environment.pth").write_text(ours + "\n")
    return python


def run(python: Path, *command: Any) -> None:
    """In a folder where nothing is called `kernels`, which transformers would take for its own."""
    made = subprocess.run(
        [python, "-m", *map(str, command)], cwd=WORK, capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{made.stderr[-3000:]}")


def install(*packages: str, dependencies: bool = True) -> Path:
    python = environment()
    extra = [] if dependencies else ["--no-deps"]
    run(python, "pip", "install", "-q", *extra, *packages)
    return python


def genai_folder() -> Path:
    """SmolLM2 by the builder of onnxruntime-genai, fp32, logits of the last position alone."""
    folder = WORK / "models/onnxruntime-genai"
    python = install("onnxruntime-genai")
    if not (folder / "genai_config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        run(
            *(python, "onnxruntime_genai.models.builder", "-i", MODEL, "-o", folder),
            *("-p", "fp32", "-e", "cpu", "--extra_options", "prune_lm_head=true"),
        )
        path = folder / "genai_config.json"
        config = json.loads(path.read_text())
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 1
        path.write_text(json.dumps(config, indent=1))
    return folder


def openvino_folder(weights: str) -> Path:
    """SmolLM2 by optimum-intel; its torchvision would replace our torch, so it is left out."""
    folder = WORK / f"models/openvino-{weights}"
    install("openvino", "nncf", "openvino-tokenizers")
    # Our own datasets needs a newer huggingface_hub than that transformers takes.
    install("optimum-intel", "optimum", "datasets==4.4.1", dependencies=False)
    python = install("transformers==5.5.4", "huggingface_hub==1.21.0", "tokenizers==0.22.2")
    if not (folder / "openvino_model.xml").exists():
        shutil.rmtree(folder, ignore_errors=True)
        run(
            *(python, "optimum.commands.optimum_cli", "export", "openvino", "--model", MODEL),
            *("--task", "text-generation-with-past", "--weight-format", weights, folder),
        )
    return folder


def ours(plan: str, weights: str, logits: str, rebuild: bool) -> Path:
    """The export of a plan, made in a process of its own if it is not there."""
    folder = WORK / f"models/{plan}-{weights}-{logits}"
    if rebuild or not (folder / "export.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        code = (
            "import sys; from pathlib import Path; from benchmarks.onnx import build; "
            "build(*sys.argv[1:4], Path(sys.argv[4]))"
        )
        subprocess.run(
            [sys.executable, "-c", code, plan, weights, logits, folder], cwd=ROOT, check=True
        )
    return folder


def build(plan: str, weights: str, logits: str, folder: Path) -> None:
    """Rewrite, export, and note what both took (CPU seconds) and the state by the formula."""
    import time

    import torch

    import rewriter

    data = torch.from_numpy(tokens()[None, : 4 * 128].reshape(4, 128))
    steps = {"steps": PLANS[plan], "gate": {"sequences": 1, "length": 64}}
    steps["calibration"] = {"sequences": 4, "length": 128}
    model = rewriter.rewrite(MODEL, steps, data=data)
    clock = time.process_time()
    options: dict[str, Any] = {} if weights == "fp32" else {"weights": weights}
    if plan != "dense":
        options["tolerance"] = CHAOS
    rewriter.export(model, folder, to="onnx", logits=logits, **options)
    path = folder / "export.json"
    about = json.loads(path.read_text())
    about["export_cpu_s"] = round(time.process_time() - clock, 2)
    about["state"] = model.report["state"]["after"]
    path.write_text(json.dumps(about, indent=2) + "\n")


def tokens() -> np.ndarray[Any, Any]:
    """Pride and Prejudice from a third in: int64 [at least 8,192]."""
    from tokenizers import Tokenizer

    text = (ASSETS / "austen/pride_and_prejudice.txt").read_text()
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    start = len(text) // 3
    found = tokenizer.encode(text[start : start + 60_000], add_special_tokens=False)
    return np.array(found.ids, dtype=np.int64)


# ---- measuring -------------------------------------------------------------------------------


class Worker:
    """A runtime in its own process; `ask` waits for its answer."""

    def __init__(self, row: str, logits: str = "last", rebuild: bool = False) -> None:
        name, _, weights = row.partition(":")
        python, runtime = Path(sys.executable), "rewriter"
        if row == BASE:
            runtime, python, folder = BASE, environment(), genai_folder()
        elif name == "openvino":
            runtime, folder = name, openvino_folder(weights or "fp32")
            python = environment()
        else:
            folder = ours(name, weights or "fp32", logits, rebuild)
        path = folder / "export.json"
        self.about = json.loads(path.read_text()) if path.exists() else {}
        self.process = subprocess.Popen(
            [python, "-P", ROOT / "benchmarks/onnx_worker.py", runtime, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self._answer()

    def ask(self, **request: Any) -> dict[str, float]:
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args}: ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(rows: list[str], length: int, rounds: int, rebuild: bool) -> None:
    """Rounds of onnxruntime-genai and every row; results are written after each."""
    text = WORK / "tokens.npy"
    np.save(text, tokens())
    order = [BASE, *rows]
    for row in rows:  # before anything runs beside it
        Worker(row, rebuild=rebuild).close()
    workers = {row: Worker(row) for row in order}
    for worker in workers.values():
        worker.ask(tokens=str(text), length=128, steps=STEPS)
    while any(len(samples(row, length)) < rounds for row in rows):
        made = {r: w.ask(tokens=str(text), length=length, steps=STEPS) for r, w in workers.items()}
        for row in rows:
            if length > SHORT:  # at once, so that both lengths see the same machine
                short = workers[row].ask(tokens=str(text), length=SHORT, steps=STEPS)
                made[row]["growth"] = made[row]["decode"] / short["decode"]
            add(row, length, {"row": made[row], "base": made[BASE]})
            write(row, length, workers[row].about)
    for worker in workers.values():
        worker.close()


def perplexity(row: str, rebuild: bool) -> None:
    """Of 2,048 tokens in one prefill, and of the last 128 of them in cached decode."""
    text = WORK / "tokens.npy"
    np.save(text, tokens())
    worker = Worker(row, "all", rebuild)
    found = {}
    if row != BASE:  # its file has the logits of the last position alone
        found["prefill"] = worker.ask(tokens=str(text), score=SCORED)["perplexity"]
    found["decode"] = worker.ask(tokens=str(text), score=SCORED, steps=128)["perplexity"]
    worker.close()
    every = json.loads(SAMPLES.read_text()) if SAMPLES.exists() else {}
    every[f"{row} perplexity"] = found
    SAMPLES.write_text(json.dumps(every))
    print(row, "perplexity", found, flush=True)


# ---- results -----------------------------------------------------------------------------------


def samples(row: str, length: int) -> list[dict[str, Any]]:
    every = json.loads(SAMPLES.read_text()) if SAMPLES.exists() else {}
    return every.get(f"{row} {length}", [])


def add(row: str, length: int, sample: dict[str, Any]) -> None:
    every = json.loads(SAMPLES.read_text()) if SAMPLES.exists() else {}
    every.setdefault(f"{row} {length}", []).append(sample)
    SAMPLES.write_text(json.dumps(every))


def forget(row: str, length: int) -> None:
    every = json.loads(SAMPLES.read_text()) if SAMPLES.exists() else {}
    every.pop(f"{row} {length}", None)
    SAMPLES.write_text(json.dumps(every))


def write(row: str, length: int, about: dict[str, Any]) -> None:
    """Merge one row and that of onnxruntime-genai into the results."""
    taken = samples(row, length)
    every = json.loads(SAMPLES.read_text())
    name, _, weights = row.partition(":")
    runtime = "rewriter" if name in PLANS else name
    plan = name if name in PLANS else "dense"
    entry = _entry(plan, runtime, weights or "fp32", length, taken, "row")
    for phase in ("prefill", "decode"):
        ratios = [s["row"][phase] / s["base"][phase] for s in taken]
        entry[f"{phase}_ratio"] = round(median(ratios), 4)
        entry[f"{phase}_spread"] = [round(min(ratios), 3), round(max(ratios), 3)]
    if length > SHORT:
        entry["decode_over_512"] = round(median([s["row"]["growth"] for s in taken]), 4)
    scores = every.get(f"{row} perplexity", {})
    entry["perplexity"] = _rounded(scores.get("prefill"))
    entry["perplexity_decode"] = _rounded(scores.get("decode"))
    if about:
        entry |= {"state_mb": round(taken[-1]["row"]["state_mb"], 3)}
        entry |= {"state_formula_mb": round(_formula(about["state"], length) / 1e6, 3)}
        entry |= {"file_mb": round(about["bytes"] / 1e6, 1)}
        entry |= {"export_cpu_s": about["export_cpu_s"], "export_error": about["max_error"]}
    if (name, length) in BARS and weights in ("", "fp32"):
        bars = BARS[name, length]
        entry |= {"bar_prefill": bars[0], "bar_decode": bars[1]}
        entry["met"] = entry["prefill_ratio"] <= bars[0] and entry["decode_ratio"] <= bars[1]
        if "100%" in name:
            entry["met"] &= entry["decode_over_512"] <= FLAT
    base = _entry("dense", BASE, "fp32", length, taken, "base")
    base |= {"prefill_ratio": 1.0, "decode_ratio": 1.0, "perplexity": None}
    base["perplexity_decode"] = _rounded(every.get(f"{BASE} perplexity", {}).get("decode"))
    _merge(base, entry)
    print(json.dumps(entry), flush=True)


def _entry(
    plan: str, runtime: str, weights: str, length: int, taken: list[Any], who: str
) -> dict[str, Any]:
    prefill = length - STEPS - 1
    return {
        "plan": plan,
        "runtime": runtime,
        "weights": weights,
        "length": length,
        "pairs": len(taken),
        "prefill_tokens_per_s": round(prefill / median([s[who]["prefill"] for s in taken]), 1),
        "decode_ms": round(1e3 * median([s[who]["decode"] for s in taken]), 2),
        "peak_mb": round(max(s[who]["peak_mb"] for s in taken), 1),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _formula(state: dict[str, Any], length: int) -> float:
    """Bytes of rewriter.state_size's formula, after `length` tokens."""
    capped = sum(c["bytes_per_token"] * min(c["tokens"], length) for c in state["capped"])
    return float(state["fixed"] + state["per_token"] * length + capped)


def _merge(*entries: dict[str, Any]) -> None:
    key = ("plan", "runtime", "weights", "length")
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else []
    for entry in entries:
        kept = [e for e in kept if any(e[k] != entry[k] for k in key)] + [entry]
    kept.sort(key=lambda e: [str(e["runtime"]), e["plan"], e["weights"], e["length"]])
    RESULT.write_text(json.dumps(kept, indent=1) + "\n")
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread a runtime",
        "python": platform.python_version(),
        **{p: version(p) for p in ("torch", "transformers", "onnxruntime")},
        **_peer_versions(),
    }
    RESULT.with_suffix(".versions.json").write_text(json.dumps(about, indent=1) + "\n")


def _peer_versions() -> dict[str, str]:
    folder = next((WORK / "env/lib").glob("python*/site-packages"))
    found = [p.name.removesuffix(".dist-info") for p in sorted(folder.glob("*.dist-info"))]
    wanted = ("onnxruntime_genai", "onnxruntime", "openvino", "optimum_intel", "nncf")
    pairs = dict(name.rsplit("-", 1) for name in found)
    return {f"peer {name}": pairs[name] for name in wanted if name in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("row", nargs="*", help=f"of {', '.join([*PLANS, *PEERS])}")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--perplexity", action="store_true", help="measure only perplexity")
    parser.add_argument(
        "--rebuild", action="store_true", help="export again, forget earlier rounds"
    )
    parser.add_argument("--fresh", action="store_true", help="forget earlier rounds")
    given = parser.parse_args()
    rows = given.row or [*PLANS, *PEERS]
    known = [*PLANS, *PEERS] + [BASE] * given.perplexity
    if unknown := [r for r in rows if r not in known and r.partition(":")[0] not in PLANS]:
        parser.error(f"no row {', '.join(unknown)}: one of {', '.join(known)}")
    if hasattr(os, "sched_setaffinity"):  # every process on the same core
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if given.perplexity:
        for row in [*rows, *([BASE] if not given.row else [])]:
            perplexity(row, given.rebuild)
        return
    for i, length in enumerate(given.lengths):
        for row in rows if given.fresh or given.rebuild else []:
            forget(row, length)
        measure(rows, length, given.rounds, given.rebuild and i == 0)


if __name__ == "__main__":
    main()
