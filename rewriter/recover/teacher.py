"""The original beside the rewritten model: its graph, on the same memory where they agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.fx.node import map_aggregate
from transformers import PreTrainedModel

from rewriter.capture import capture
from rewriter.errors import RewriterError
from rewriter.graph import Graph, place
from rewriter.model import RewrittenModel


def teacher_graph(original: PreTrainedModel | str | Path, student: RewrittenModel) -> Graph:
    """The original's graph; tensors that the student kept are the student's own.

    Of a folder only the tensors that the student has lost are read: the model's structure is
    built on the meta device.

    Raises RewriterError: it is not the model that the student was made from.
    """
    if isinstance(original, nn.Module):
        return _share(capture(original), student)
    recorded = student.lock.get("original", {}).get("tensors", {})
    files = _files(Path(original))
    if not recorded or not files:
        return _share(capture(original), student)
    graph = capture(original, meta=True)
    own, now = dict(student.graph.parameters()), student.lock["tensors"]
    shared = {n for n in recorded if n in own and now.get(n) == recorded[n]}
    wanted = [n for n, _ in graph.parameters() if n not in shared]
    if any(n not in files for n in wanted):  # made on loading, or stored under other names
        return _share(capture(original), student)
    for name in shared:
        place(graph.module, name, own[name])
    for name in wanted:
        tensor = _read(files[name], name)
        _check(name, tensor, recorded)
        place(graph.module, name, nn.Parameter(tensor, requires_grad=False))
    _leave_meta(graph)
    return graph


def _share(graph: Graph, student: RewrittenModel) -> Graph:
    """Take the student's memory for every tensor that is equal there."""
    own = dict(student.graph.parameters())
    for name, tensor in list(graph.parameters()):
        other = own.get(name)
        if other is None or other.shape != tensor.shape or other.dtype != tensor.dtype:
            continue
        if other is not tensor and torch.equal(other, tensor.to(other.device)):
            place(graph.module, name, other)
    return graph


def _files(folder: Path) -> dict[str, Path]:
    """File of every tensor of a saved model; empty if it is not a local safetensors folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weights = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in weights.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        return {}
    with safe_open(str(single), "pt") as file:
        return dict.fromkeys(file.keys(), single)


def _read(path: Path, name: str) -> Tensor:
    with safe_open(str(path), "pt") as file:
        return file.get_tensor(name).clone()


def _check(name: str, tensor: Tensor, recorded: dict[str, str]) -> None:
    from rewriter.rewrite import tensor_hash

    if name in recorded and tensor_hash(tensor) != recorded[name]:
        raise RewriterError(
            f"{name} of the original is not what it was when this model was made from it",
            "give the same original, or rewrite the model again",
        )


def _leave_meta(graph: Graph) -> None:
    """What was captured on the meta device runs on the CPU."""

    def device(value: Any) -> Any:
        meta = isinstance(value, torch.device) and value.type == "meta"
        return torch.device("cpu") if meta else value

    for node in graph.nodes:
        node.args = map_aggregate(node.args, device)  # type: ignore[assignment]
        node.kwargs = map_aggregate(node.kwargs, device)  # type: ignore[assignment]
    graph.recompile()
