"""Everything that needs a GPU: `python -m benchmarks.gpu [tests] [kernels] [peers] [model]`.

First all kernel tests with real kernels (a failure stops it: a wrong kernel's time means
nothing), then benchmarks/kernels.py on the GPU, our sparse and recurrent kernels against
FlashAttention, FlexAttention and, where they are installed, mamba-ssm and
flash-linear-attention, and a model's prefill and decode. Writes kernels-<device>.json and
gpu-<device>.json under benchmarks/results. Decoding is timed as it is served, in a CUDA graph.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import kernels
from rewriter.kernels.block_sparse_attention import (
    BlockPlan,
    DecodePlan,
    block_sparse_attention,
)
from rewriter.kernels.ssd import ssd

ROOT = Path(__file__).resolve().parents[1]
SHAPE = kernels.SHAPES["cuda"]
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
PEER_LENGTHS = (2048, 8192, 32768)  # those that compile or tune for a length
TILE = 128
#: Least speed over the baseline, by row, length and baseline.
BARS = {
    ("sparse 1/8", 32768, "flash"): 5.0,
    ("sparse 1/8", 32768, "flex"): 1.2,
    ("dense", 32768, "flash"): 0.85,
    ("ssd", 8192, "flash"): 2.0,
    ("ssd", 16384, "flash"): 4.0,
    ("ssd", 8192, "mamba_ssm"): 1.0,
    ("ssd", 8192, "fla"): 1.0,
    ("decode", 32768, "copy"): 0.8,
}
Row = dict[str, Any]


def row(name: str, length: int, baseline: str, ratio: float) -> Row:
    """speed: the baseline's time over ours, so that more is better."""
    made = {"name": name, "length": length, "baseline": baseline, "speed": round(1 / ratio, 3)}
    bar = BARS.get((name, length, baseline))
    if bar is not None:
        made |= {"bar": bar, "met": made["speed"] >= bar}
    print(made, flush=True)
    return made


def compare(
    name: str, length: int, ours: kernels.Form, others: dict[str, kernels.Form]
) -> list[Row]:
    """Paired: ours against each of the others."""
    return [
        row(name, length, other, kernels.paired(form, {"ours": ours}, "cuda", 9)["ours"])
        for other, form in others.items()
    ]


def random_plan(length: int, density: float) -> BlockPlan:
    """Blocks of 128, at random below the diagonal and always on it, for every key head."""
    tiles = length // TILE
    g = torch.Generator().manual_seed(0)
    keep = torch.rand(1, SHAPE.key_heads, tiles, tiles, generator=g) < density
    keep |= torch.eye(tiles, dtype=torch.bool)
    return BlockPlan.from_blocks(keep.tril(), TILE, TILE, length, length).to("cuda")


def flex(plan: BlockPlan, length: int) -> Callable[..., Any]:
    """FlexAttention, compiled, with the blocks of `plan`."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    listed, full = (
        m.repeat_interleave(SHAPE.heads // SHAPE.key_heads, 1) for m in plan.blocks(length)
    )
    edge = listed & ~full

    def order(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = keep.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        return keep.sum(-1, dtype=torch.int32), first

    mask = BlockMask.from_kv_blocks(
        *order(edge),
        *order(full),
        BLOCK_SIZE=TILE,
        mask_mod=lambda b, h, q, k: q >= k,
        seq_lengths=(length, length),
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> kernels.Form:
    """torch's FlashAttention, causal; keys and values are repeated outside of the timing."""
    groups = SHAPE.heads // SHAPE.key_heads
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))

    def call() -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    return call


def ssd_peers(scan: dict[str, torch.Tensor]) -> dict[str, kernels.Form]:
    """The same recurrence in other libraries, where they are installed."""
    found: dict[str, kernels.Form] = {}
    if importlib.util.find_spec("mamba_ssm") is not None:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        found["mamba_ssm"] = lambda: mamba_chunk_scan_combined(*scan.values(), chunk_size=256)
    if importlib.util.find_spec("fla") is not None:
        from fla.ops.simple_gla import chunk_simple_gla

        groups = scan["x"].shape[2] // scan["B"].shape[2]
        C, B = (scan[n].repeat_interleave(groups, 2) for n in ("C", "B"))
        decay = scan["dt"] * scan["A"]
        value = (scan["x"] * scan["dt"][..., None]).to(C.dtype)
        found["fla"] = lambda: chunk_simple_gla(C, B, value, decay, scale=1.0)
    return found


def prefill(length: int) -> list[Row]:
    q, k, v = SHAPE.qkv(length, length)
    against, rows = flash(q, k, v), []
    for name, density in (("sparse 1/8", 1 / 8), ("dense", 1.0)):
        plan = random_plan(length, density)
        ours = partial(block_sparse_attention, q, k, v, plan)
        others = {"flash": against}
        if length in PEER_LENGTHS:
            others["flex"] = partial(flex(plan, length), q, k, v)
        rows += compare(name, length, ours, others)
    scan = SHAPE.scan(length)
    others = {"flash": against} | (ssd_peers(scan) if length in PEER_LENGTHS else {})
    return rows + compare("ssd", length, partial(ssd, **scan), others)


def captured(form: kernels.Form) -> kernels.Form:
    """The call as a CUDA graph: without the time that Python takes to launch it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        form()  # compiled here
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        form()
    return graph.replay


def decode(length: int) -> list[Row]:
    """Bytes of keys and values read a second, over those of a copy that reads and writes them."""
    q, k, v = SHAPE.qkv(1, length)
    pages = length // 64
    index = torch.arange(pages, dtype=torch.int32, device="cuda").expand(1, SHAPE.key_heads, -1)
    count = torch.full((1, SHAPE.key_heads), pages, dtype=torch.int32, device="cuda")
    plan = DecodePlan(index.contiguous(), count, 64)
    copy = torch.empty_like(k).copy_  # |k| read and |k| written: as many as the step reads
    ours = captured(partial(block_sparse_attention, q, k, v, plan))
    return compare("decode", length, ours, {"copy": captured(partial(copy, k))})


def model(length: int = 2048, steps: int = 64) -> list[Row]:
    """SmolLM2-135M in bfloat16: seconds of a prefill and of a token, ours over the eager graph."""
    from transformers import AutoModelForCausalLM

    import rewriter
    from rewriter.backends.triton import tune

    folder = Path.home() / ".cache/rewriter/assets/smollm2"
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    dense = rewriter.rewrite(original, {"steps": []}).to("cuda")
    ours = dense.to_triton()
    tokens = torch.randint(0, 1000, (1, length), device="cuda")
    with tune.tuning(), torch.no_grad():
        state = ours(input_ids=tokens, use_cache=True).past_key_values
    rows = []
    for phase in ("prefill", "decode"):
        ratios = []
        for _ in range(5):
            taken = []
            for each in (ours, dense):
                with torch.no_grad():
                    state = each(input_ids=tokens, use_cache=True).past_key_values
                    each(input_ids=tokens[:, :1], past_key_values=state)  # captured here
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    if phase == "prefill":
                        each(input_ids=tokens, use_cache=True)
                    else:
                        for _ in range(steps):
                            each(input_ids=tokens[:, :1], past_key_values=state)
                    torch.cuda.synchronize()
                    taken.append(time.perf_counter() - start)
            ratios.append(taken[0] / taken[1])
        rows.append(row(f"smollm2 {phase}", length, "eager", median(ratios)))
    return rows


def tests() -> None:
    """Exits when one fails."""
    paths = ["tests/kernels", "tests/backends/test_triton.py"]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *paths], cwd=ROOT)
    if done.returncode != 0:
        sys.exit("kernel tests fail: no benchmarks")


def slower_below(rows: list[Row]) -> dict[str, int | None]:
    """Length below which each loses to each baseline; None: it loses at every length."""
    names = {(r["name"], r["baseline"]) for r in rows if r["name"] != "decode"}
    return {
        f"{name} against {baseline}": kernels.crossover(
            [
                (r["length"], 1 / r["speed"])
                for r in rows
                if (r["name"], r["baseline"]) == (name, baseline)
            ]
        )
        for name, baseline in sorted(names)
    }


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("no GPU: benchmarks.kernels and benchmarks.aot run without one")
    parts = sys.argv[1:] or ["tests", "kernels", "peers", "model"]
    if "tests" in parts:
        tests()
    with torch.no_grad():
        if "kernels" in parts:
            kernels.write("cuda", *kernels.measure("cuda"))
        rows: list[Row] = []
        if "peers" in parts:
            for length in LENGTHS:
                rows += prefill(length)
            for length in (8192, 32768):
                rows += decode(length)
        rows += model() if "model" in parts else []
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "shape": f"{SHAPE.heads}/{SHAPE.key_heads} heads, width {SHAPE.width}, {SHAPE.dtype}",
        "slower_below": slower_below(rows),
        "rows": rows,
    }
    path = kernels.RESULTS / f"gpu-{kernels.short_name('cuda')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    missed = [r for r in rows if r.get("met") is False]
    print(path, "bars not met:", missed or "none")


if __name__ == "__main__":
    main()
