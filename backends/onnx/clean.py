"""Shorten what tracing leaves behind: reshapes whose sizes are computed at run time.

A traced reshape asks for the sizes that vary with Shape, Slice and Concat, five nodes that cost
more than the work of a one-token call. Shapes are known, with a symbol for each size that
varies: a target says 0 (as in the input) or -1 (what is left) where a number does not do.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from rewriter.backends.onnx.nodes import Nodes

RESHAPES = {"Reshape", "Unsqueeze", "Squeeze", "Flatten"}


def clean(model: ir.Model) -> bool:
    """Returns whether anything changed. Unused nodes stay."""
    changed = False
    for node in list(model.graph):
        if node.domain or node.op_type not in RESHAPES | {"Expand"}:
            continue
        source, made = node.inputs[0], node.outputs[0]
        if source is None or source.shape is None or made.shape is None:
            continue
        root = source if node.op_type == "Expand" else _root(made)
        if _equal(root.shape, made.shape) and not made.is_graph_output():  # type: ignore[arg-type]
            ir.convenience.replace_all_uses_with(made, root)
            changed = True
        elif node.op_type == "Expand":
            target: list[Any] | None = [
                1 if a == b else b for a, b in _aligned(source.shape, made.shape)
            ]
            changed |= _set_target(model, node, source, target)
        else:
            target = _target(root.shape, made.shape)  # type: ignore[arg-type]
            if target is None:
                root, target = source, _target(source.shape, made.shape)
            if root is not source or node.op_type == "Reshape":
                changed |= _set_target(model, node, root, target)
    return changed


def _root(value: ir.Value) -> ir.Value:
    """What a chain of reshapes starts from."""
    while (node := value.producer()) is not None and node.op_type in RESHAPES and not node.domain:
        before = node.inputs[0]
        if before is None or before.shape is None:
            return value
        value = before
    return value


def _equal(a: ir.Shape, b: ir.Shape) -> bool:
    return len(a) == len(b) and all(_known(x) and x == y for x, y in zip(a, b, strict=True))


def _known(size: Any) -> bool:
    """A number, or a symbol with a name: nameless ones are not equal to each other."""
    return isinstance(size, int) or size.value is not None


def _aligned(small: ir.Shape, large: ir.Shape) -> list[tuple[Any, Any]]:
    sizes = [1] * (len(large) - len(small)) + list(small)
    return list(zip(sizes, large, strict=True))


def _target(source: ir.Shape, made: ir.Shape) -> list[Any] | None:
    """A constant target of Reshape, or None."""
    target: list[Any] = []
    for i, size in enumerate(made):
        same = i < len(source) and _known(size) and source[i] == size
        target.append(0 if same and not isinstance(size, int) else size)
    unknown = [i for i, size in enumerate(target) if not isinstance(size, int)]
    if len(unknown) > 1 or 0 in [s for s in made if isinstance(s, int)]:
        return None
    for i in unknown:
        target[i] = -1
    return target


def _set_target(model: ir.Model, node: ir.Node, source: ir.Value, target: Any) -> bool:
    """Make `node` a Reshape or Expand of `source` to a constant target."""
    if target is None or not all(isinstance(size, int) for size in target):
        return False
    old = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] else None
    if node.inputs[0] is source and old is not None and old.op_type == "Constant":
        return False
    made = node.outputs[0]
    op = Nodes(f"{made.name}/plain")
    kind = "Expand" if node.op_type == "Expand" else "Reshape"
    new = op.call(kind, source, target)
    name = made.name
    new.shape, new.type = made.shape, made.type
    model.graph.insert_before(node, op.made)
    ir.convenience.replace_all_uses_with(made, new, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    new.name = name
    return True
