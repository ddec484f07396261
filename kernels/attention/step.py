"""One query, the last position: heads of a group are rows of one product."""

from __future__ import annotations

from torch import Tensor

from rewriter.kernels.attention import reference
from rewriter.kernels.attention.arguments import Arguments
from rewriter.kernels.attention.fused import attend_rows
from rewriter.kernels.attention.pieces import additive


def step(given: Arguments, wants_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Output [B, 1, H, Dv] and LSE [B, H, 1] without the learned sink."""
    query, key, value = given.query, given.key, given.value
    (batch, heads, _, width), groups, keys = query.shape, given.groups, given.keys
    seen, extra = _seen(given), None
    if seen is not None or given.bias is not None:
        extra = additive(given.bias, seen, query)
        extra = extra.expand(batch, heads, 1, keys).reshape(batch * groups, -1, keys)
    q = query.reshape(batch * groups, heads // groups, width)
    output, lse = attend_rows(
        q, key.flatten(0, 1), value.flatten(0, 1), extra, given.scale, given.softcap, wants_lse
    )
    lse = None if lse is None else lse.view(batch, heads, 1)
    return output.view(batch, 1, heads, -1), lse


def _seen(given: Arguments) -> Tensor | None:
    """Which keys the query sees, [B or 1, H or 1, 1, S], or None where it sees all."""
    padding, places, keys = given.padding, given.key_positions, given.keys
    if padding is not None and bool(padding.all()):
        padding = None
    window = given.window if places is not None or given.window < keys else 0
    if window and places is not None:
        ring = places[:, given.sinks :]  # behind the sinks
        low, high = ring.aminmax() if ring.numel() else (0, 0)
        if int(high - low) < window:
            window = 0  # all of it is in reach, as a cache of the window's size keeps it
    if padding is None and given.dense is None and not (window or given.chunk):
        return None
    mask = padding if padding is not None else given.dense
    return reference.visible(
        1, keys, mask, places, given.causal, window, given.chunk, given.sinks, given.query.device
    )
