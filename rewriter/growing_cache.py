"""A cache for capture: it makes a model build positions, masks and biases for a past.

Models count positions from `past_key_values.get_seq_length()` and size masks and biases by the
keys that `update` returns. With this cache both come from the length of the padding mask, so
that one graph serves prefill and decode; the pass of `state.py` later adds the real past.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache


@torch.library.custom_op("rewriter::grow", mutates_args=())
def grow(value: Tensor, total: int) -> Tensor:
    """Keys or values [B, H, L, D] with their past: [B, H, total, D]. Exists in capture only."""
    if value.shape[2] != total:
        raise RuntimeError("a graph with rewriter::grow in it cannot run: capture removes it")
    return value.clone()


@grow.register_fake
def _(value: Tensor, total: int) -> Tensor:
    return value.new_empty((*value.shape[:2], total, value.shape[3]))


GROW = torch.ops.rewriter.grow.default


class GrowingCache(Cache):
    """Says that `total - new` tokens were before the `new` ones of this call."""

    def __init__(self, total: Any, new: Any) -> None:
        super().__init__(layers=[])
        self.total, self.past = total, total - new

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return grow(key_states, self.total), grow(value_states, self.total)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.past

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.past

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[Any, int]:
        return self.total, 0


class _Passing(Cache):
    """Cross attention: keys and values as they are."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return key_states, value_states


def growing_cache(total: Any, new: Any, encoder_decoder: bool) -> Cache:
    """The cache to give to a model while it is exported."""
    cache = GrowingCache(total, new)
    return EncoderDecoderCache(cache, _Passing()) if encoder_decoder else cache
