"""Any model to one canonical graph."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from rewriter import attention_interface
from rewriter.encoder_decoder import own_sizes
from rewriter.errors import CaptureError, RewriterError
from rewriter.examples import BATCH, example_inputs, generates
from rewriter.graph import ATTENTION, Graph, argument, aten, place, set_argument
from rewriter.growing_cache import GROW, growing_cache
from rewriter.lift import lift
from rewriter.lift.matching import expression
from rewriter.state import decodes_alike

ASSERTIONS = ("_assert", "sym_constrain", "_guards_fn")


def capture(model: nn.Module | str | Path, *, meta: bool = False, example: Any = None) -> Graph:
    """Capture a model as a canonical graph.

    Args:
        model: a transformers model, any `nn.Module`, a local folder, a `.gguf` file or a
            Hub id.
        meta: with a folder or an id, build the model on the meta device: no weights are read.
        example: for a plain module, a tuple of example inputs whose first two dimensions
            are batch and sequence.

    Raises:
        CaptureError: the model cannot be exported as one graph; the message says where.
    """
    if not isinstance(model, nn.Module):
        from rewriter.loading import load_model

        model = load_model(model, meta=meta)
    if isinstance(model, PreTrainedModel):
        return _capture_transformers(model)
    if example is None:
        raise CaptureError(
            f"{type(model).__name__} is not a transformers model, so its inputs are unknown",
            "give `example=` with a tuple of example inputs",
        )
    return _capture_plain(model, example)


# ---- transformers -------------------------------------------------------------------------


@contextmanager
def _quiet(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, no cache, our attention; everything is put back afterwards."""
    configs = [c for c in (model.config, *_sub_configs(model)) if hasattr(c, "use_cache")]
    caches = [c.use_cache for c in configs]
    implementation = model.config._attn_implementation
    training = model.training
    model.eval()
    try:
        for c in configs:
            c.use_cache = False
        model.set_attn_implementation(attention_interface.NAME)
        yield
    finally:
        model.set_attn_implementation(implementation)
        for c, value in zip(configs, caches, strict=True):
            c.use_cache = value
        model.train(training)


def _sub_configs(model: PreTrainedModel) -> list[Any]:
    return [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]


class _Flat(nn.Module):
    """A transformers model with flat tensor inputs and flat tensor outputs."""

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.names = model, list(inputs)
        self.tokens = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
        self.padding = self.tokens.replace("input_ids", "attention_mask")
        self.paired = self.tokens != "input_ids" and self.padding in inputs
        self.cache = self.paired  # whether to run with a `growing_cache`
        self.keys: list[str] = []
        self.output_class: type = ModelOutput

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        given: dict[str, Any] = dict(zip(self.names, values, strict=True))
        if self.cache:
            total, new = given[self.padding].shape[1], given[self.tokens].shape[1]
            given["past_key_values"] = growing_cache(total, new, self.paired)
        output = self.model(**given, return_dict=True)
        flat = {k: v for k, v in output.items() if isinstance(v, Tensor)}
        self.keys, self.output_class = list(flat), type(output)
        return tuple(flat.values())


def _capture_transformers(model: PreTrainedModel) -> Graph:
    inputs = example_inputs(model)
    meta = any(p.is_meta for p in model.parameters())
    graph, failure = None, None
    with torch.no_grad(), attention_interface.session() as session, _quiet(model):
        flat = _Flat(model, inputs).eval()
        with torch.device("meta") if meta else nullcontext():
            flat(*inputs.values())
        for longer, cache in _attempts(model, flat):
            flat.cache = cache
            shapes = dict(inputs)
            if longer:  # the mask's length must be a symbol of its own
                extra = torch.ones(BATCH, 5, dtype=torch.long, device=model.device)
                shapes[flat.padding] = torch.cat([inputs[flat.padding], extra], 1)
            if graph is not None and not longer:
                break  # right without a past
            session.start_export()
            try:
                program = _export(flat, shapes)
            except RewriterError:
                raise
            except Exception as error:
                failure = error
                continue
            graph = _named(program, flat)
            graph.decodes = longer and (meta or decodes_alike(graph, list(inputs.values())))
            if graph.decodes:
                break
    if graph is None:
        assert failure is not None
        raise _explain(model, failure) from failure
    if "position_ids" in inputs:
        graph.default_positions = _default_positions(model)
    return graph


def _attempts(model: PreTrainedModel, flat: _Flat) -> list[tuple[bool, bool]]:
    """Ways to export: (the mask has a length of its own, the past comes from a cache).

    With positions for an input the mask may say all; some models need a cache to ask (falcon,
    bloom, chunked masks). One that ties its mask to the tokens in any case carries no state.
    """
    if not (flat.paired or generates(model)):
        return [(False, False)]
    cached = "past_key_values" in inspect.signature(model.forward).parameters
    placed = "position_ids" in flat.names
    return [(True, False)] * placed + [(True, True)] * cached + [(False, False)]


def _named(program: Any, flat: _Flat) -> Graph:
    """The canonical graph of an export, with the original's names for inputs and outputs."""
    graph = _canonical(program, prefix="model.")
    graph.config = flat.model.config
    graph.model_class = type(flat.model).__name__
    graph.inputs, graph.outputs = list(flat.names), flat.keys
    graph.output_class = f"{flat.output_class.__module__}.{flat.output_class.__qualname__}"
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for node, name in zip(placeholders, flat.names, strict=True):
        node.target = name
        node._rename(name)
    _guard_sizes(graph)
    _ungrow(graph, flat.padding)
    own_sizes(graph)
    graph.module.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _dynamic(name: str) -> range:
    """Dimensions of an input that vary: the batch, and the length where there is one."""
    return range(1 if name in ("pixel_values", "input_features") else 2)


def _ungrow(graph: Graph, padding: str) -> None:
    """Keys and values without the past that `growing_cache` pretended; sizes from the mask."""
    mask = graph.placeholder(padding)
    for node in graph.nodes:
        if node.target is not GROW:
            continue
        for user in list(node.users):
            if user.target is aten.sym_size.int and user.args[1] in (2, -2):
                user.args = (mask, 1)
        node.replace_all_uses_with(node.all_input_nodes[0])


def _guard_sizes(graph: Graph) -> None:
    """Refuse other sizes than the example's where the model's own code fixed them."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    anchor = graph.nodes[graph.nodes.index(placeholders[-1]) + 1]
    for node in placeholders:
        for dim in _dynamic(str(node.target)):
            fixed = expression(node.meta["val"].shape[dim])
            if not isinstance(fixed, int):
                continue
            message = (
                f"{graph.model_class} ties its graph to {node.target} of size {fixed} "
                f"in dimension {dim}: it runs at no other"
            )
            with graph.module.graph.inserting_before(anchor):
                size = graph.call(aten.sym_size.int, node, dim)
                same = graph.call(operator.eq, size, fixed)
                graph.call(aten._assert_scalar.default, same, message)
            size.meta["val"], same.meta["val"] = fixed, True


def _export(flat: _Flat, inputs: dict[str, Tensor]) -> Any:
    auto = tuple(dict.fromkeys(_dynamic(n), torch.export.Dim.AUTO) for n in inputs)
    return torch.export.export(flat, tuple(inputs.values()), dynamic_shapes=(auto,), strict=False)


def _explain(model: nn.Module, error: Exception) -> CaptureError:
    first = str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)
    return CaptureError(f"{type(model).__name__} could not be exported as one graph: {first}")


def _default_positions(model: PreTrainedModel) -> str:
    """What the original does without position_ids: count columns, or real tokens."""
    if any(p.is_meta for p in model.parameters()):
        return "column"
    inputs = example_inputs(model)
    mask = inputs["attention_mask"]
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    real = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        given = {k: v for k, v in inputs.items() if k != "position_ids"}
        truth, by_column, by_mask = (
            model(**given, **extra, use_cache=False).logits[0, -1]
            for extra in ({}, {"position_ids": columns}, {"position_ids": real})
        )
    near = (truth - by_column).abs().max() <= (truth - by_mask).abs().max()
    return "column" if near else "mask"


# ---- plain modules ------------------------------------------------------------------------


def _capture_plain(model: nn.Module, example: Any) -> Graph:
    args = example if isinstance(example, tuple) else (example,)
    shapes = tuple(
        {d: torch.export.Dim.AUTO for d in range(min(2, a.dim()))}
        if isinstance(a, Tensor)
        else None
        for a in args
    )
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            program = torch.export.export(model, args, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise _explain(model, error) from error
    finally:
        model.train(training)
    graph = _canonical(program, prefix="")
    graph.model_class = type(model).__name__
    graph.inputs = [str(n.target) for n in graph.nodes if n.op == "placeholder"]
    return graph


# ---- canonical form -----------------------------------------------------------------------


def _canonical(program: Any, prefix: str) -> Graph:
    exported = program.module()
    graph = exported.graph
    for node in list(graph.nodes):
        if any(word in str(node.target) for word in ASSERTIONS) and node.op != "placeholder":
            graph.erase_node(node)
    for node in graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = str(stack[-1][0]) if stack else ""
        node.meta["path"] = path.removeprefix(prefix.rstrip(".")).removeprefix(".")
    for node in list(graph.nodes):
        _strip(graph, node)
        _as_linear(graph, node)
    graph.set_codegen(CodeGen())
    root = nn.Module()
    _copy_tensors(exported, root, graph, prefix)
    module = GraphModule(root, graph)
    _flatten_output(module)
    for node in module.graph.nodes:  # a stack trace a node is most of its size
        node.meta = {k: v for k, v in node.meta.items() if k in ("val", "path")}
    misses = lift(module)
    for node in module.graph.nodes:
        if node.target is ATTENTION and _is_zeros(argument(node, "bias")):
            set_argument(node, "bias", None)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    result = Graph(module=module, near_misses=misses)
    result.source_tensors = {name for name, _ in result.parameters()}
    return result


def _copy_tensors(source: nn.Module, root: nn.Module, graph: torch.fx.Graph, prefix: str) -> None:
    """Share the tensors that the graph reads, under their original names; ties become one."""
    names: dict[int, str] = {}
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        owner, _, leaf = str(node.target).rpartition(".")
        tensor = getattr(source.get_submodule(owner), leaf)
        name = names.setdefault(id(tensor), str(node.target).removeprefix(prefix))
        node.target = name
        node.meta["path"] = name.rpartition(".")[0]
        place(root, name, tensor)


def _strip(graph: torch.fx.Graph, node: Node) -> None:
    """Remove ops that do nothing at inference."""
    same: Any = None
    if node.target in (aten.dropout.default, aten.lift_fresh_copy.default, aten.alias.default):
        same = node.args[0]
    elif node.target in (aten.detach.default, aten.detach_.default):
        same = node.args[0]
    elif node.target is aten.to.dtype and len(node.args) > 1:
        value = node.all_input_nodes[0].meta.get("val")
        if isinstance(value, Tensor) and value.dtype == node.args[1]:
            same = node.args[0]
    if isinstance(same, Node):
        node.replace_all_uses_with(same)
        graph.erase_node(node)


def _as_linear(graph: torch.fx.Graph, node: Node) -> None:
    """`x @ weight.T` (falcon) as the linear that it is."""
    if node.target is not aten.matmul.default:
        return
    value, turned = node.args
    if not isinstance(turned, Node) or turned.target not in (aten.numpy_T.default, aten.t.default):
        return
    weight = turned.all_input_nodes[0]
    if weight.op == "get_attr" and weight.meta["val"].dim() == 2:
        node.target, node.args = aten.linear.default, (value, weight)


def _is_zeros(value: Any) -> bool:
    return isinstance(value, Node) and value.target is aten.zeros.default


def _flatten_output(module: GraphModule) -> None:
    output = next(n for n in module.graph.nodes if n.op == "output")
    value = output.args[0]
    if isinstance(value, Node):
        value = (value,)
    output.args = (tuple(value),)


def model_output(class_path: str, values: dict[str, Tensor]) -> ModelOutput | dict[str, Tensor]:
    """Rebuild the original's output class from the graph's outputs."""
    import importlib

    module, _, name = class_path.rpartition(".")
    if not module.startswith("transformers."):
        return values
    return getattr(importlib.import_module(module), name)(**values)


__all__ = ["capture", "example_inputs", "generates", "model_output"]
