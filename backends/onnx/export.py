"""Turn the threaded graph into one whose states are tensors, and write it as ONNX."""

from __future__ import annotations

import copy
import json
import operator
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from rewriter.backends.onnx import check, lower
from rewriter.errors import GateError, RewriterError
from rewriter.folders import whole_folder
from rewriter.graph import ATTENTION, Graph, argument
from rewriter.state import read, update_kv, update_ring, write

TOLERANCE = 1e-4  # of max|logits|
OPSET = 21  # 23 makes the exporter fuse a RotaryEmbedding that ONNX Runtime 1.32 refuses

CONV = torch.ops.rewriter.causal_conv1d.default
SSD = torch.ops.rewriter.ssd.default


def export_onnx(
    model: Any,
    folder: str | Path,
    *,
    attention: str = "fused",
    opset: int = OPSET,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Write `model` as `folder/model.onnx` and compare it with the graph in ONNX Runtime.

    Inputs of the file are those of the graph (input_ids [B, L], attention_mask [B, P + L],
    position_ids [B, L]) and, for the i-th state, past_key_i and past_value_i [B, Hk, P, D],
    or conv_state_i [B, C, k-1] and ssm_state_i [B, H, P, N] float32. Outputs are logits
    [B, L, V] and a `present_…` for each of these. A sequence starts with P = 0 and zeros.

    Args:
        model: a RewrittenModel.
        folder: must not hold anything yet; it appears whole or not at all.
        attention: "fused" (GroupQueryAttention where it can say what the graph says) or
            "standard" (MatMul and Softmax everywhere).
        opset: of the standard operators.
        tolerance: largest allowed max|Δ logits| / max|logits|.

    Returns: {file, bytes, ops: {operator: count}, max_error, fallbacks: [reason]}; it is also
    in `folder/export.json`.

    Raises:
        RewriterError: onnx or onnxruntime is missing, or the folder is in use.
        GateError: ONNX Runtime does not compute what the graph does; nothing is written.
    """
    check.require()
    if attention not in ("fused", "standard"):
        raise RewriterError(f"unknown attention lowering '{attention}'", "use fused or standard")
    fallbacks: list[str] = []
    graph: Graph = model.graph
    with whole_folder(folder) as aside:
        with torch.no_grad(), _evaluating(graph.module):
            module = widen(graph.module, fallbacks)
            example = check.Feeder(graph, module)
            exportable, names = lower_graph(graph, module, example, attention, fallbacks)
            file = aside / "model.onnx"
            _write(exportable, names, example, file, opset)
            ops = _count(file)
            errors = check.compare(graph, module, file, names, batched_chunks="fused" != attention)
        worst = max(errors.values())
        if not worst <= tolerance:  # also catches NaN
            raise GateError(
                f"ONNX Runtime differs from the graph by {worst:.1e} of max|logits| "
                f"(bound {tolerance:g}): " + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()),
                "try attention='standard', or report this model",
            )
        report = {
            "file": "model.onnx",
            "bytes": sum(p.stat().st_size for p in aside.iterdir()),
            "ops": ops,
            "max_error": worst,
            "errors": errors,
            "fallbacks": fallbacks,
            "opset": opset,
            "inputs": names["inputs"],
            "outputs": names["outputs"],
            "states": graph.states,
        }
        (aside / "export.json").write_text(json.dumps(report, indent=2) + "\n")
        _companions(model, aside)
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
    return GraphModule(_tree(root), graph)


def _tensor(module: torch.nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def _tree(tensors: dict[str, Tensor]) -> torch.nn.Module:
    root = torch.nn.Module()
    for name, value in tensors.items():
        at = root
        *owners, leaf = name.split(".")
        for part in owners:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        if isinstance(value, torch.nn.Parameter):
            at.register_parameter(leaf, value)
        else:
            at.register_buffer(leaf, value)
    return root


# ---- states as tensors, dialect ops as ONNX operators ----------------------------------------


def lower_graph(
    graph: Graph,
    module: GraphModule,
    example: check.Feeder,
    attention: str,
    fallbacks: list[str],
) -> tuple[GraphModule, dict[str, list[str]]]:
    """A module that shares `module`'s weights, takes and returns states as tensors.

    Returns it with the names of its inputs and outputs, in order.
    """
    fx = copy.deepcopy(module.graph)
    outputs: dict[str, Node] = {}
    biases: dict[tuple[Any, ...], Node] = {}
    for index in range(len(graph.states)):
        state = next(n for n in fx.nodes if n.op == "placeholder" and n.target == f"state_{index}")
        for user in list(state.users):
            if user.target is read:
                user.replace_all_uses_with(_input(fx, f"{user.args[1]}_state_{index}"))
            elif user.target is write:
                outputs[f"present_{user.args[1]}_state_{index}"] = user.args[2]
                user.replace_all_uses_with(user.args[2])
            elif user.target in (update_kv, update_ring):
                presents = _lower_cached(
                    fx, user, index, attention, example.shapes, biases, fallbacks
                )
                outputs[f"present_key_{index}"], outputs[f"present_value_{index}"] = presents
                continue
            fx.erase_node(user)
        fx.erase_node(state)
    for node in list(fx.nodes):
        if node.target is ATTENTION:
            _lower_standard(fx, node)
        elif node.target in (SSD, CONV):
            node.target = lower.ssd if node.target is SSD else lower.causal_conv1d
    if any(s["kind"] == "ring" for s in graph.states):
        fallbacks.append(
            "windows are literals over a cache that keeps all keys: ONNX Runtime's window-sized "
            "cache refuses an empty past, so decoding costs as much memory as full attention"
        )
    if any(n.target is lower.group_query_attention for n in fx.nodes):
        fallbacks.append(
            "GroupQueryAttention takes several new tokens after a past for batch 1 only: "
            "prefill a batch in one call, or export with attention='standard'"
        )
    out = next(n for n in fx.nodes if n.op == "output")
    first = out.args[0]
    heads = list(first.values()) if isinstance(first, dict) else first
    heads = list(heads) if isinstance(heads, (list, tuple)) else [heads]
    keys = graph.outputs or [f"output_{i}" for i in range(len(heads))]
    keep = [(k, n) for k, n in zip(keys, heads, strict=True) if isinstance(n, Node)]
    out.args = (tuple([n for _, n in keep] + list(outputs.values())),)
    fx.eliminate_dead_code()
    fx.lint()
    inputs = [str(n.target) for n in fx.nodes if n.op == "placeholder"]
    result = GraphModule(module, fx)
    return result, {"inputs": inputs, "outputs": [k for k, _ in keep] + list(outputs)}


def _input(fx: torch.fx.Graph, name: str) -> Node:
    last = [n for n in fx.nodes if n.op == "placeholder"][-1]
    with fx.inserting_after(last):
        return fx.placeholder(name)


def _lower_cached(
    fx: torch.fx.Graph,
    update: Node,
    index: int,
    lowering: str,
    shapes: dict[str, torch.Size],
    biases: dict[tuple[Any, ...], Node],
    fallbacks: list[str],
) -> tuple[Node, Node]:
    """One cached attention; returns the nodes of present_key and present_value."""
    _, key, value, mask = update.args[:4]
    taken = {u.args[1]: u for u in update.users if u.target is operator.getitem}
    node = next(u for u in taken[0].users if u.target is ATTENTION)
    get = lambda name: argument(node, name)  # noqa: E731
    pasts = [_input(fx, f"past_{kind}_{index}") for kind in ("key", "value")]
    why = (
        _not_fusable(node, mask, shapes)  # type: ignore[arg-type]
        if lowering == "fused"
        else "standard operators were asked for"
    )
    if why and lowering == "fused":
        fallbacks.append(f"{node.meta.get('path') or node.name}: standard operators, {why}")
    if 3 in taken:
        # The cache keeps every column, so key positions are plain.
        taken[3].replace_all_uses_with(None)  # type: ignore[arg-type]
    if 2 in taken:
        taken[2].replace_all_uses_with(mask)  # type: ignore[arg-type]
    if why:
        with fx.inserting_before(node):
            joined = [
                fx.call_function(torch.cat, ([past, new], 2))
                for past, new in zip(pasts, (key, value), strict=True)
            ]
        for position in (0, 1):
            taken[position].replace_all_uses_with(joined[position])
        presents = (joined[0], joined[1])
    else:
        window, sinks = get("window"), get("sinks")
        own = window if not sinks else 0  # the operator knows windows, but no sink tokens
        with fx.inserting_before(node):
            memo = (mask, window if sinks else 0, sinks if window else 0)
            if mask is not None and memo not in biases:
                biases[memo] = fx.call_function(
                    lower.attention_bias, (mask, get("query"), *memo[1:])
                )
            made = fx.call_function(
                lower.group_query_attention,
                (
                    *(get("query"), key, value, *pasts, biases.get(memo), get("sink_logits")),
                    *(get("scale"), own, get("softcap")),
                ),
            )
            output, *rest = (fx.call_function(operator.getitem, (made, i)) for i in range(3))
        node.replace_all_uses_with(output)
        fx.erase_node(node)
        presents = (rest[0], rest[1])
    for user in list(taken.values()):
        fx.erase_node(user)
    fx.erase_node(update)
    return presents


def _not_fusable(node: Node, mask: Node | None, shapes: dict[str, torch.Size]) -> str:
    """Why GroupQueryAttention cannot say what this node says; '' if it can."""
    shape = lambda n: shapes.get(n.name, ())  # noqa: E731
    if not argument(node, "causal"):
        return "the attention is not causal"
    if argument(node, "chunk"):
        return "the attention is chunked"
    if argument(node, "bias") is not None:
        return "the logits have a bias"
    if mask is not None and len(shape(mask)) != 2:
        return "the mask is dense"
    if argument(node, "sinks") and argument(node, "window") and mask is None:
        return "sinks need the padding mask"
    if shape(argument(node, "query"))[-1] != shape(argument(node, "value"))[-1]:  # type: ignore[misc]
        return "values are not as wide as keys"
    return ""


def _lower_standard(fx: torch.fx.Graph, node: Node) -> None:
    names = ["query", "key", "value", "mask", "bias", "sink_logits"]
    names += ["scale", "causal", "window", "chunk", "sinks", "softcap"]
    arguments = tuple(argument(node, n) for n in names)
    with fx.inserting_before(node):
        new = fx.call_function(lower.standard_attention, arguments)
    node.replace_all_uses_with(new)
    fx.erase_node(node)


# ---- writing -----------------------------------------------------------------------------------


def _write(
    module: GraphModule,
    names: dict[str, list[str]],
    example: check.Feeder,
    file: Path,
    opset: int,
) -> None:
    args = example.example(names["inputs"])
    dynamic = tuple({d: torch.export.Dim.AUTO for d in example.dynamic(n)} for n in names["inputs"])
    program = torch.export.export(
        module, args, dynamic_shapes=dynamic, prefer_deferred_runtime_asserts_over_guards=True
    )
    onnx = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        input_names=names["inputs"],
        output_names=names["outputs"],
        verbose=False,
    )
    for node in onnx.model.graph.all_nodes():  # type: ignore[union-attr]
        node.metadata_props.clear()  # Python stack traces: larger than a small model
    onnx.save(str(file), external_data=True)  # type: ignore[union-attr]


def _count(file: Path) -> dict[str, int]:
    import onnx

    graph = onnx.load(str(file), load_external_data=False).graph
    found = Counter(f"{n.domain}::{n.op_type}" for n in graph.node if n.domain)
    return dict(sorted(found.items())) | {"all": len(graph.node)}


def _companions(model: Any, folder: Path) -> None:
    """The configuration and the tokenizer files that travel with the model."""
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    for path in model.companions:
        shutil.copyfile(path, folder / path.name)
