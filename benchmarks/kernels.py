"""Our mixers against torch's SDPA, paired: `python -m benchmarks.kernels [cpu|cuda]`.

Writes benchmarks/results/kernels-<device>.json, one entry a measurement, and beside it
kernels-<device>.versions.json: versions, the length from which each form wins, peak memory.

A round runs the baseline and then every form; a ratio is the median of the rounds' ratios. On a
CPU one thread is used and its own time counted, so that a busy machine does not show; on a GPU
the time is that between two events.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rewriter.kernels.attention import attention
from rewriter.kernels.block_sparse_attention import (
    BlockPlan,
    block_sparse_attention,
    select_blocks,
    select_pages,
)
from rewriter.kernels.linear_attention import linear_attention
from rewriter.kernels.linear_attention.feature_maps import elu1
from rewriter.kernels.ssd import ssd

RESULTS = Path(__file__).parent / "results"
LENGTHS = {"cpu": (512, 1024, 2048, 4096, 8192), "cuda": (1024, 2048, 4096, 8192, 16384, 32768)}
CACHE = 8192
LAYERS = 8
WINDOW, SINKS, BLOCK, BLOCKS, PAGES = 512, 64, 64, 8, 16
TOP, GATHERED = f"top-{BLOCKS}x{BLOCK} with selection", f"{PAGES} pages of {BLOCK}"
#: Largest allowed ratio to SDPA at 8,192 tokens on a CPU, by phase, op and case (None: any).
BARS = {
    ("prefill", "sparse", TOP): 0.22,
    ("prefill", "window", None): 0.25,
    ("prefill", "linear", None): 0.15,
    ("prefill", "ssd", None): 0.15,
    ("decode", "window", None): 0.08,
    ("decode", "sparse", GATHERED): 0.25,
    ("decode", "ssd", None): 0.10,
}
Form = Callable[[], Any]
#: Calls without arguments by op and case.
Forms = dict[tuple[str, str], Form]


@dataclass(frozen=True)
class Shape:
    """Heads and width of one attention layer, and what runs it."""

    heads: int
    key_heads: int
    width: int
    device: str
    dtype: torch.dtype

    def normal(self, *size: int, seed: int = 0) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return torch.randn(*size, generator=g).to(self.device, self.dtype)

    def qkv(self, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.normal(1, self.heads, queries, self.width),
            self.normal(1, self.key_heads, keys, self.width, seed=1),
            self.normal(1, self.key_heads, keys, self.width, seed=2),
        )

    def scan(self, length: int) -> dict[str, Tensor]:
        """Arguments of `ssd`, as the mamba2 pass makes them from this layer."""
        return {
            "x": self.normal(1, length, self.heads, self.width),
            "dt": torch.rand(1, length, self.heads, device=self.device),
            "A": -torch.rand(self.heads, device=self.device),
            "B": self.normal(1, length, self.key_heads, self.width, seed=1),
            "C": self.normal(1, length, self.key_heads, self.width, seed=2),
        }


SHAPES = {
    "cpu": Shape(9, 3, 64, "cpu", torch.float32),  # SmolLM2-135M
    "cuda": Shape(32, 8, 128, "cuda", torch.bfloat16),  # 8B class
}


def attend(q: Tensor, k: Tensor, v: Tensor, window: int = 0, sinks: int = 0, **given: Any) -> Any:
    mask, positions = given.get("mask"), given.get("key_positions")
    scale = q.shape[-1] ** -0.5
    return attention(q, k, v, mask, None, None, positions, scale, True, window, 0, sinks, 0.0)


def prefill(shape: Shape, length: int) -> tuple[Form, Forms]:
    """SDPA, and every form."""
    q, k, v = shape.qkv(length, length)
    scan = shape.scan(length)

    def sparse() -> Any:
        chosen = select_blocks(q, k, BLOCKS, BLOCK)
        plan = BlockPlan.from_selection(chosen, BLOCK, length, length)
        return block_sparse_attention(q, k, v, plan)

    def linear() -> Any:
        rows = (t.transpose(1, 2) for t in (elu1(q), elu1(k), v))
        return linear_attention(*rows, normalise=True)

    def sdpa() -> Any:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return sdpa, {
        ("dense", "causal"): lambda: attend(q, k, v),
        ("sparse", TOP): sparse,
        ("window", f"{WINDOW}+{SINKS}"): lambda: attend(q, k, v, WINDOW, SINKS),
        ("linear", "elu+1 normalised"): linear,
        ("ssd", f"state {shape.width}"): lambda: ssd(**scan),
    }


class Layer:
    """What one attention layer keeps: the cache, or the state of each form instead of it."""

    def __init__(self, shape: Shape, length: int) -> None:
        _, self.key, self.value = shape.qkv(1, length)
        slots = WINDOW + SINKS
        self.ring = tuple(t[:, :, :slots].contiguous() for t in (self.key, self.value))
        self.means = self.key.unflatten(2, (-1, BLOCK)).mean(3)
        self.ssd = torch.zeros(1, shape.heads, shape.width, shape.width, device=shape.device)
        self.linear = torch.zeros_like(self.ssd[:, : shape.key_heads])
        self.z = torch.ones_like(self.linear[..., 0])


def decode(shape: Shape, length: int) -> tuple[Form, Forms]:
    """One token at a cache of `length`; the state or cache of each form is there already.

    Calls go to LAYERS layers in turn, as a model's do: no call finds in the processor's cache
    what the call before it read.
    """
    layers = [Layer(shape, length) for _ in range(LAYERS)]
    rows, scan = [t.transpose(1, 2) for t in shape.qkv(1, 1)], shape.scan(1)
    q = rows[0].transpose(1, 2)
    recent = torch.arange(length - WINDOW, length, device=shape.device)
    positions = torch.cat([torch.arange(SINKS, device=shape.device), recent])[None]
    chosen = select_pages(q, layers[0].means, PAGES, BLOCK, length)

    def sdpa(at: Layer) -> Any:
        return scaled_dot_product_attention(q, at.key, at.value, enable_gqa=True)

    def dense(at: Layer) -> Any:
        return attend(q, at.key, at.value)

    def pages(at: Layer) -> Any:
        return block_sparse_attention(q, at.key, at.value, chosen)

    def selected(at: Layer) -> Any:
        plan = select_pages(q, at.means, PAGES, BLOCK, length)
        return block_sparse_attention(q, at.key, at.value, plan)

    def window(at: Layer) -> Any:
        return attend(q, *at.ring, WINDOW, SINKS, key_positions=positions)

    def linear(at: Layer) -> Any:
        mapped = (elu1(rows[0]), elu1(rows[1]), rows[2])
        return linear_attention(*mapped, normalise=True, state=at.linear, z=at.z)

    def state_space(at: Layer) -> Any:
        return ssd(**scan, state=at.ssd)

    def in_turn(form: Callable[[Layer], Any]) -> Form:
        turn = cycle(layers)
        return lambda: form(next(turn))

    return in_turn(sdpa), {
        ("dense", "causal"): in_turn(dense),
        ("sparse", GATHERED): in_turn(pages),
        ("sparse", f"{GATHERED} with selection"): in_turn(selected),
        ("window", f"{WINDOW}+{SINKS}"): in_turn(window),
        ("linear", "elu+1 normalised"): in_turn(linear),
        ("ssd", f"state {shape.width}"): in_turn(state_space),
    }


def seconds(form: Form, device: str, calls: int) -> float:
    """Of one call."""
    if device == "cpu":
        start = time.thread_time()
        for _ in range(calls):
            form()
        return (time.thread_time() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        form()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / calls


def paired(baseline: Form, forms: dict[Any, Form], device: str, rounds: int) -> dict[Any, float]:
    """Median over rounds of each form's time over the baseline's in the same round."""
    calls = {}
    for name, form in {"": baseline, **forms}.items():
        form()  # warm: compiled, memory touched
        calls[name] = max(1, math.ceil(0.02 / max(seconds(form, device, 1), 1e-6)))
    ratios: dict[Any, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        base = seconds(baseline, device, calls[""])
        for name, form in forms.items():
            ratios[name].append(seconds(form, device, calls[name]) / base)
    return {name: median(values) for name, values in ratios.items()}


def peak_bytes(form: Form, device: str) -> int:
    """Most bytes allocated at once during a call, beyond what was there before."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        form()
        return int(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(profile_memory=True) as profile:
        form()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def crossover(points: list[tuple[int, float]]) -> int | None:
    """Length from which the ratio stays at 1 or below, interpolated in log length."""
    points = sorted(points)
    if points[-1][1] > 1:
        return None
    for (a, high), (b, low) in reversed(list(zip(points, points[1:], strict=False))):
        if high > 1:
            share = (high - 1) / (high - low)
            return round(math.exp(math.log(a) + share * (math.log(b) - math.log(a))))
    return points[0][0]


def measure(device: str, rounds: int = 7) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the result file, and what stands beside it."""
    shape, rows, peaks = SHAPES[device], [], {}
    cases = [("prefill", prefill, n) for n in LENGTHS[device]] + [("decode", decode, CACHE)]
    for phase, make, length in cases:
        baseline, forms = make(shape, length)
        times = rounds if phase == "prefill" else 3 * rounds  # short calls vary more
        ratios = paired(baseline, forms, device, times)
        for (op, case), form in forms.items():
            row = {
                "op": op,
                "case": case,
                "phase": phase,
                "length": length,
                "ratio": round(ratios[op, case], 4),
                "baseline": "sdpa",
                "threads": torch.get_num_threads(),
            }
            rows.append(row)
            print(row, flush=True)
            if length == CACHE:
                peaks[f"{phase} {op} {case}"] = peak_bytes(form, device)
    square = shape.heads * CACHE * CACHE * torch.tensor([], dtype=shape.dtype).element_size()
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["phase"] == "prefill" and row["op"] != "dense":
            name = f"{row['op']} {row['case']}"
            points.setdefault(name, []).append((row["length"], row["ratio"]))
    found = {name: crossover(values) for name, values in points.items()}
    beside = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "shape": f"{shape.heads}/{shape.key_heads} heads, width {shape.width}, {shape.dtype}",
        "wins_from_length": found,
        "peak_bytes_at_8192": peaks,
        "bytes_of_all_scores_at_8192": square,
    }
    return rows, beside


def short_name(device: str) -> str:
    """cpu, h100, h200 ..."""
    if device == "cpu":
        return "cpu"
    words = torch.cuda.get_device_name().lower().replace("-", " ").split()
    return next((w for w in words if any(c.isdigit() for c in w)), words[-1])


def write(device: str, rows: list[dict[str, Any]], beside: dict[str, Any]) -> Path:
    path = RESULTS / f"kernels-{short_name(device)}.json"
    path.write_text("[\n" + ",\n".join(" " + json.dumps(r) for r in rows) + "\n]\n")
    path.with_suffix(".versions.json").write_text(json.dumps(beside, indent=1) + "\n")
    return path


def misses(rows: list[dict[str, Any]]) -> list[str]:
    """Bars of the CPU that are not met."""
    found = []
    for row in rows:
        phase, op, case, ratio = (row[n] for n in ("phase", "op", "case", "ratio"))
        bar = BARS.get((phase, op, None), BARS.get((phase, op, case)))
        if row["length"] == CACHE and bar is not None and ratio > bar:
            found.append(f"{op} {case} {phase}: {ratio:.3f}, bar {bar}")
    return found


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    with torch.no_grad():
        rows, beside = measure(device)
    print(json.dumps(beside, indent=1), write(device, rows, beside), sep="\n")
    if device == "cpu":
        print("bars not met:", misses(rows) or "none")


if __name__ == "__main__":
    main()
