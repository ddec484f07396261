"""Warps and pipeline stages measured on the GPU at hand, for every kind of launch of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import triton.testing
from triton.runtime.jit import JITFunction

from rewriter.backends.triton.launches import Launch
from rewriter.kernels.kernel import CONFIGURATIONS, Kernel, launch_key

FILE = "configurations.json"
TUNED = ("num_warps", "num_stages")


def candidates(given: dict[str, Any]) -> list[dict[str, int]]:
    """The launch's own options first, then those next to them."""
    warps, stages = int(given.get("num_warps", 4)), int(given.get("num_stages", 3))
    pairs = [
        (w, s)
        for w in (warps, warps // 2, warps * 2)
        for s in (stages, stages - 1, stages + 1)
        if 1 <= w <= 16 and s >= 1
    ]
    return [dict(zip(TUNED, pair, strict=True)) for pair in pairs]


@contextmanager
def tuning(bench: Callable[[Callable[[], Any]], float] | None = None) -> Iterator[None]:
    """Inside, the first launch of each kind on a GPU is timed with every candidate.

    What the launches compute then is not to be used: they run many times. bench: seconds of a
    call; Triton's own by default.
    """
    bench = bench or (lambda call: float(triton.testing.do_bench(call, warmup=5, rep=20)))
    original = Kernel.run

    def run(self: Kernel, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        key = launch_key(self, args, kwargs)
        if key not in CONFIGURATIONS:
            CONFIGURATIONS[key] = _best(self, args, grid, kwargs, bench)
        return original(self, *args, grid=grid, warmup=warmup, **kwargs)

    Kernel.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        Kernel.run = original  # type: ignore[method-assign]


def _best(
    kernel: Kernel,
    args: tuple[Any, ...],
    grid: Any,
    kwargs: dict[str, Any],
    bench: Callable[[Callable[[], Any]], float],
) -> dict[str, int]:
    times = {}
    for number, options in enumerate(found := candidates(kwargs)):
        given = {**kwargs, **options, "grid": grid, "warmup": False}
        try:
            times[number] = bench(partial(JITFunction.run, kernel, *args, **given))
        except (triton.runtime.errors.OutOfResources, RuntimeError):
            if number == 0:
                raise  # the launch itself does not work
    return found[min(times, key=times.__getitem__)]


def describe(found: Iterable[Launch]) -> dict[str, Any]:
    """What the file holds: for every kind of launch its options, and whether they were measured."""
    rows = {}
    for launch in found:
        given = {k: v for k, v in launch.kwargs if k in TUNED}
        tuned = CONFIGURATIONS.get(launch.key)
        rows[launch.key] = {
            "launch": launch.key,
            "options": given if tuned is None else tuned,
            "tuned": tuned is not None,
        }
    return {"launches": [rows[k] for k in sorted(rows)]}


def use(stored: dict[str, Any]) -> None:
    """Take the measured configurations of a folder."""
    CONFIGURATIONS.update(
        {row["launch"]: row["options"] for row in stored["launches"] if row["tuned"]}
    )
