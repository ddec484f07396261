"""Triton: the graph on a GPU, its kernels compiled ahead of time.

Nothing here has run on a GPU: without one the kernels are compiled for it and their numbers
checked in Triton's interpreter; Inductor's fusion and the CUDA graph of a decode step have only
been run as ordinary torch on a CPU.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from rewriter.errors import RewriterError
from rewriter.export import register_backend

__all__ = ["export_triton", "load", "to_triton"]


def export_triton(model: Any, folder: str | Path, **options: Any) -> dict[str, Any]:
    """`rewriter.backends.triton.export.export_triton`, imported when triton is there."""
    _require()
    from rewriter.backends.triton import export

    return export.export_triton(model, folder, **options)


def to_triton(model: Any, **options: Any) -> Any:
    """`rewriter.backends.triton.export.to_triton`, imported when triton is there."""
    _require()
    from rewriter.backends.triton import export

    return export.to_triton(model, **options)


def load(folder: str | Path, **options: Any) -> Any:
    """`rewriter.backends.triton.export.load`, imported when triton is there."""
    _require()
    from rewriter.backends.triton import export

    return export.load(folder, **options)


def _require() -> None:
    if importlib.util.find_spec("triton") is None:
        raise RewriterError("the Triton backend needs triton", "pip install rewriter[triton]")


register_backend("triton", export_triton, to_triton)
