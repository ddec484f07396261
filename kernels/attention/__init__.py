"""Softmax attention with its kind as literals: causal, window, chunk, sinks, soft-cap."""

from rewriter.kernels.attention.op import attention

__all__ = ["attention"]
