"""An encoder-decoder as two files: the encoder with all that the decoder reads of it, and the
decoder with its states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule

from rewriter.backends.onnx import check
from rewriter.backends.onnx.capabilities import Capabilities
from rewriter.backends.onnx.registry import Context
from rewriter.encoder_decoder import HIDDEN, Parts, split
from rewriter.errors import GateError
from rewriter.graph import Graph

ENCODER = "encoder.onnx"


class DecoderFeeder(check.Feeder):
    """Inputs of the decoder: tokens, and for each number of rows the memory of one input."""

    def __init__(
        self, graph: Graph, module: GraphModule, memory: Callable[[int], dict[str, Tensor]]
    ) -> None:
        self._memory, self._known = memory, dict[int, dict[str, Tensor]]()
        super().__init__(graph, module)

    def tokens(self, mask: Tensor, new: int) -> dict[str, Tensor]:
        batch = mask.shape[0]
        if batch not in self._known:
            self._known[batch] = self._memory(batch)
        made: dict[str, Tensor] = {}
        for node in self.inputs:
            name = str(node.target)
            if name == "decoder_attention_mask":
                made[name] = mask
            elif name == "decoder_position_ids":
                made[name] = (mask.cumsum(-1) - 1).clamp_min(0)[:, -new:]
            elif name == "decoder_input_ids":
                made[name] = torch.randint(0, self.vocabulary, (batch, new), generator=self.random)
            else:
                made[name] = self._known[batch][name]
        return made


def encoder_with_memory(parts: Parts) -> FxGraph:
    """Inputs of the encoder to its last hidden states and every output of the memory."""
    made = FxGraph()
    hidden = made.graph_copy(parts.encoder.graph, {})[0]  # type: ignore[index]
    given = {n.target: n for n in made.nodes if n.op == "placeholder"}
    first, *others = (n for n in parts.memory.graph.nodes if n.op == "placeholder")
    known = {first: hidden} | {n: given[n.target] for n in others}
    made.output((hidden, *made.graph_copy(parts.memory.graph, known)))  # type: ignore
    made.lint()
    return made


def export_parts(
    model: Any,
    module: GraphModule,
    folder: Path,
    *,
    style: str,
    can: Capabilities,
    logits: str,
    opset: int,
    tolerance: float,
    fallbacks: list[str],
) -> dict[str, Any]:
    """Write `model.onnx` (the decoder) and `encoder.onnx`, and compare both with the graph.

    The encoder's outputs are `encoder_last_hidden_state` [B, S, D] and memory_0, memory_1 …: the
    keys and values of every cross attention and their mask, which the decoder takes by the same
    names at each call. Its other inputs are decoder_input_ids [B, L], decoder_attention_mask
    [B, P + L] and decoder_position_ids [B, L], where the model has them, and the states.

    Returns: what the report of a decoder has, and `encoder`: {file, inputs, outputs, ops,
    max_error}.
    """
    from rewriter.backends.onnx.export import last_logits, lower_graph
    from rewriter.backends.onnx.write import write

    whole = replace(model.graph, module=module)
    parts, known = split(whole), {n.name: n.meta for n in whole.nodes}

    def piece(fx: FxGraph, outputs: list[str], states: Any, names: dict[str, str]) -> Graph:
        """`names`: of inputs that get another one."""
        for node in [n for n in fx.nodes if n.op == "placeholder"]:
            node.meta.update(known[node.name])
            node.args = ()  # a default may not come before inputs for states
            if node.name in names:
                node.target = names[node.name]
                node._rename(node.target)
        made = GraphModule(module, fx)
        inputs = [str(n.target) for n in fx.nodes if n.op == "placeholder"]
        inputs = [n for n in inputs if not n.startswith("state_")]
        return replace(whole, module=made, inputs=inputs, outputs=outputs, states=states)

    def written(part: Graph, feeder: check.Feeder, file: str) -> tuple[Context, dict[str, Any]]:
        fx = copy.deepcopy(part.module.graph)
        context = Context(fx, feeder.values, style, can, fallbacks)
        if logits == "last" and part.states:
            last_logits(part, context)
        names: dict[str, Any] = lower_graph(part, context)
        dynamic = [feeder.dynamic(n, context.states) for n in names["inputs"]]
        args = feeder.example(names["inputs"], context.states)
        lowered = GraphModule(part.module, fx)
        names["ops"] = write(
            *(lowered, args, dynamic, names["inputs"], names["outputs"], folder / file, opset),
            context.fused,
        )
        return context, {"file": file} | names

    memory = {name: f"memory_{i}" for i, name in enumerate(parts.memory.outputs)}
    encoder = piece(encoder_with_memory(parts), [HIDDEN, *memory.values()], [], {})
    feeder = check.Feeder(encoder, encoder.module)
    _, about = written(encoder, feeder, ENCODER)
    about["max_error"] = error = _encoder_error(encoder.module, feeder, folder / ENCODER)
    if not error <= tolerance:
        raise GateError(
            f"ONNX Runtime differs from the encoder by {error:.1e} (bound {tolerance:g})",
            "try attention='standard', or report this model",
        )

    def remembered(rows: int) -> dict[str, Tensor]:
        inputs = feeder.tokens(torch.ones(rows, 9, dtype=torch.long), 9)
        made = encoder.module(*inputs.values())
        return dict(zip(memory.values(), made[1:], strict=True))

    outputs = [n for n in whole.outputs if n != HIDDEN]
    decoder = piece(parts.decoder.graph, outputs, whole.states, memory)
    fed = DecoderFeeder(decoder, decoder.module, remembered)
    context, report = written(decoder, fed, "model.onnx")
    runs = check.sequences(decoder, decoder.module, fed, can.query_lengths or not context.fused)
    file = folder / "model.onnx"
    errors = check.compare(runs, file, report["outputs"], context.states, tolerance)
    errors["encoder"] = error
    worst = max(errors.values())
    if not worst <= tolerance:
        raise GateError(
            f"ONNX Runtime differs from the graph by {worst:.1e} (bound {tolerance:g}): "
            + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()),
            "try attention='standard', or report this model",
        )
    return report | {
        "bytes": sum(p.stat().st_size for p in folder.iterdir()),
        "max_error": worst,
        "errors": errors,
        "fallbacks": context.fallbacks,
        "onnxruntime": can.version,
        "opset": opset,
        "logits": logits,
        "weights": "fp32",
        "states": [s.json() for s in context.states.values()],
        "encoder": about,
    }


def _encoder_error(run: Any, feeder: check.Feeder, file: Path) -> float:
    """max|Δ| / max|reference| over all outputs, for two rows, the first padded on the right."""
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[0, 12:] = 0
    inputs = feeder.tokens(mask, 19)
    worst = 0.0
    wants = run(*inputs.values())
    for optimised in (True, False):
        session = check.open_session(file, optimised)
        found = session.run(None, {k: v.numpy() for k, v in inputs.items()})
        for got, want in zip(found, wants, strict=True):
            if want.dtype.is_floating_point:
                delta = (torch.from_numpy(got).double() - want.double()).abs().max()
                worst = max(worst, float(delta / want.double().abs().max()))
    return worst if worst == worst else float("inf")
