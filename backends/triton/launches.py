"""What a model launches: recorded without a GPU, compiled for one, stored, and found again there.

Triton keeps a compiled kernel under a hash of its source, its specialisation and the compiler.
The specialisation is that of a launch (which sizes are 1 or multiples of 16, which pointers are
aligned). So we record launches, let Triton itself specialise them for the target, compile, and
store the entries of its cache; where they are put back, the first launch finds them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import FileCacheManager
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from rewriter.backends.triton import compile as aot
from rewriter.errors import RewriterError
from rewriter.kernels.kernel import (
    CONFIGURATIONS,
    OBSERVERS,
    Kernel,
    launch_key,
    recording_for,
)

BINARY = {"cuda": "cubin", "hip": "hsaco"}
INDEX = "index.json"


@dataclass(frozen=True)
class Pointer:
    """Stands for a tensor: all that a specialisation looks at."""

    dtype: torch.dtype
    offset: int  # of the address, from a multiple of 16

    def data_ptr(self) -> int:
        return self.offset


@dataclass(frozen=True)
class Launch:
    """One call of a kernel; tensors are `Pointer`s."""

    kernel: Kernel
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    @property
    def key(self) -> str:
        return launch_key(self.kernel, self.args, dict(self.kwargs))


@contextmanager
def recording(target: str) -> Iterator[dict[Launch, int]]:
    """Collect what `target` would launch, with the number of each, and run nothing: outputs stay
    what they were (`torch.empty` gives zeros, so that no index is wild)."""
    found: dict[Launch, int] = {}

    def observe(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        given = tuple((k, _pointer(v)) for k, v in sorted(kwargs.items()))
        launch = Launch(kernel, tuple(map(_pointer, args)), given)
        found[launch] = found.get(launch, 0) + 1
        return True

    OBSERVERS.append(observe)
    try:
        with recording_for(target), _Zeros():
            yield found
    finally:
        OBSERVERS.remove(observe)


def _pointer(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer(value.dtype, value.data_ptr() % 16)
    return value


class _Zeros(TorchDispatchMode):
    """`empty` is `zeros`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("empty", "new_empty", "empty_like", "empty_strided"):
            made.zero_()
        return made


# ---- for a target ------------------------------------------------------------------------------


class _Absent:
    """The driver of a GPU that is not there: enough to specialise and to look in the cache."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return f"{self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextmanager
def pretending(target: GPUTarget) -> Iterator[Any]:
    """Triton takes `target` for the GPU of this machine; nothing can be launched."""
    before = driver._active
    driver.set_active(_Absent(target))  # type: ignore[arg-type]
    try:
        yield driver.active
    finally:
        driver._active = before


def specialise(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton would compile for this launch on `target`: source and options."""
    kernel, seen = launch.kernel, []
    with pretending(target) as absent:
        device = absent.get_current_device()
        kernel.device_caches.pop(device, None)
        kernel.device_caches[device]  # sets the compiler that is replaced here
        original = kernel.compile
        kernel.compile = lambda src, target, options, **_: seen.append((src, dict(options)))
        try:
            warm(launch)
        finally:
            kernel.compile = original
            kernel.device_caches.pop(device, None)
    return seen[0]


def warm(launch: Launch) -> Any:
    """Compile the launch for the current GPU, or find it in Triton's cache; returns the kernel."""
    kwargs = dict(launch.kwargs) | CONFIGURATIONS.get(launch.key, {})
    return JITFunction.run(launch.kernel, *launch.args, grid=(1,), warmup=True, **kwargs)


def build(launches: list[Launch], name: str, folder: Path, cache: Path) -> list[dict[str, Any]]:
    """Compile launches for the target `name` and store them in `folder`; returns the index.

    An entry: {key, name, kernel, case, source, signature, constants, aligned, options, and the
    fields of `compile.Facts`}.

    Raises RewriterError: a kernel does not compile or needs more shared memory than there is.
    """
    target, entries = aot.target_named(name), {}
    for launch in launches:
        source, options = specialise(launch, target)
        where = f"{launch.kernel.fn.__module__}.{launch.kernel.fn.__qualname__}"
        files, facts = aot.in_child(
            lambda s=source, o=options: _compile(s, target, o, cache), 3 * aot.SECONDS_LIMIT
        )
        if facts["shared_bytes"] > aot.SHARED_LIMIT[name]:
            raise RewriterError(
                f"{where} needs {facts['shared_bytes']} bytes of shared memory on {name}, "
                f"which has {aot.SHARED_LIMIT[name]}",
                "export in a narrower dtype, or for another target",
            )
        metadata = next(p for p in files if p.suffix == ".json")
        entries[metadata.parent.name] = {
            "key": metadata.parent.name,
            "name": metadata.stem,
            "kernel": where,
            "source": aot.source_hash(launch.kernel),
            "signature": {k: str(v) for k, v in source.signature.items()},
            "constants": {source.fn.arg_names[k[0]]: str(v) for k, v in source.constants.items()},
            "aligned": [source.fn.arg_names[k[0]] for k, v in source.attrs.items() if v],
            "options": {k: options[k] for k in ("num_warps", "num_stages", "num_ctas")},
            **facts,
        }
        for file in files:
            if file.suffix.removeprefix(".") in (BINARY[target.backend], "json"):
                place = folder / metadata.parent.name
                place.mkdir(parents=True, exist_ok=True)
                (place / file.name).write_bytes(file.read_bytes())
    index = sorted(entries.values(), key=lambda e: (e["kernel"], e["key"]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).write_text(
        json.dumps({"triton": triton.__version__, "target": name, "kernels": index}, indent=1)
    )
    return index


def _compile(
    source: ASTSource, target: GPUTarget, options: dict[str, Any], cache: Path
) -> tuple[list[Path], dict[str, Any]]:
    made, facts = aot.compiled(source, target, options, cache)
    return [Path(p) for p in made.metadata_group.values()], facts


def install(folder: Path) -> dict[str, Any]:
    """Put the stored kernels of `folder` (one target's) into Triton's cache, if it is ours to use.

    Returns: {target, kernels: how many, and why: a sentence if none are used}.
    """
    stored = json.loads((folder / INDEX).read_text())
    found = {"target": stored["target"], "kernels": 0, "why": ""}
    if stored["triton"] != triton.__version__:
        found["why"] = (
            f"compiled by triton {stored['triton']}, this is {triton.__version__}: "
            "kernels are compiled when they are first used"
        )
        return found
    for entry in stored["kernels"]:
        cache = FileCacheManager(entry["key"])
        group = {
            file.name: cache.put(file.read_bytes(), file.name)
            for file in sorted((folder / entry["key"]).iterdir())
        }
        cache.put_group(f"{entry['name']}.json", group)
        found["kernels"] += 1
    return found


def current_target() -> str | None:
    """Name of the target that this machine's GPU is, or None."""
    if not torch.cuda.is_available():
        return None
    found = driver.active.get_current_target()
    for name, target in aot.TARGETS.items():
        if (target.backend, target.arch) == (found.backend, found.arch):
            return name
    return None
