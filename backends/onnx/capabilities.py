"""What the installed ONNX Runtime can do, asked of it rather than read off its version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from rewriter.errors import RewriterError

#: First version with each, of those that not every supported version has.
SINCE = {"query_lengths": (1, 32), "window_cache": (1, 32)}


@dataclass(frozen=True)
class Capabilities:
    """Operators and options that a CPU session accepts.

    grouped_query: GroupQueryAttention at all. query_lengths: its `query_seqlens`, so that a
    batch with padding takes several tokens after a past (ONNX Runtime 1.32; not 1.30).
    window_cache: with it, `sliding_window_cache`. linear_attention, causal_conv: the operators.
    """

    version: str
    grouped_query: bool
    query_lengths: bool
    window_cache: bool
    linear_attention: bool
    causal_conv: bool


def capabilities(runtime: str | None = None) -> Capabilities:
    """Of the installed ONNX Runtime, or of what it has in common with an older one ("1.30").

    Raises RewriterError: `runtime` is no version, or newer than the installed one.
    """
    here = installed()
    if runtime is None:
        return here
    try:
        wanted, own = (tuple(map(int, v.split(".")[:2])) for v in (runtime, here.version))
    except ValueError:
        raise RewriterError(f"'{runtime}' is no version", 'give one like "1.30"') from None
    if wanted > own:
        raise RewriterError(
            f"onnxruntime {here.version} cannot check an export for {runtime}",
            "install that version, or export for an older one",
        )
    lacks = {name: False for name, since in SINCE.items() if wanted < since}
    return replace(here, version=runtime, **lacks)


@cache
def installed() -> Capabilities:
    """Of the installed ONNX Runtime: each is a one-node model that a session takes or refuses."""
    import onnxruntime

    heads = {"num_heads": 2, "kv_num_heads": 1}
    plain = ["f3", "f3", "f3", "f4", "f4", "i1", "i1"]
    lengths = plain + [""] * 9 + ["i1"]
    window = heads | {"local_window_size": 4, "sliding_window_cache": 1}
    scan = {"q_num_heads": 2, "kv_num_heads": 1, "update_rule": "gated"}
    conv = {"activation": "silu", "ndim": 1}
    return Capabilities(
        version=onnxruntime.__version__,
        grouped_query=_takes("GroupQueryAttention", plain, 3, heads),
        query_lengths=_takes("GroupQueryAttention", lengths, 3, heads),
        window_cache=_takes("GroupQueryAttention", lengths, 3, window),
        linear_attention=_takes("LinearAttention", ["f3", "f3", "f3", "f4", "f3"], 2, scan),
        causal_conv=_takes("CausalConvWithState", ["f3", "f3", "f1", "f3"], 2, conv),
    )


def _takes(op_type: str, kinds: list[str], outputs: int, attributes: Mapping[str, Any]) -> bool:
    """Whether a session opens with this node; a kind is a type letter and a rank."""
    import onnxruntime
    from onnx import TensorProto, helper

    names = [f"x{i}" if kind else "" for i, kind in enumerate(kinds)]
    made = [f"y{i}" for i in range(outputs)]
    types = {"f": TensorProto.FLOAT, "i": TensorProto.INT32}
    inputs = [
        helper.make_tensor_value_info(name, types[kind[0]], [None] * int(kind[1]))
        for name, kind in zip(names, kinds, strict=True)
        if kind
    ]
    node = helper.make_node(op_type, names, made, domain="com.microsoft", **attributes)
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in made]
    model = helper.make_model(
        helper.make_graph([node], "probe", inputs, results),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception:  # its exception types are not public
        return False
    return True
