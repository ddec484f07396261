"""Softmax attention with its kind as literals: causal, window, chunk, sinks, soft-cap."""

from rewriter.kernels.attention.merge import merge, with_sink
from rewriter.kernels.attention.op import attention, attention_with_lse

__all__ = ["attention", "attention_with_lse", "merge", "with_sink"]
