"""ONNX: the threaded graph as one file that ONNX Runtime runs, prefill and decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rewriter.backends.onnx import check
from rewriter.export import register_backend

__all__ = ["export_onnx"]


def export_onnx(model: Any, folder: str | Path, **options: Any) -> dict[str, Any]:
    """`rewriter.backends.onnx.export.export_onnx`, imported when the packages are there."""
    check.require()
    from rewriter.backends.onnx import export

    return export.export_onnx(model, folder, **options)


register_backend("onnx", export_onnx)
