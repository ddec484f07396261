"""The lowered graph as a file: traced, written as ONNX, cleaned up."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants_ir
from torch._dynamo.exc import UserError
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

from rewriter.backends.onnx.clean import clean
from rewriter.backends.onnx.nodes import MICROSOFT, Nodes, static
from rewriter.backends.onnx.registry import expand_nodes
from rewriter.graph import aten


def write(
    module: GraphModule,
    args: tuple[torch.Tensor, ...],
    dynamic: list[tuple[int, ...]],
    inputs: list[str],
    outputs: list[str],
    file: Path,
    opset: int,
    fused: bool,
) -> dict[str, int]:
    """Trace with `args` (`dynamic`: the dimensions of each that vary) and write `file`.

    Returns how often each operator of a domain of its own occurs, and `all` nodes.
    """
    _quiet()
    made = _translate(_traced(module, args, dynamic), inputs, outputs, opset)
    model: ir.Model = made.model
    _simplify(model)
    expand_nodes(model)
    turn_weights(model, fused)
    passes.RemoveUnusedNodesPass()(model)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # Python stack traces: larger than a small model
    model.opset_imports.setdefault(MICROSOFT, 1)
    used = {n.domain for n in model.graph.all_nodes()} | {""}
    for domain in list(model.opset_imports):
        if domain not in used:
            del model.opset_imports[domain]
    made.save(str(file), external_data=True)
    return count(model)


def _traced(
    module: GraphModule, args: tuple[torch.Tensor, ...], dynamic: list[tuple[int, ...]]
) -> torch.export.ExportedProgram:
    """Sizes that inputs share in the example are one dimension, said in advance: the tracer would
    find the batch of every state out by itself, which takes a third of its time. It is left to
    where the graph does not take a dimension so."""
    sizes = Counter(a.shape[d] for a, dims in zip(args, dynamic, strict=True) for d in dims)
    named = {n: torch.export.Dim(f"size_{n}") for n, times in sizes.items() if times > 1}

    def shapes(known: Mapping[int, Any]) -> tuple[dict[int, Any], ...]:
        auto, pairs = torch.export.Dim.AUTO, zip(args, dynamic, strict=True)
        return tuple({d: known.get(a.shape[d], auto) for d in dims} for a, dims in pairs)

    trace = partial(
        torch.export.export, module, args, prefer_deferred_runtime_asserts_over_guards=True
    )
    try:
        return trace(dynamic_shapes=shapes(named))
    except (UserError, ConstraintViolationError):
        return trace(dynamic_shapes=shapes({}))


def _translate(program: Any, inputs: list[str], outputs: list[str], opset: int) -> Any:
    """To ONNX as traced, which takes half the time; decomposed first where it cannot be."""
    options: dict[str, Any] = {"dynamo": True, "opset_version": opset, "verbose": False}
    options |= {"input_names": inputs, "output_names": outputs, "optimize": False}
    if _functional(program.graph):
        program.run_decompositions = lambda *_: program  # asked for by the exporter
        try:
            return torch.onnx.export(program, **options)
        except torch.onnx.OnnxExporterError:  # an operator that has no ONNX form as it is
            del program.run_decompositions
    return torch.onnx.export(program, **options)


def _simplify(model: ir.Model) -> None:
    """What onnxscript's optimiser does, without its rewrite rules: those take a minute for a
    graph of 30 recurrent layers, and ONNX Runtime has its own."""
    passes.InlinePass()(model)
    fold_constants_ir(model)
    clean(model)
    for each in (
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        each(model)


def _functional(graph: torch.fx.Graph) -> bool:
    """Spell casts as ONNX's translation knows them; whether no node changes its input."""
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target in (aten.to.dtype, aten.to.device):
            node.args = (node.args[0], node.args[1 + (node.target is aten.to.device)])
            node.target, node.kwargs = torch.ops.prims.convert_element_type.default, {}
        elif getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            return False
    return True


def _quiet() -> None:
    """The exporter warns of every operator of torchvision, which is not needed."""
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)


def count(model: ir.Model) -> dict[str, int]:
    nodes = list(model.graph.all_nodes())
    found = Counter(f"{n.domain}::{n.op_type}" for n in nodes if n.domain)
    return dict(sorted(found.items())) | {"all": len(nodes)}


def turn_weights(model: ir.Model, fused: bool) -> None:
    """Store the weights of linears as MatMul reads them, [in, out], in place of Transposes.

    A weight that is also read as it is (a tied embedding) stays, and its product is one that
    takes a transposed matrix: FusedMatMul, or Gemm on rows.
    """
    turned: dict[str, ir.Value] = {}
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer() or len(weight.shape or ()) != 2:
            continue
        if all(u.node.op_type == "Transpose" for u in weight.uses()):
            name = f"{weight.name}.transposed"
            if name not in turned:
                turned[name] = _transposed(weight, name)
                model.graph.register_initializer(turned[name])
            ir.convenience.replace_all_uses_with(node.outputs[0], turned[name])
        else:
            for product in [u.node for u in node.outputs[0].uses()]:
                if product.op_type == "MatMul" and product.inputs[1] is node.outputs[0]:
                    _multiply_transposed(model, product, weight, fused)
        if not node.outputs[0].uses():
            model.graph.remove(node, safe=True)
            if not weight.uses():
                del model.graph.initializers[weight.name]  # type: ignore[arg-type]


def _transposed(weight: ir.Value, name: str) -> ir.Value:
    source: Any = weight.const_value
    rows, columns = static(weight, 0), static(weight, 1)
    tensor = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(source.numpy().T)),
        dtype=source.dtype,
        shape=ir.Shape([columns, rows]),
        name=name,
    )
    return ir.val(name, source.dtype, [columns, rows], const_value=tensor)


def _multiply_transposed(model: ir.Model, product: ir.Node, weight: ir.Value, fused: bool) -> None:
    op, x, old = Nodes(f"{weight.name}.product"), product.inputs[0], product.outputs[0]
    if fused:
        new = op.FusedMatMul(x, weight, transB=1, domain=MICROSOFT)
    else:
        outs, ins = static(weight, 0), static(weight, 1)
        rows = op.Gemm(op.Reshape(x, [-1, ins]), weight, transB=1)
        sizes = op.Concat(op.Shape(x, start=0, end=-1), op.constant([outs]), axis=0)
        new = op.Reshape(rows, sizes)
    new.name, new.shape, new.type = old.name, old.shape, old.type
    model.graph.insert_before(product, op.made)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    model.graph.remove(product, safe=True)
    model.opset_imports.setdefault(MICROSOFT, 1)
