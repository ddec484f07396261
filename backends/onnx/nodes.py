"""A few lines to write ONNX nodes by hand: `op.MatMul(a, b)`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import onnx_ir as ir

#: Domain of nodes that exist only between tracing and expansion.
DOMAIN = "rewriter"
MICROSOFT = "com.microsoft"


class Nodes:
    """Appends nodes to `made`. Inputs are values, None, numbers or numpy arrays (constants).

    prefix: of the values' names, which must not occur twice in a model, subgraphs included.
    """

    def __init__(self, prefix: str, numbers: Iterator[int] | None = None) -> None:
        self.made: list[ir.Node] = []
        self.prefix, self.numbers = prefix, numbers or count()

    def inner(self) -> Nodes:
        """For the nodes of a subgraph."""
        return Nodes(self.prefix, self.numbers)

    def __getattr__(self, op_type: str) -> Any:
        return partial(self.call, op_type)

    def call(
        self, op_type: str, *inputs: Any, domain: str = "", outputs: int = 1, **attributes: Any
    ) -> Any:
        """The node's output value, or a list of them if `outputs` is not 1."""
        values = [x if x is None or isinstance(x, ir.Value) else self.constant(x) for x in inputs]
        node = ir.node(op_type, values, attributes, domain=domain, num_outputs=outputs)
        node.name = f"{self.prefix}/{op_type}_{next(self.numbers)}"
        for i, output in enumerate(node.outputs):
            output.name = f"{node.name}:{i}"
        self.made.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def constant(self, value: Any) -> ir.Value:
        """Integers become int64, floats float32."""
        array = np.asarray(value)
        array = array.astype({"i": np.int64, "f": np.float32}.get(array.dtype.kind, array.dtype))
        return self.call("Constant", value=ir.tensor(array))

    def size(self, value: ir.Value, dimension: int) -> ir.Value:
        """One dimension of a value, int64 [1]."""
        return self.Shape(value, start=dimension, end=dimension + 1)

    def shape(self, *sizes: Any) -> ir.Value:
        """A target of Reshape from numbers and int64 [1] values."""
        parts = [s if isinstance(s, ir.Value) else self.constant([s]) for s in sizes]
        return self.Concat(*parts, axis=0)

    def graph(self, name: str, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Graph:
        """What was made so far as the body of an If, Loop or Scan."""
        return ir.Graph(inputs, outputs, nodes=self.made, name=name)


def static(value: ir.Value, dimension: int) -> int:
    """A dimension that does not vary."""
    assert value.shape is not None
    return int(value.shape[dimension])  # type: ignore[arg-type]


def rows_of(op: Nodes, value: ir.Value) -> ir.Value:
    """[B, H, L, D] as [B, L, H D]; what only made it four-dimensional is undone."""
    heads, width = static(value, 1), static(value, 3)
    made = value.producer()
    if made is not None and made.op_type == "Transpose" and _perm(made) == [0, 2, 1, 3]:
        value = made.inputs[0]  # type: ignore[assignment]
        made = value.producer()
        flat = made.inputs[0] if made is not None and made.op_type == "Reshape" else None
        if flat is not None and len(flat.shape or ()) == 3 and flat.shape[2] == heads * width:  # type: ignore[index]
            return flat
    else:
        value = op.Transpose(value, perm=[0, 2, 1, 3])
    return op.Reshape(value, [0, 0, heads * width])


def _perm(node: ir.Node) -> list[int]:
    return list(node.attributes["perm"].as_ints())
