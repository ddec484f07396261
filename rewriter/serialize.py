"""The rewritten graph as JSON: a versioned list of nodes over ATen and `rewriter::` ops.

Nothing in it executes: operators are looked up by name in torch's registry and in a short
table of Python functions.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node

from rewriter import state
from rewriter.errors import RewriterError
from rewriter.graph import Graph, place

VERSION = 1
NAMESPACES = ("aten", "rewriter")
PYTHON = (
    {
        f"operator.{n}": getattr(operator, n)
        for n in (
            "getitem",
            "add",
            "sub",
            "mul",
            "floordiv",
            "mod",
            "neg",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "truediv",
            "pow",
            "and_",
            "or_",
        )
    }
    | {f"state.{n}": f for n, f in state.FUNCTIONS.items()}
    | {
        "torch.sym_max": torch.sym_max,
        "torch.sym_min": torch.sym_min,
        "torch.sym_not": torch.sym_not,
        "torch.sym_float": torch.sym_float,
        "torch.sym_int": torch.sym_int,
        "math.trunc": __import__("math").trunc,
    }
)
_NAMES = {id(f): n for n, f in PYTHON.items()}


def dump(graph: Graph) -> dict[str, Any]:
    """Graph to JSON-able data. Raises RewriterError for an op that cannot be saved."""
    schemas: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        entry: dict[str, Any] = {"name": node.name, "op": node.op}
        if node.op == "call_function":
            entry["target"] = _target_name(node.target)
            if isinstance(node.target, torch._ops.OpOverload):
                schemas[entry["target"]] = str(node.target._schema)
        else:
            entry["target"] = str(node.target)
        if node.op not in ("placeholder", "get_attr"):
            entry["args"] = _encode(node.args)
            if node.kwargs:
                entry["kwargs"] = _encode(dict(node.kwargs))
        if path := node.meta.get("path"):
            entry["path"] = path
        nodes.append(entry)
    return {
        "version": VERSION,
        "model_class": graph.model_class,
        "inputs": graph.inputs,
        "outputs": graph.outputs,
        "output_class": graph.output_class,
        "decodes": graph.decodes,
        "default_positions": graph.default_positions,
        "states": graph.states,
        "schemas": schemas,
        "nodes": nodes,
    }


def load(data: dict[str, Any], tensors: dict[str, nn.Parameter | torch.Tensor]) -> Graph:
    """JSON data and tensors by name back to a graph, without tracing.

    Raises RewriterError that names a missing tensor, a missing op or a changed schema.
    """
    if data.get("version") != VERSION:
        raise RewriterError(
            f"graph.json has version {data.get('version')}, this rewriter reads {VERSION}",
            "save the model again with this version",
        )
    for name, schema in data["schemas"].items():
        if str(_target(name)._schema) != schema:
            raise RewriterError(f"the schema of {name} has changed", f"it was saved as {schema}")
    root = nn.Module()
    fx = FxGraph()
    made: dict[str, Node] = {}
    for entry in data["nodes"]:
        kind, target = entry["op"], entry["target"]
        if kind == "placeholder":
            default = (None,) if target.startswith("state_") else ()
            node = fx.create_node("placeholder", target, default, name=entry["name"])
        elif kind == "get_attr":
            if target not in tensors:
                raise RewriterError(f"the weights lack {target}", "the folder is incomplete")
            place(root, target, tensors[target])
            node = fx.create_node("get_attr", target, name=entry["name"])
        elif kind == "call_function":
            args, kwargs = _decode(entry["args"], made), _decode(entry.get("kwargs", {}), made)
            node = fx.create_node(
                "call_function", _target(target), tuple(args), kwargs, entry["name"]
            )
        elif kind == "output":
            node = fx.output(tuple(_decode(entry["args"], made)[0]))
        else:
            raise RewriterError(f"graph.json has an unknown kind of node: {kind}")
        node.meta["path"] = entry.get("path", "")
        made[entry["name"]] = node
    module = GraphModule(root, fx)
    result = Graph(module=module)
    told = ("model_class", "inputs", "outputs", "output_class", "decodes", "default_positions")
    for key in (*told, "states"):
        setattr(result, key, data[key])
    result.source_tensors = set(tensors)
    return result


def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload) and target.namespace in NAMESPACES:
        return str(target)
    if id(target) in _NAMES:
        return _NAMES[id(target)]
    raise RewriterError(f"the graph calls {target}, which cannot be saved")


def _target(name: str) -> Any:
    if name in PYTHON:
        return PYTHON[name]
    space, _, rest = name.partition(".")
    op, _, overload = rest.partition(".")
    if space not in NAMESPACES:
        raise RewriterError(f"graph.json calls {name}, which is not an operator of {NAMESPACES}")
    try:
        return getattr(getattr(getattr(torch.ops, space), op), overload or "default")
    except AttributeError:
        raise RewriterError(
            f"this installation has no operator {name}", "install the version that saved it"
        ) from None


def _encode(value: Any) -> Any:
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if isinstance(value, dict):
        return {"dict": {k: _encode(v) for k, v in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_encode(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "cpu"}  # loading puts in where the tensors are
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise RewriterError(f"a node has an argument of type {type(value).__name__}: cannot be saved")


def _decode(value: Any, made: dict[str, Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, made) for v in value]
    if not isinstance(value, dict):
        return value
    if not value:
        return {}
    ((kind, inner),) = value.items()
    if kind == "node":
        return made[inner]
    if kind == "tuple":
        return tuple(_decode(v, made) for v in inner)
    if kind == "dict":
        return {k: _decode(v, made) for k, v in inner.items()}
    if kind == "slice":
        return slice(*(_decode(v, made) for v in inner))
    if kind == "torch":
        known = getattr(torch, inner, None)
        if not isinstance(known, (torch.dtype, torch.layout, torch.memory_format)):
            raise RewriterError(f"graph.json names an unknown torch value: {inner}")
        return known
    if kind == "device":
        return torch.device(inner)
    if kind == "float":
        return float(inner)
    raise RewriterError(f"graph.json has an unknown kind of value: {kind}")
