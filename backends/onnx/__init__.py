"""ONNX: the threaded graph as one file that ONNX Runtime runs, prefill and decode."""

from rewriter.backends.onnx.export import export_onnx
from rewriter.export import register_backend

__all__ = ["export_onnx"]

register_backend("onnx", export_onnx)
