"""The `liger` variant of the `hybrid_linear` pass: gated linear attention beside a window.

Source: LIGER, Lan et al., arXiv 2503.01496. Its gate is the key itself (the published pooling is
the identity at the published sizes).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

import rewriter.kernels.linear_attention  # noqa: F401  registers the op
from rewriter.errors import VerifyError
from rewriter.graph import ATTENTION, ATTENTION_ARGS, Attention, Graph, argument, aten
from rewriter.kernels.attention import reference as softmax_reference
from rewriter.kernels.linear_attention import reference as linear_reference
from rewriter.passes._region import ROLES as NAMES
from rewriter.passes._region import Caller, Region, find_region

LINEAR_ATTENTION = torch.ops.rewriter.linear_attention.default
ROLES = tuple(f"{name}_projection" for name in NAMES)


def reason(a: Attention) -> str | None:
    """Why this attention has no queries and keys before their positions, or None."""
    found = find_region(a)
    if isinstance(found, str):
        return found
    if any(found.projection(n).node.meta["val"].dim() != 3 for n in NAMES):
        return "its projections flatten batch and length, and the linear branch needs both"
    return None


def region_of(a: Attention) -> Region:
    found = find_region(a)
    assert isinstance(found, Region), found
    return found


def reads(region: Region) -> dict[str, str]:
    """Names of the nodes that `expected` needs besides the attention's own, by role."""
    return {f"{n}_projection": region.projection(n).node.name for n in NAMES}


def _branch(call: Any, rows: dict[str, Any], region: Region, c: Any) -> list[Any]:
    """q, k, v [B, L, heads, D] and the log decay of the linear branch; nodes or tensors."""

    def heads(name: str) -> Any:
        value, chosen = rows[f"{name}_projection"], region.rows[name]
        number = region.heads if name == "query" else region.kv_heads
        width = value.meta["val"].shape[2] if isinstance(value, Node) else value.shape[2]
        if not torch.equal(chosen.cpu(), torch.arange(int(width))):  # a part of a fused one
            value = call(aten.index_select.default, value, 2, index(name))
        return call(aten.unflatten.int, value, 2, [number, region.width])

    def index(name: str) -> Any:
        rows = region.rows[name]
        return call.tensor(f"{name}_rows", rows) if isinstance(call, Caller) else rows

    query, key, value = (heads(name) for name in NAMES)
    softplus = call(aten.softplus.default, call(aten.neg.default, key))
    decay = call(aten.div.Tensor, softplus, -c.gate_normaliser)
    return [*(call(aten.softmax.int, t, -1) for t in (query, key)), value, decay]


def build(call: Any, a: Attention, mask: Node | None, c: Any) -> Node:
    """Append the two branches and their mean; mask: [B, L] of this call's tokens."""
    region = region_of(a)
    rows = {f"{n}_projection": region.projection(n).node for n in NAMES}
    linear = call(
        LINEAR_ATTENTION, *_branch(call, rows, region, c), None, 1.0, False, None, None, mask
    )
    linear = call(operator.getitem, linear, 0)
    given = {n: argument(a.node, n) for n in ATTENTION_ARGS}
    near = call(ATTENTION, *({**given, "window": c.window, "sinks": c.sinks}.values()))
    near = call(aten.mul.Tensor, near, 1 - c.mix)
    return call(aten.add.Tensor, near, call(aten.mul.Tensor, linear, c.mix))


def check(graph: Graph, name: str, masked: bool, c: Any) -> None:
    """Both branches leave out padding, and the linear one starts without a past."""
    nodes = [n for n in graph.nodes if n.meta.get("path") == f"{name}.hybrid_linear"]
    linear = [n for n in nodes if n.target is LINEAR_ATTENTION]
    near = [n for n in nodes if n.target is ATTENTION]
    if len(linear) != 1 or len(near) != 1:
        raise VerifyError(f"{name} has {len(linear)} linear and {len(near)} softmax branches")
    if argument(linear[0], "state") is not None:
        raise VerifyError(f"{linear[0].name} starts with a past")
    for node in (*linear, *near):
        if (argument(node, "mask") is not None) != masked:
            raise VerifyError(f"{node.name}: its mask is wrong after the rewrite")
    if (argument(near[0], "window"), argument(near[0], "sinks")) != (c.window, c.sinks):
        raise VerifyError(f"{near[0].name}: its window is wrong after the rewrite")


def expected(
    region: Region,
    rows: dict[str, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    c: Any,
) -> Tensor:
    """One token after another, in float64, from the original's projections.

    Args:
        rows: the projections' outputs [B, L, features]. query, key, value: the attention's
            inputs. mask: [B, S], whose last L columns are these tokens.
    """
    call = lambda target, *args: target(*args)  # noqa: E731
    now = None if mask is None else mask[:, mask.shape[1] - query.shape[2] :]
    q, k, v, decay = _branch(call, rows, region, c)
    linear, *_ = linear_reference.linear_attention(q, k, v, decay, mask=now)
    near = softmax_reference.attention(
        query, key, value, mask, None, None, None, scale, True, c.window, 0, c.sinks, 0.0
    )
    return (1 - c.mix) * near + c.mix * linear
