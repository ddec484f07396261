"""Compile kernels for GPUs that are not there, and say what came out.

A compilation happens in a forked child with a time limit: ptxas can take minutes on a bad tile,
and a crash of LLVM must not take the caller along. Its facts lie beside the binary in Triton's
cache, so that the same source is compiled once.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import pkgutil
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import rewriter.kernels
from rewriter.errors import RewriterError
from rewriter.kernels.kernel import Compilation, Kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Bytes of shared memory that one program may use. Triton does not check it ahead of time.
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
#: Bytes of registers a thread may spill (gfx942: of vector registers).
SPILL_LIMIT = {"sm_80": 64, "sm_90": 0, "sm_100": 64, "gfx942": 0}
SECONDS_LIMIT = 20.0
MATRIX_UNIT = {"cuda": r"wgmma|mma\.sync|tcgen05\.mma", "hip": r"v_mfma"}
#: Inside the checkout, where git ignores it.
CACHE = Path(__file__).resolve().parents[2] / "build" / "triton-cache"


def target_named(name: str) -> GPUTarget:
    """Raises RewriterError for a target that is not in `TARGETS`."""
    if name not in TARGETS:
        raise RewriterError(f"unknown target '{name}'", f"use one of: {', '.join(TARGETS)}")
    return TARGETS[name]


@dataclass(frozen=True)
class Facts:
    """What a compiled kernel needs. registers and spill_bytes are per thread."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    compile_s: float
    matrix_unit: bool

    def complaints(self, target: str, matrix_unit: bool) -> list[str]:
        """One sentence for every limit of `target` that is broken."""
        found = []
        if self.spill_bytes > SPILL_LIMIT[target]:
            found.append(f"spills {self.spill_bytes} bytes, allowed {SPILL_LIMIT[target]}")
        if self.shared_bytes > SHARED_LIMIT[target]:
            found.append(f"uses {self.shared_bytes} bytes shared, {SHARED_LIMIT[target]} exist")
        if self.compile_s > SECONDS_LIMIT:
            found.append(f"took {self.compile_s:.1f} s to compile, allowed {SECONDS_LIMIT:g}")
        if matrix_unit and not self.matrix_unit:
            found.append("does not use the matrix unit")
        return found


def compilations(*ops: str) -> dict[str, Compilation]:
    """`op.kernel[case]` to compilation, of every op that has a Triton form (or of `ops`)."""
    found: dict[str, Compilation] = {}
    for module in pkgutil.iter_modules(rewriter.kernels.__path__):
        name = f"rewriter.kernels.{module.name}"
        if not module.ispkg or (ops and module.name not in ops):
            continue
        if importlib.util.find_spec(f"{name}.triton") is None:
            continue
        for item in importlib.import_module(f"{name}.triton").compilations():
            key = f"{module.name}.{item.kernel.fn.__name__}[{item.case}]"
            if key in found:
                raise ValueError(f"two compilations are called {key}")
            found[key] = item
    return found


def source_hash(kernel: Kernel) -> str:
    """Hash of the kernel's text and of the text of every kernel that it calls."""
    texts: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        item = waiting.pop()
        name = f"{item.fn.__module__}.{item.fn.__qualname__}"
        if name in texts:
            continue
        texts[name] = item.src
        used = (item.fn.__globals__.get(n) for n in item.fn.__code__.co_names)
        waiting += [k for k in used if isinstance(k, Kernel)]
    return hashlib.sha256(json.dumps(sorted(texts.items())).encode()).hexdigest()


def fingerprint(item: Compilation) -> str:
    """Hash of all that decides what a compilation makes, but for the compiler."""
    made = [item.signature, item.constants, sorted(item.aligned), item.options, item.matrix_unit]
    text = source_hash(item.kernel) + json.dumps(made, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def source(item: Compilation) -> ASTSource:
    """What Triton compiles: types, constants and alignments of one `Compilation`."""
    names = item.kernel.arg_names
    unknown = {*item.signature, *item.constants, *item.aligned} - set(names)
    if unknown:
        raise ValueError(f"{item.kernel.fn.__name__} has no arguments {sorted(unknown)}")
    signature = {
        n: "constexpr" if n in item.constants else item.signature.get(n, "i32") for n in names
    }
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in item.aligned}
    constants = {(names.index(n),): v for n, v in item.constants.items()}
    return ASTSource(fn=item.kernel, signature=signature, constexprs=constants, attrs=attributes)


def measure(item: Compilation, target: str, cache: Path = CACHE) -> Facts:
    """Compile in a child process. Raises RewriterError: too slow, or the compiler failed."""
    gpu, limit = target_named(target), 3 * SECONDS_LIMIT
    return Facts(**in_child(lambda: compiled(source(item), gpu, item.options, cache)[1], limit))


def compiled(
    src: ASTSource, target: GPUTarget, options: dict[str, Any], cache: Path
) -> tuple[Any, dict[str, Any]]:
    """Triton's compiled kernel and its `Facts` as a dictionary, in this process."""
    with knobs.cache.scope(), knobs.compilation.scope(), knobs.nvidia.scope():
        knobs.cache.dir = str(cache)
        knobs.nvidia.dump_ptxas_log = True  # on stdout: the only place that has spilled bytes
        hits: list[bool] = []
        knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        log, start = io.StringIO(), time.perf_counter()
        with contextlib.redirect_stdout(log):
            made = triton.compile(src, target=target, options=options)
            path = Path(next(iter(made.metadata_group.values()))).with_name("facts.json")
            if hits[-1] and path.exists():
                return made, json.loads(path.read_text())
            if hits[-1]:  # compiled by someone who kept no facts
                knobs.compilation.always_compile = True
                start = time.perf_counter()
                made = triton.compile(src, target=target, options=options)
        facts = _facts(made, target, log.getvalue(), time.perf_counter() - start)
        path.write_text(json.dumps(facts))
        return made, facts


def _facts(made: Any, target: GPUTarget, log: str, seconds: float) -> dict[str, Any]:
    if target.backend == "cuda":
        assembly = made.asm["ptx"]
        registers = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", log))
    else:
        assembly = made.asm["amdgcn"]
        read = lambda name: int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[0])  # noqa: E731
        registers, spilled = read("vgpr_count"), 4 * read("vgpr_spill_count")
    return {
        "registers": registers,
        "spill_bytes": spilled,
        "shared_bytes": int(made.metadata.shared),
        "compile_s": round(seconds, 2),
        "matrix_unit": re.search(MATRIX_UNIT[target.backend], assembly) is not None,
    }


def in_child(work: Callable[[], Any], seconds: float) -> Any:
    """`work()` in a forked child; its result must be picklable.

    Raises RewriterError: it failed, or it took longer than `seconds`.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def run() -> None:
        try:
            there.send((True, work()))
        except BaseException as error:
            there.send((False, f"{type(error).__name__}: {error}"[:2000]))
        os._exit(0)  # nothing of the parent's to clean up here

    child = context.Process(target=run)
    child.start()
    there.close()
    try:
        if not here.poll(seconds):
            raise RewriterError(f"took longer than {seconds:g} s", "use smaller tiles")
        good, value = here.recv()
    except EOFError:
        child.join()
        raise RewriterError(f"the compiler died with exit code {child.exitcode}") from None
    finally:
        child.kill()
        child.join()
    if not good:
        raise RewriterError(value)
    return value
