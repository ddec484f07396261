"""Our attention and mask functions for transformers' registries.

A dry run classifies every mask by probing its `mask_function` on a grid; the export run
replays the classes in call order, so that every attention becomes one node whose kind is
a set of literals. What cannot be classified keeps a dense mask: correct, not rewritable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from rewriter.errors import CaptureError
from rewriter.kernels.attention import attention as rewriter_attention

NAME = "rewriter"
GRID = 48

#: Keywords of the interface that cannot change the result of inference.
HARMLESS = {
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_ids",
    "position_embeddings",
    "return_dict",
    "use_cache",
    "labels",
    "num_items_in_batch",
    "token_type_ids",
    "logits_to_keep",
    "layer_idx",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "mm_token_type_ids",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "query_length",
    "key_length",
    "deterministic",
    "reduced_precision",
    "is_training",
    "inputs_embeds",
}


@dataclass(frozen=True)
class Kind:
    """What a mask means: literals of `rewriter::attention`, or a dense tensor."""

    causal: bool = False
    window: int = 0
    chunk: int = 0
    dense: bool = False


@dataclass
class Session:
    """One dry run and the export run that replays it."""

    recording: bool = True
    masks: list[Kind] = field(default_factory=list)
    cursor: int = 0
    kinds: dict[int, Kind] = field(default_factory=dict)  # id of a mask tensor -> its kind
    keep: list[Any] = field(default_factory=list)  # ids stay unique while tensors live

    def start_export(self) -> None:
        self.recording, self.cursor = False, 0
        self.kinds.clear()
        self.keep.clear()


_session: Session | None = None


@contextmanager
def session() -> Iterator[Session]:
    """Make `attn_implementation="rewriter"` work inside the block."""
    global _session
    if _session is not None:
        raise CaptureError("two captures at once in one process", "capture one model at a time")
    _session = Session()
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    try:
        yield _session
    finally:
        _session = None


def classify(function: Callable[..., Any] | None) -> Kind:
    """Kind of a transformers `mask_function(batch, head, query, key)` by evaluating it."""
    if function is None:
        return Kind(dense=True)
    with torch.device("cpu"):  # a model on the meta device is captured under another default
        return _classify(function)


def _classify(function: Callable[..., Any]) -> Kind:
    index = torch.arange(GRID)
    query, key = index[:, None].expand(GRID, GRID), index[None, :].expand(GRID, GRID)
    zero = torch.zeros((), dtype=torch.long)
    try:
        grid = function(zero, zero, query, key)
    except Exception:  # an index outside a data-dependent table, for example
        return Kind(dense=True)
    grid = torch.as_tensor(grid).bool().expand(GRID, GRID)
    distance = query - key
    causal = not bool((grid & (distance < 0)).any())
    base = distance >= 0 if causal else torch.ones_like(grid)
    if torch.equal(grid, base):
        # A window or chunk wider than the grid would look the same: ask far away.
        far = torch.tensor([0, 1, 7, 100, 1000, 4096, 10_000, 100_000])
        try:
            ask = function(zero, zero, torch.tensor(1_000_000), 1_000_000 - far)
        except Exception:
            return Kind(dense=True)
        if bool(torch.as_tensor(ask).bool().all()):
            return Kind(causal=causal)
        return _wide(function, causal)
    for window in range(1, GRID):
        if torch.equal(grid, base & (distance.abs() < window)):
            return Kind(causal=causal, window=window)
    for chunk in range(1, GRID):
        if torch.equal(grid, base & (query // chunk == key // chunk)):
            return Kind(causal=causal, chunk=chunk)
    return Kind(dense=True)


def _wide(function: Callable[..., Any], causal: bool) -> Kind:
    """A window or chunk wider than the grid, found by bisection and then checked."""
    zero = torch.zeros((), dtype=torch.long)

    def sees(query: int, key: int) -> bool:
        answer = function(zero, zero, torch.tensor(query), torch.tensor(key))
        return bool(torch.as_tensor(answer).all())

    origin, low, high = 1_000_000, 0, 1_000_000
    while high - low > 1:  # largest visible distance from `origin`
        middle = (low + high) // 2
        low, high = (middle, high) if sees(origin, origin - middle) else (low, middle)
    window = low + 1
    if all(sees(q, q - low) and not sees(q, q - low - 1) for q in (500_000, 777_777)):
        return Kind(causal=causal, window=window)
    first = next((q for q in range(1, 200_000) if not sees(q, 0)), 0)
    if first and sees(2 * first - 1, first) and not sees(2 * first, first):
        return Kind(causal=causal, chunk=first)
    return Kind(dense=True)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Keep the padding mask [B, T]; the op itself does causal, window and chunk."""
    assert _session is not None
    if _session.recording:
        kind = classify(mask_function)
        _session.masks.append(kind)
    else:
        if _session.cursor >= len(_session.masks):
            raise CaptureError("the model builds another number of masks when it is exported")
        kind = _session.masks[_session.cursor]
        _session.cursor += 1
    if kind.dense:
        kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        if mask_function is not None:
            kwargs["mask_function"] = mask_function
        result = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            **kwargs,
        )
    elif attention_mask is not None:
        result = attention_mask.view(attention_mask.shape)  # its own tensor, its own kind
    else:
        device = kwargs.get("device", "cpu")
        result = torch.ones((batch_size, kv_length), dtype=torch.bool, device=device)
    _session.kinds[id(result)] = kind
    _session.keep.append(result)
    return result


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The interface's attention function: one node, its kind as literals."""
    assert _session is not None
    unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in HARMLESS)
    if unknown:
        raise CaptureError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention, "
            "which rewriter does not know and must not ignore",
            "add it to the attention op, or to HARMLESS if it cannot change the result",
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    bias, mask, kind = position_bias, attention_mask, Kind()
    if mask is None:
        kind = Kind(
            causal=bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        )
    elif id(mask) in _session.kinds:
        kind = _session.kinds[id(mask)]
    elif mask.dim() == 4 and mask.is_floating_point():
        bias, mask = (mask if bias is None else bias + mask), None
    elif mask.dim() == 4:
        kind = Kind(dense=True)
    elif mask.dim() != 2:
        raise CaptureError(f"{type(module).__name__} gives a mask of {mask.dim()} dimensions")
    if mask is not None and mask.dtype != torch.bool:
        mask = mask != 0
    output = rewriter_attention(
        query,
        key,
        value,
        mask,
        bias,
        s_aux,
        None,
        float(scale),
        kind.causal,
        kind.window,
        kind.chunk,
        0,
        float(softcap or 0.0),
    )
    return output, None
