"""Every kernel, compiled for GPUs that are not there: `python -m benchmarks.aot [op ...]`.

Writes benchmarks/results/aot.json, one entry a kernel and target, and beside it
aot.versions.json: versions, and a fingerprint of every compilation, so that a test can tell when
the table is stale and a second run measures only what has changed. Exits non-zero when a limit
is broken.
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from rewriter.backends.triton import compile as aot
from rewriter.errors import RewriterError
from rewriter.kernels.kernel import Compilation

RESULT = Path(__file__).parent / "results" / "aot.json"
VERSIONS = RESULT.with_suffix(".versions.json")


def read() -> tuple[dict[tuple[str, str], aot.Facts], dict[str, Any]]:
    """The committed table by kernel and target, and what stands beside it."""
    if not RESULT.exists() or not VERSIONS.exists():
        return {}, {"triton": "", "sources": {}}
    rows = json.loads(RESULT.read_text())
    table = {(r.pop("kernel"), r.pop("target")): aot.Facts(**r) for r in rows}
    return table, json.loads(VERSIONS.read_text())


def complaints(name: str, item: Compilation, target: str, table: dict, fresh: bool) -> list[str]:
    """Measure into the table unless it is there and fresh; the limits that are broken."""
    if not fresh or (name, target) not in table:
        try:
            table[name, target] = aot.measure(item, target)
        except RewriterError as error:
            table.pop((name, target), None)
            return [error.cause.splitlines()[-1]]
        print(f"{name:64} {target:7} {asdict(table[name, target])}", flush=True)
    return table[name, target].complaints(target, item.matrix_unit)


def write(table: dict[tuple[str, str], aot.Facts], sources: dict[str, str]) -> None:
    rows = [{"kernel": k, "target": t, **asdict(f)} for (k, t), f in sorted(table.items())]
    RESULT.write_text("[\n" + ",\n".join(" " + json.dumps(r) for r in rows) + "\n]\n")
    versions = {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "sources": dict(sorted(sources.items())),
    }
    VERSIONS.write_text(json.dumps(versions, indent=1) + "\n")


def main() -> int:
    items, broken = aot.compilations(*sys.argv[1:]), 0
    table, before = read()
    current = before["triton"] == triton.__version__
    sources = dict(before["sources"]) if current else {}
    asked = sys.argv[1:]  # what is no more of these ops, or of all, is dropped
    kept = lambda name: name in items or (asked and name.partition(".")[0] not in asked)  # noqa: E731
    table = {k: f for k, f in table.items() if kept(k[0])}
    sources = {n: f for n, f in sources.items() if kept(n)}
    for name, item in items.items():
        print_of = aot.fingerprint(item)
        fresh = sources.get(name) == print_of
        for target in item.targets or aot.TARGETS:
            for complaint in complaints(name, item, target, table, fresh):
                broken += 1
                print(f"{name:64} {target:7} BROKEN: {complaint}", flush=True)
        sources[name] = print_of
        write(table, sources)
    print(f"{len(table)} entries, {broken} limits broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
