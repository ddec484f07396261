"""How large the state of one sequence is, and from which length a rewrite pays.

A part is {"fixed": bytes, "per_token": bytes, "capped": [{"bytes_per_token", "tokens"}, …]}:
a recurrent state is fixed, a KV cache grows by every token, a ring grows until it is full.
An encoder-decoder also keeps keys and values of the encoded input: fixed, where the input's
size is (Whisper), else "per_source_token", which no number of generated tokens changes.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.fx import Node

from rewriter.encoder_decoder import memory_nodes
from rewriter.graph import ATTENTION, Graph, argument
from rewriter.kernels.mixer import MIXERS
from rewriter.lift.matching import expression
from rewriter.state import attention_spec, carriers

#: A slot of a ring also holds its column (int64) and whether it is real (bool).
SLOT = 9


def state_size(graph: Graph) -> dict[str, Any]:
    """What the mixers of a graph keep for one sequence, from the shapes in the graph."""
    fixed = growing = source = 0
    capped: list[dict[str, int]] = []
    for node in carriers(graph):
        if node.target is ATTENTION:
            spec = attention_spec(node)
            each = sum(
                int(t.shape[1]) * int(t.shape[3]) * t.element_size()
                for t in (_value(node, "key"), _value(node, "value"))
            )
            if spec["kind"] == "ring":
                slots = spec["window"] + spec["sinks"]
                capped.append({"bytes_per_token": each + SLOT, "tokens": slots})
            else:
                growing += each
        else:
            for tensor in MIXERS[node.target].state:
                last = node.meta["val"][tensor.output]
                fixed += math.prod(int(n) for n in last.shape[1:]) * last.element_size()
    for node in memory_nodes(graph):
        if isinstance(value := node.meta["val"], Tensor):
            sizes = [expression(n) for n in value.shape[1:]]
            each = math.prod(n for n in sizes if isinstance(n, int)) * value.element_size()
            if all(isinstance(n, int) for n in sizes):
                fixed += each
            else:
                source += each
    made = {"fixed": fixed, "per_token": growing, "capped": capped}
    return made | ({"per_source_token": source} if source else {})


def _value(node: Node, name: str) -> Tensor:
    return argument(node, name).meta["val"]


def state_bytes(part: dict[str, Any], tokens: int) -> float:
    """Bytes of state after `tokens` tokens of one sequence."""
    rings = sum(
        ring["bytes_per_token"] * min(tokens, ring["tokens"]) for ring in part.get("capped") or []
    )
    return part.get("fixed", 0) + part.get("per_token", 0) * tokens + rings


def pays_from(before: dict[str, Any], after: dict[str, Any]) -> int | None:
    """Least number of tokens from which on `after` is always smaller; None when it never is."""

    def difference(tokens: int) -> float:
        return state_bytes(after, tokens) - state_bytes(before, tokens)

    caps = {ring["tokens"] for part in (before, after) for ring in part.get("capped") or []}
    points = sorted({0, *caps})
    # Linear between the points and after the last: walk back to where it last was not smaller.
    end = points[-1]
    slope = difference(end + 1) - difference(end)
    if slope > 0 or (slope == 0 and difference(end) >= 0):
        return None
    if difference(end) >= 0:
        return end + math.floor(difference(end) / -slope) + 1
    for low, high in zip(points[-2::-1], points[:0:-1], strict=True):
        if difference(low) >= 0:
            slope = (difference(high) - difference(low)) / (high - low)
            return low + math.floor(difference(low) / -slope) + 1
    return 0
