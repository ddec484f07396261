"""`genai_config.json`: what onnxruntime-genai has to know to run an exported folder as it is.

It finds states by templates of their names: keys and values of attention, and in a recurrent
layer one state of a convolution [B, C, k-1] and one of rank four. Caches may grow, or be windows
of one size. Read from its sources and tried with 0.18, on the CPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "genai_config.json"
INPUTS = ("input_ids", "attention_mask", "position_ids")
#: Operators that may write a recurrent state over the one they read.
IN_PLACE = {"com.microsoft::LinearAttention", "com.microsoft::CausalConvWithState"}


def write_genai_config(folder: Path, report: dict[str, Any]) -> str:
    """Write it into `folder` if onnxruntime-genai can run the graph; returns why it cannot, or ''.

    folder: with config.json, and generation_config.json if there is one. report: what export.json
    holds.
    """
    why = not_runnable(report)
    if not why:
        config = json.loads((folder / "config.json").read_text())
        path = folder / "generation_config.json"
        generation = json.loads(path.read_text()) if path.exists() else {}
        made = genai_config(report, config, generation)
        (folder / FILE).write_text(json.dumps(made, indent=2) + "\n")
    return why


def not_runnable(report: dict[str, Any]) -> str:
    """Why onnxruntime-genai 0.18 cannot run a graph; '' if it can."""
    states = report["states"]
    known = {*INPUTS, *(s["input"] for s in states)}
    if "input_ids" not in report["inputs"] or report["outputs"][0] != "logits":
        return "it is no decoder from input_ids to logits"
    if other := [n for n in report["inputs"] if n not in known]:
        return f"it gives input_ids, attention_mask and position_ids, no {', '.join(other)}"
    if not states:
        return "the graph has no states"
    recurrent = set()
    for index, tensors in layers(states).items():
        ranks = sorted((len(s["shape"]), kind) for kind, s in tensors.items())
        if set(tensors) != {"key", "value"}:
            recurrent.add(tuple(kind for _, kind in ranks))
        if set(tensors) != {"key", "value"} and [rank for rank, _ in ranks] != [2, 3]:
            return (
                f"layer {index} has the states {', '.join(tensors)}; it knows keys and values, or "
                "one state of a convolution and one recurrent state"
            )
    if len(recurrent) > 1:
        return "it has one template for the names of recurrent states, and layers here differ"
    caches = [t for t in layers(states).values() if "key" in t]
    if any(t["key"]["shape"] != t["value"]["shape"] for t in caches):
        return "values are not as wide as keys"
    windows = {t["key"]["shape"][1] for t in caches if t["key"]["grows"] is None}
    growing = [t["key"] for t in caches if t["key"]["grows"] is not None]
    if len(windows) > 1:
        return f"it has one size of window, and here are {', '.join(map(str, sorted(windows)))}"
    if windows and not all(s["shared"] for s in growing):
        return "it cannot lengthen some caches by concatenation while others are windows"
    if windows and growing and min(windows) < 2:
        return "a window of one token"
    return ""


def layers(states: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Of each layer with a state: its tensors by kind (`key`, `value`, `conv`, `ssm`, …)."""
    found: dict[int, dict[str, Any]] = {}
    for state in states:
        kind, index = state["input"].removeprefix("past_").rsplit("_", 1)
        found.setdefault(int(index), {})[kind] = state
    return dict(sorted(found.items()))


def genai_config(
    report: dict[str, Any], config: dict[str, Any], generation: dict[str, Any]
) -> dict[str, Any]:
    """The file's content, for a graph that `not_runnable` has nothing against."""
    original = config.get("original", config)
    text = {**config, **original, **(original.get("text_config") or {})}
    chosen = {**text, **{k: v for k, v in generation.items() if v is not None}}
    tensors = layers(report["states"])
    caches = {i: t["key"] for i, t in tensors.items() if "key" in t}
    recurrent = next((t for t in tensors.values() if "key" not in t), {})
    heads, _, width = next(iter(caches.values()))["shape"] if caches else (1, 0, 1)
    names = {"key": "key", "value": "value"} if caches else {}
    for kind, state in recurrent.items():
        names["conv" if len(state["shape"]) == 2 else "recurrent"] = kind
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": report["file"],
        "hidden_size": text.get("hidden_size", heads * width),
        "head_size": width,
        "num_attention_heads": text.get("num_attention_heads", heads),
        "num_key_value_heads": heads,
        "num_hidden_layers": max(tensors) + 1,
        "inputs": {n: n for n in INPUTS if n in report["inputs"]}
        | {f"past_{role}_names": f"past_{kind}_%d" for role, kind in names.items()},
        "outputs": {"logits": "logits"}
        | {f"present_{role}_names": f"present_{kind}_%d" for role, kind in names.items()},
    }
    windows = {i: c["shape"][1] for i, c in caches.items() if c["grows"] is None}
    growing = [c for c in caches.values() if c["grows"] is not None]
    if windows and growing:
        # The size it allocates is the sum, and a slack of 0 would mean one of its own choice.
        size = next(iter(windows.values()))
        decoder["sliding_window"] = {
            "window_size": size - 1,
            "cache_slack": 1,
            "slide_key_value_cache": False,
            "slide_inputs": False,
            "layers": list(windows),
        }
    in_place = not recurrent or set(report["ops"]) >= IN_PLACE
    length = text.get("max_position_embeddings") or text.get("n_positions") or 4096
    ends = _ids(chosen, "eos_token_id") or [0]
    return {
        "model": {
            "type": "decoder",  # its name for any decoder; nothing depends on the architecture
            "vocab_size": text["vocab_size"],
            "context_length": length,
            "bos_token_id": (_ids(chosen, "bos_token_id") or ends)[0],
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": (_ids(chosen, "pad_token_id") or ends)[0],
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "max_length": length,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": in_place and all(c["shared"] for c in growing),
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }


def _ids(config: dict[str, Any], name: str) -> list[int]:
    """Of a setting that is one id, several, or not there."""
    found = config.get(name)
    return [] if found is None else [found] if isinstance(found, int) else list(found)
