"""One call of torch's fused CPU attention that also gives its normaliser, and its backward."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extra: Tensor | None,
    scale: float,
    softcap: float,
    triangle: bool = False,
) -> tuple[Tensor, Tensor]:
    """Without autograd: output [B, H, L, Dv] and LSE [B, H, L] of query [B, H, L, D].

    key, value: [B, H, S, D], of any strides but the last, so that heads can share them without a
    copy. extra: added to the logits, [B, H, L, S]. triangle: causal, with L = S. A row that is
    hidden whole gives zeros and an LSE that means nothing.
    """
    key, value = (t.expand(*query.shape[:2], -1, -1) for t in (key, value))
    if _fused(query, key, value, softcap):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, triangle, attn_mask=extra, scale=scale
        )
    logits, _ = _logits(query, key, extra, scale, softcap, triangle)
    lse = torch.logsumexp(logits, -1)
    weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0)[..., None])
    return (weights @ value.to(weights.dtype)).to(query.dtype), lse


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extra: Tensor | None,
    scale: float,
    softcap: float,
    wants_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`attend` for a few rows, in plain products where they are float32: no tiles to fill.

    query: [N, R, D], key, value: [N, S, D], extra: [N, R, S]; output [N, R, Dv], LSE [N, R]. A
    row that is hidden whole gives zeros and -inf.
    """
    lse: Tensor | None = None
    if softcap == 0 and query.dtype in (torch.float32, torch.float64):
        logits = torch.bmm(query * scale, key.mT)
        if extra is not None:
            logits += extra
        weights = torch.softmax(logits, -1)
        output = torch.bmm(weights, value)
        if wants_lse:  # the greatest weight is exp(top - lse)
            lse = logits.amax(-1) - weights.amax(-1).log_()
    else:
        q, k, v, e = (None if t is None else t[:, None] for t in (query, key, value, extra))
        assert q is not None and k is not None and v is not None
        output, lse = (t[:, 0] for t in attend(q, k, v, e, scale, softcap))
    if extra is not None:
        empty = (extra == float("-inf")).all(-1)
        output = output.masked_fill(empty[..., None], 0)
        lse = None if lse is None else lse.masked_fill(empty, float("-inf"))
    return output, lse


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    delta: Tensor,
    extra: Tensor | None,
    scale: float,
    softcap: float,
    triangle: bool,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value (and of the logits, where `exact`), a part of all keys.

    output, lse: over all keys. delta: [B, H, L], sum(grad * output) less the gradient of the
    LSE; without `exact` it is the first alone.
    """
    key, value = (t.expand(*query.shape[:2], -1, -1) for t in (key, value))
    if _fused(query, key, value, softcap) and not exact:
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, output, lse, 0.0, triangle, attn_mask=extra, scale=scale
        )
        return dq, dk, dv, None
    logits, bent = _logits(query, key, extra, scale, softcap, triangle)
    wide = logits.dtype
    grad, query, key, value = (t.to(wide) for t in (grad, query, key, value))
    weights = torch.exp(logits - lse[..., None])
    slope = weights * (grad @ value.transpose(-1, -2) - delta[..., None])
    raw = slope if bent is None else slope * (1 - bent.square())
    raw_scaled = raw * scale
    return (
        raw_scaled @ key,
        raw_scaled.transpose(-1, -2) @ query,
        weights.transpose(-1, -2) @ grad,
        slope,
    )


def _fused(query: Tensor, key: Tensor, value: Tensor, softcap: float) -> bool:
    same = softcap == 0 and query.shape[-1] == value.shape[-1] and query.device.type == "cpu"
    return same and 0 not in query.shape and key.shape[2] > 0


def _logits(
    query: Tensor,
    key: Tensor,
    extra: Tensor | None,
    scale: float,
    softcap: float,
    triangle: bool,
) -> tuple[Tensor, Tensor | None]:
    """float32 (or float64) logits with everything in them, and the tanh of the soft-cap."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    logits = query.to(wide) @ key.to(wide).transpose(-1, -2) * scale
    bent = None
    if softcap > 0:
        bent = torch.tanh(logits / softcap)
        logits = softcap * bent
    if extra is not None:
        logits = logits + extra
    if triangle:
        rows, columns = logits.shape[-2:]
        hidden = torch.ones(rows, columns, dtype=torch.bool, device=query.device).triu(1)
        logits = logits.masked_fill(hidden, float("-inf"))
    return logits, bent
