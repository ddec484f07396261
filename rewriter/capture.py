"""Any model to one canonical graph."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
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


def _capture_transformers(model: PreTrainedModel) -> Graph:
    inputs = example_inputs(model)
    paired = model.config.is_encoder_decoder and "decoder_attention_mask" in inputs
    stateful = paired or (generates(model) and "position_ids" in inputs)
    tokens, padding = (
        ("decoder_input_ids", "decoder_attention_mask")
        if paired
        else ("input_ids", "attention_mask")
    )
    seen: dict[str, Any] = {"cache": paired}

    class Wrapper(nn.Module):  # flat tensor inputs, flat tensor outputs
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
            given: dict[str, Any] = dict(zip(inputs, values, strict=True))
            if seen["cache"]:
                total, new = given[padding].shape[1], given[tokens].shape[1]
                given["past_key_values"] = growing_cache(total, new, paired)
            output = self.model(**given, return_dict=True)
            flat = {k: v for k, v in output.items() if isinstance(v, Tensor)}
            seen["keys"], seen["class"] = list(flat), type(output)
            return tuple(flat.values())

    def dynamic(name: str, value: Tensor) -> dict[int, Any]:
        rank = 1 if name in ("pixel_values", "input_features") else 2
        return dict.fromkeys(range(rank), torch.export.Dim.AUTO)

    auto = {name: dynamic(name, value) for name, value in inputs.items()}
    with torch.no_grad(), attention_interface.session() as session, _quiet(model):
        wrapper = Wrapper().eval()

        def attempt(longer: bool, cache: bool) -> Any:
            """Export with the mask's length a symbol of its own, or tied to the tokens'."""
            seen["cache"], shapes = cache, dict(inputs)
            if longer:
                extra = torch.ones(BATCH, 5, dtype=torch.long, device=model.device)
                shapes[padding] = torch.cat([inputs[padding], extra], 1)
            session.start_export()
            return _export(wrapper, shapes, auto)

        if any(p.is_meta for p in model.parameters()):
            with torch.device("meta"):
                wrapper(*inputs.values())
        else:
            wrapper(*inputs.values())
        try:
            program = attempt(longer=stateful, cache=paired)
        except RewriterError:
            raise
        except Exception as first:
            if not stateful:
                raise _explain(model, first) from first
            # Some models tie the mask's length to the tokens' (falcon, bloom): no state then.
            try:
                program = attempt(longer=False, cache=False)
            except Exception as error:
                raise _explain(model, error) from error
    graph = _canonical(program, prefix="model.")
    graph.config = model.config
    graph.model_class = type(model).__name__
    graph.outputs = seen["keys"]
    graph.output_class = f"{seen['class'].__module__}.{seen['class'].__qualname__}"
    graph.inputs = list(inputs)
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for node, name in zip(placeholders, inputs, strict=True):
        node.target = name
        node._rename(name)
    _guard_sizes(graph, {k: list(dims) for k, dims in auto.items()})
    _ungrow(graph, padding)
    own_sizes(graph)
    graph.module.graph.eliminate_dead_code()
    graph.recompile()
    if stateful and not paired:
        graph.default_positions = _default_positions(model)
    return graph


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


def _guard_sizes(graph: Graph, dynamic: dict[str, list[int]]) -> None:
    """Refuse other sizes than the example's where the model's own code fixed them."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    anchor = graph.nodes[graph.nodes.index(placeholders[-1]) + 1]
    for node in placeholders:
        for dim in dynamic[str(node.target)]:
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


def _export(module: nn.Module, inputs: dict[str, Tensor], shapes: dict[str, Any]) -> Any:
    return torch.export.export(
        module, tuple(inputs.values()), dynamic_shapes=(tuple(shapes.values()),), strict=False
    )


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
