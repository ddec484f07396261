"""`rewriter.export(model, folder, to="onnx")`: hand a rewritten model to a backend."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewriter.errors import RewriterError
from rewriter.plugins import discover

#: A backend: (model, folder, **options) -> what it did, as a dictionary that JSON can hold.
Backend = Callable[..., dict[str, Any]]

BACKENDS: dict[str, Backend] = {}
#: Backends that make a model in memory: (model, **options) -> model.
CONVERTERS: dict[str, Callable[..., Any]] = {}


def register_backend(
    name: str, function: Backend, convert: Callable[..., Any] | None = None
) -> None:
    """Make `function` answer to `export(..., to=name)`, `convert` to `convert(..., to=name)`."""
    BACKENDS[name] = function
    if convert is not None:
        CONVERTERS[name] = convert


def backends() -> dict[str, Backend]:
    """All known backends by name: this package's and those of `rewriter.backends` entry points.

    The packages register themselves when they are imported; one that is not there is no error.
    """
    discover("rewriter.backends")
    return dict(sorted(BACKENDS.items()))


def _of_one_type(model: Any) -> None:
    """Raises RewriterError for a graph that runs under autocast, which no other runtime has."""
    narrow = getattr(model.config, "autocast", None)
    if narrow is not None:
        raise RewriterError(
            f"this model was captured in float32 and its matrices were made {narrow} later",
            f"use model.float(), or rewrite the original loaded with dtype=torch.{narrow}",
        )


def export(model: Any, folder: str | Path, to: str = "onnx", **options: Any) -> dict[str, Any]:
    """Write `model` for another runtime.

    Args:
        model: a RewrittenModel, or the folder of one.
        folder: where to; it appears whole or not at all, and must not hold anything yet.
        to: name of a backend.
        options: the backend's own.

    Returns: what the backend reports (files, bytes, measured error, fallbacks with reasons).

    Raises:
        RewriterError: unknown backend, a missing dependency, or a folder that is in use.
        GateError: the exported model does not compute what the graph does; nothing was written.
    """
    known = backends()
    if to not in known:
        raise RewriterError(f"unknown backend '{to}'", f"use one of: {', '.join(known)}")
    if isinstance(model, (str, Path)):
        model = importlib.import_module("rewriter.model").load(model)
    _of_one_type(model)
    return known[to](model, Path(folder), **options)


def convert(model: Any, to: str, **options: Any) -> Any:
    """`model` for another runtime, in memory. Raises RewriterError as `export`."""
    backends()
    if to not in CONVERTERS:
        known = ", ".join(sorted(CONVERTERS))
        raise RewriterError(f"'{to}' makes no model in memory", f"use one of: {known}")
    _of_one_type(model)
    return CONVERTERS[to](model, **options)
