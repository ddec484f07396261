"""Turn the threaded graph into one whose states are tensors, and write it as ONNX."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from rewriter.backends.onnx import check
from rewriter.backends.onnx.capabilities import capabilities
from rewriter.backends.onnx.genai import FILE, not_runnable, write_genai_config
from rewriter.backends.onnx.quantize import check_weights, quantise, text
from rewriter.backends.onnx.registry import Context, lower_nodes
from rewriter.backends.onnx.seq2seq import export_parts
from rewriter.backends.onnx.write import write
from rewriter.encoder_decoder import hidden_states
from rewriter.errors import GateError, RewriterError
from rewriter.folders import whole_folder
from rewriter.graph import Graph, as_linear, aten, place
from rewriter.state import read
from rewriter.state import write as write_state

TOLERANCE = 1e-4  # of max|logits|
OPSET = 21  # 23 makes the exporter fuse a RotaryEmbedding that ONNX Runtime 1.32 refuses


def export_onnx(
    model: Any,
    folder: str | Path,
    *,
    attention: str = "fused",
    logits: str = "all",
    opset: int = OPSET,
    tolerance: float = TOLERANCE,
    runtime: str | None = None,
    weights: str = "fp32",
    source: str | Path | None = None,
    data: Any = None,
    max_loss: float | None = None,
) -> dict[str, Any]:
    """Write `model` as `folder/model.onnx` and compare it with the graph in ONNX Runtime.

    Inputs of the file are those of the graph (input_ids [B, L], attention_mask [B, P + L],
    position_ids [B, L]) and the states: past_key_i and past_value_i [B, Hk, P, D] (P is fixed
    for a window: its size and the sinks), or the tensors of a recurrent mixer, past_conv_i
    [B, C, k-1], past_ssm_i [B, H, P, N] float32 and so on. Outputs are logits [B, L, V] and a
    `present_…` for each state. A sequence starts with zeros, and P = 0 where P grows. Left
    padding must stay on the left: a cache keeps the real tokens of each row without holes.

    Args:
        model: a RewrittenModel.
        folder: must not hold anything yet; it appears whole or not at all.
        attention: "fused" (contrib operators of ONNX Runtime where they can say what the graph
            says) or "standard" (operators of the ONNX standard everywhere).
        logits: "all" [B, L, V], or "last": [B, 1, V], those of the last column alone, which is
            all that generation reads; the others are not computed.
        opset: of the standard operators.
        tolerance: largest allowed max|Δ logits| / max|logits|.
        runtime: oldest version of ONNX Runtime that is to run it, such as "1.30" (the latest
            onnxruntime-node); by default the installed one. Older ones lack operators' options.
        weights: "fp32", "int8", "int4" (both in blocks of 32), or "source": the grid of the GGUF
            file that the model was read from, bit for bit (`backends/onnx/quantize`).
        source: that file, if it is not the model's own.
        data: text to measure the loss of quantised weights on, as for `rewrite`.
        max_loss: largest perplexity over that of the file in fp32; 1.01, for int4 1.5.

    Returns: {file, bytes, ops: {operator: count}, max_error, fallbacks: [reason], states, …}; it
    is also in `folder/export.json`. `genai` is the name of the configuration with which
    onnxruntime-genai runs the folder as it is, or why it cannot. `quantised` is what
    was made of the weights and what it cost.

    Raises:
        RewriterError: onnx or onnxruntime is missing, the folder is in use, or no GGUF source.
        GateError: ONNX Runtime does not compute what the graph does, or quantised weights lose
            too much; nothing is written.
    """
    if attention not in ("fused", "standard"):
        raise RewriterError(f"unknown attention lowering '{attention}'", "use fused or standard")
    if logits not in ("all", "last"):
        raise RewriterError(f"unknown choice of logits '{logits}'", "use all or last")
    grids = check_weights(weights, source, model)
    graph: Graph = model.graph
    with whole_folder(folder) as aside:
        with torch.no_grad(), _evaluating(graph.module):
            fallbacks: list[str] = []
            module = widen(graph.module, fallbacks)
            if hidden_states(graph) is not None and "decoder_input_ids" in graph.inputs:
                return _two_files(
                    *(model, module, aside, attention, logits, opset, tolerance, runtime),
                    *(weights, fallbacks),
                )
            feeder = check.Feeder(graph, module)
            context = Context(
                copy.deepcopy(module.graph),
                feeder.values,
                attention,
                capabilities(runtime),
                fallbacks,
            )
            if logits == "last":
                last_logits(graph, context)
            names = lower_graph(graph, context)
            ops = write(
                GraphModule(module, context.graph),
                feeder.example(names["inputs"], context.states),
                [feeder.dynamic(n, context.states) for n in names["inputs"]],
                names["inputs"],
                names["outputs"],
                aside / "model.onnx",
                opset,
                context.fused,
            )
            batched = context.can.query_lengths or not context.fused
            runs = check.sequences(graph, module, feeder, batched)
            errors = check.compare(
                runs, aside / "model.onnx", names["outputs"], context.states, tolerance
            )
        worst = max(errors.values())
        if not worst <= tolerance:
            raise GateError(
                f"ONNX Runtime differs from the graph by {worst:.1e} of max|logits| "
                f"(bound {tolerance:g}): " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()),
                "try attention='standard', or report this model",
            )
        quantised: dict[str, Any] = {}
        if weights != "fp32":
            quantised = quantise(
                aside / "model.onnx",
                weights,
                states=context.states,
                runs=runs,
                tokens=text(model, data),
                tolerance=tolerance,
                source=grids,
                max_loss=max_loss,
            )
            ops = quantised.pop("ops")
        report = {
            "file": "model.onnx",
            "bytes": sum(p.stat().st_size for p in aside.iterdir()),
            "ops": ops,
            "max_error": worst,
            "errors": errors,
            "fallbacks": context.fallbacks,
            "onnxruntime": context.can.version,
            "opset": opset,
            "logits": logits,
            "weights": weights,
            "quantised": quantised,
            "inputs": names["inputs"],
            "outputs": names["outputs"],
            "states": [s.json() for s in context.states.values()],
        }
        _companions(model, aside)
        report["genai"] = write_genai_config(aside, report) or FILE
        (aside / "export.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _two_files(
    model: Any,
    module: GraphModule,
    folder: Path,
    attention: str,
    logits: str,
    opset: int,
    tolerance: float,
    runtime: str | None,
    weights: str,
    fallbacks: list[str],
) -> dict[str, Any]:
    """An encoder-decoder; see `export_parts`."""
    if weights != "fp32":
        raise RewriterError(
            f"weights='{weights}' is not there for encoder-decoders", "leave out `weights`"
        )
    report = export_parts(
        model,
        module,
        folder,
        style=attention,
        can=capabilities(runtime),
        logits=logits,
        opset=opset,
        tolerance=tolerance,
        fallbacks=fallbacks,
    )
    _companions(model, folder)
    report["genai"] = not_runnable(report)
    (folder / "export.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


@contextmanager
def _evaluating(module: GraphModule) -> Any:
    training = module.training
    module.train(False)
    try:
        yield
    finally:
        module.train(training)


def widen(module: GraphModule, fallbacks: list[str]) -> GraphModule:
    """The same graph in float32 if it is bfloat16, which ONNX Runtime cannot do on a CPU."""
    used = [str(n.target) for n in module.graph.nodes if n.op == "get_attr"]
    if not any(_tensor(module, name).dtype is torch.bfloat16 for name in used):
        return module
    fallbacks.append("bfloat16 has no CPU kernels in ONNX Runtime: exported as float32")
    graph = copy.deepcopy(module.graph)
    wide = lambda x: torch.float32 if x is torch.bfloat16 else x  # noqa: E731
    for node in graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, wide)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, wide)
    memo: dict[int, Tensor] = {}
    root: dict[str, Tensor] = {}
    for name in used:
        old = _tensor(module, name)
        new = old.detach().float() if old.dtype is torch.bfloat16 else old
        root[name] = memo.setdefault(id(old), new)
    holder = torch.nn.Module()
    for name, value in root.items():
        place(holder, name, value)
    return GraphModule(holder, graph)


def _tensor(module: torch.nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def lower_graph(graph: Graph, context: Context) -> dict[str, list[str]]:
    """Edit `context.graph` into one that takes and returns states as tensors, without the dialect.

    Returns the names of its inputs and outputs, in order.
    """
    fx = context.graph
    _lower_recurrent(context)
    lower_nodes(context)
    for state in [n for n in fx.nodes if n.op == "placeholder"]:
        if str(state.target).startswith("state_"):
            fx.erase_node(state)
    out = next(n for n in fx.nodes if n.op == "output")
    first = out.args[0]
    heads = list(first.values()) if isinstance(first, dict) else first
    heads = list(heads) if isinstance(heads, (list, tuple)) else [heads]
    keys = graph.outputs or [f"output_{i}" for i in range(len(heads))]
    keep = [(k, n) for k, n in zip(keys, heads, strict=True) if isinstance(n, Node)]
    out.args = (tuple([n for _, n in keep] + list(context.outputs.values())),)
    fx.eliminate_dead_code()
    fx.lint()
    inputs = [str(n.target) for n in fx.nodes if n.op == "placeholder"]
    return {"inputs": inputs, "outputs": [k for k, _ in keep] + list(context.outputs)}


#: Elementwise operators that may follow the head: soft-caps, scales, casts.
AFTER_HEAD = {
    *(aten.mul.Tensor, aten.div.Tensor, aten.tanh.default, aten.to.dtype),
    *(aten.to.device, aten.contiguous.default),
}


def last_logits(graph: Graph, context: Context) -> None:
    """Cut what the head reads to its last column. Raises RewriterError where it is not found."""
    out = next(n for n in context.graph.nodes if n.op == "output")
    heads = out.args[0]
    heads = list(heads.values()) if isinstance(heads, dict) else list(heads)  # type: ignore
    node = heads[graph.outputs.index("logits")] if "logits" in graph.outputs else None
    while isinstance(node, Node) and node.target in AFTER_HEAD and len(node.all_input_nodes) == 1:
        node = node.args[0]
    if not isinstance(node, Node) or (head := as_linear(node)) is None:
        raise RewriterError(
            "the head of this model was not found: its logits are not those of one linear",
            "export with logits='all'",
        )
    with context.graph.inserting_before(node):
        last = context.call(aten.slice.Tensor, head.input, 1, -1, 2**63 - 1)
    node.replace_input_with(head.input, last)


def _lower_recurrent(context: Context) -> None:
    """Reads and writes of recurrent tensors as inputs and outputs."""
    pasts: dict[tuple[Any, Any], Node] = {}
    nodes = list(context.graph.nodes)
    for node in [n for n in nodes if n.target is write_state]:
        state, name, new = node.args
        like = context.value(new)
        index = str(state.target).removeprefix("state_")
        past = context.state(f"{name}_{index}", tuple(like.shape[1:]), like.dtype)
        pasts[state, name] = past
        node.replace_all_uses_with(new)
        context.graph.erase_node(node)
        context.present(past, new)
    for node in [n for n in nodes if n.target is read]:
        node.replace_all_uses_with(pasts[node.args[0], node.args[1]])
        context.graph.erase_node(node)


def _companions(model: Any, folder: Path) -> None:
    """The configuration and the tokenizer files that travel with the model."""
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    for path in model.companions:
        shutil.copyfile(path, folder / path.name)
