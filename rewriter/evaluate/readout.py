"""The body once, the head in slices: logits of long texts without holding them all at once.

At 8,192 tokens and 49,152 words the logits alone are 1.6 GB; the hidden states are 19 MB.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from rewriter.calibration import graph_inputs, walk
from rewriter.errors import RewriterError
from rewriter.graph import LINEAR, argument
from rewriter.model import RewrittenModel

#: Positions whose logits are held at once: 50 MB at 49,152 words.
SLICE = 256

#: Models that do more than a linear after their body (a soft cap, a scale).
_whole: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class Readout:
    """What the head reads. `hidden` [B, T, D]; `head` maps [B, n, D] to logits [B, n, V]."""

    hidden: Tensor
    head: Callable[[Tensor], Tensor]

    def logits(self, positions: slice | Tensor) -> Tensor:
        """Logits [B, n, V] in fp32 at some positions."""
        return self.head(self.hidden[:, positions]).float()

    def slices(self, end: int | None = None, size: int = SLICE) -> Iterator[tuple[slice, Tensor]]:
        """(positions, their logits [B, n, V] in fp32) from 0 to `end`, `size` at a time."""
        stop = self.hidden.shape[1] if end is None else end
        for start in range(0, stop, size):
            part = slice(start, min(start + size, stop))
            yield part, self.logits(part)


def read(model: nn.Module, tokens: Tensor) -> Readout:
    """Run a causal language model on unpadded tokens [B, T], all but its head.

    Takes a `RewrittenModel` (its graph up to the last linear), a transformers model (up to
    its output embeddings), or any module that returns `.logits` [B, T, V] (run whole). A
    transformers model that changes its logits after the head is also run whole. The caller
    chooses the gradient mode.

    Raises RewriterError: the model returns no logits for every token.
    """
    tokens = tokens.to(device(model))
    with evaluating(model):
        if isinstance(model, RewrittenModel):
            return _from_graph(model, tokens)
        if model not in _whole:
            found = _from_module(model, tokens)
            if found is not None:
                return found
            _whole.add(model)
        return Readout(_logits(model(input_ids=tokens), tokens), lambda logits: logits)


def device(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _from_graph(model: RewrittenModel, tokens: Tensor) -> Readout:
    module = model.graph.module
    if "logits" not in model.graph.outputs or "input_ids" not in model.graph.inputs:
        raise RewriterError(
            "the rewritten model gives no logits for tokens", "evaluate a causal language model"
        )
    results: Any = next(n for n in module.graph.nodes if n.op == "output").args[0]
    chain = _head_chain(results[model.graph.outputs.index("logits")])
    source: Any = argument(chain[0], "input") if chain[0].target is LINEAR else chain[0]
    hidden: Any = None
    for node, value, _ in walk(module, graph_inputs(model.graph, tokens)):
        if node is source:
            hidden = value
            break
    if source is chain[0]:  # no linear at the end: these are the logits
        return Readout(hidden, lambda logits: logits)

    constants: dict[Node, Any] = {}
    for node in chain:
        for used in node.all_input_nodes:
            if used.op == "get_attr":
                owner, _, leaf = str(used.target).rpartition(".")
                constants[used] = getattr(module.get_submodule(owner), leaf)

    def head(value: Tensor) -> Tensor:
        environment: dict[Node, Any] = {**constants, source: value}
        for node in chain:
            args = torch.fx.node.map_arg(node.args, environment.__getitem__)
            kwargs = torch.fx.node.map_arg(node.kwargs, environment.__getitem__)
            environment[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return environment[chain[-1]]

    return Readout(hidden, head)


def _head_chain(logits: Node) -> list[Node]:
    """The last linear and what follows it; [logits] where other values come in between."""
    chain = [logits]
    while chain[0].target is not LINEAR:
        inputs = [n for n in chain[0].all_input_nodes if n.op != "get_attr"]
        if len(inputs) != 1 or inputs[0].op != "call_function":
            return [logits]
        chain.insert(0, inputs[0])
    return chain


def _from_module(model: nn.Module, tokens: Tensor) -> Readout | None:
    """The input of the output embeddings; None unless they alone make the logits."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    if head is None:
        return None
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(inputs[0])
        return (inputs[0][:, -1:], *inputs[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        result = model(input_ids=tokens, use_cache=False)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].shape[:2] != tokens.shape:
        return None
    same = torch.equal(getattr(result, "logits", seen[0]), head(seen[0][:, -1:]))
    return Readout(seen[0], head) if same else None


def _logits(result: Any, tokens: Tensor) -> Tensor:
    logits = getattr(result, "logits", None)
    if logits is None or logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        raise RewriterError(
            "the model gives no logits for every token", "evaluate a causal language model"
        )
    return logits
