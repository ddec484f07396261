"""Feature maps and far gates of the `hybrid_linear` pass: their form and their closed start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.graph import aten

#: Maps with a matrix of their own; the others have as many features as a head is wide.
LEARNED = ("centroid", "hedgehog_split", "hedgehog_joint", "t2r")
LIMIT = 8.0  # of a key's log weight


@dataclass(frozen=True)
class Maps:
    """Tensors of one site by name, and how they are used.

    gate: [H], the log weight of the far branch. query_gate: [H, D], added to it q·u.
    key_gate.weight: [G, D], key_gate.bias: [G]: log weight of a key, bounded by LIMIT.
    query_map.weight: [H, n, D], key_map.weight: [G, n, D], *.bias: [H or G, n]; n is F, or F/2
    for hedgehog, whose other half is the negative. Gates are float32.
    """

    kind: str
    tensors: dict[str, Tensor]
    heads: int
    groups: int

    def with_(self, new: dict[str, Tensor]) -> Maps:
        """With these tensors in place of the old ones, in their types."""
        changed = {n: t.to(self.tensors[n]) for n, t in new.items()}
        return Maps(self.kind, {**self.tensors, **changed}, self.heads, self.groups)


def features(
    call: Callable[..., Any],
    query: Any,
    key: Any,
    p: dict[str, Any],
    maps: Maps,
    dtype: torch.dtype,
) -> tuple[Any, Any, Any]:
    """φ_q, φ_k and the log gate: written once, for tensors and for nodes of a graph.

    Args:
        call: call(target, *args) runs an ATen op, or appends it to a graph.
        query: [B, H, L, D]. key: [B, Hk, L, D], both of `dtype`. p: the tensors, or their nodes.

    Returns:
        [B, H, L, F] and [B, G, L, F] of `dtype`, and [B, H, L] float32 (64 for float64).
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def to(value: Any, target: torch.dtype, source: torch.dtype = dtype) -> Any:
        return value if source == target else call(aten.to.dtype, value, target)

    def product(x: Any, name: str) -> Any:  # [B, H, L, D] with [H, n, D] to [B, H, L, n]
        weight = to(p[f"{name}.weight"], wide, maps.tensors[f"{name}.weight"].dtype)
        x = call(aten.matmul.default, x, call(aten.transpose.int, weight, 1, 2))
        if f"{name}.bias" not in maps.tensors:
            return x
        bias = to(p[f"{name}.bias"], wide, maps.tensors[f"{name}.bias"].dtype)
        return call(aten.add.Tensor, x, call(aten.unsqueeze.default, bias, 1))

    def dot(x: Any, name: str) -> Any:  # [B, H, L, D] with [H, D] to [B, H, L, 1]
        vector = to(p[name], wide, maps.tensors[name].dtype)
        return call(aten.matmul.default, x, call(aten.unsqueeze.default, vector, -1))

    def mapped(x: Any, name: str) -> tuple[Any, Any]:
        kind = maps.kind
        if kind == "elu1":
            return call(aten.add.Tensor, call(aten.elu.default, x), 1.0), None
        if kind == "exp":
            return call(aten.exp.default, call(aten.clamp.default, x, -LIMIT, LIMIT)), None
        if kind == "identity":
            return x, None
        x = product(x, name)
        if kind == "t2r":
            return call(aten.relu.default, x), None
        if kind == "centroid":
            return call(aten.softmax.int, x, -1), x
        both = [x, call(aten.neg.default, x)]
        if kind == "hedgehog_joint":
            return call(aten.softmax.int, call(aten.cat.default, both, -1), -1), None
        return call(aten.cat.default, [call(aten.softmax.int, t, -1) for t in both], -1), None

    query, key = to(query, wide), to(key, wide)
    kv_heads = int(key.meta["val"].shape[1]) if hasattr(key, "meta") else key.shape[1]
    if maps.groups != kv_heads:
        key = call(aten.repeat_interleave.self_int, key, maps.groups // kv_heads, 1)
    query_features, logits = mapped(query, "query_map")
    key_features, _ = mapped(key, "key_map")
    gate = call(aten.unsqueeze.default, to(p["gate"], wide, maps.tensors["gate"].dtype), -1)
    if logits is not None:  # φ_q is normalised: what it was divided by belongs to the weight
        gate = call(aten.add.Tensor, call(aten.logsumexp.default, logits, [-1]), gate)
    if "query_gate" in maps.tensors:
        own = call(aten.squeeze.dim, dot(query, "query_gate"), -1)
        gate = call(aten.add.Tensor, own, gate)
    if logits is None and "query_gate" not in maps.tensors:
        sizes = [call(aten.sym_size.int, query, i) for i in (0, 1, 2)]
        gate = call(aten.expand.default, gate, sizes)
    if "key_gate.weight" in maps.tensors:
        own = dot(key, "key_gate.weight")
        bias = to(p["key_gate.bias"], wide, maps.tensors["key_gate.bias"].dtype)
        for _ in range(2):
            bias = call(aten.unsqueeze.default, bias, -1)
        own = call(aten.div.Tensor, call(aten.add.Tensor, own, bias), LIMIT)
        own = call(aten.mul.Tensor, call(aten.tanh.default, own), LIMIT)
        key_features = call(aten.mul.Tensor, key_features, call(aten.exp.default, own))
    return to(query_features, dtype, wide), to(key_features, dtype, wide), gate


def map_tensors(query: Tensor, key: Tensor, maps: Maps) -> tuple[Tensor, Tensor, Tensor]:
    """`features` on tensors."""
    return features(lambda f, *args: f(*args), query, key, maps.tensors, maps, query.dtype)
