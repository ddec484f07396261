"""Products with constant matrices and embeddings of a file as MatMulNBits and its kin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.backends.onnx.nodes import MICROSOFT, Nodes, static
from rewriter.backends.onnx.quantize.grids import Array, Grid, join

#: Matrices with fewer numbers stay as they are.
SMALLEST = 2048

#: (name, weights [N, K], whether rows are also looked up) -> a grid, or why there is none.
Choose = Callable[[str, Array, bool], "Grid | str"]
#: (name of an input [..., K], squared norm of each column of its weights [K]) -> columns.
Outliers = Callable[[str, Array], Array]


@dataclass
class Edited:
    """What happened to each matrix, by name.

    grids: those that are on a grid now. kept: why the others are not. turned: those that the
    file held as [K, N]. columns: those of each input that are multiplied in float.
    """

    grids: dict[str, Grid] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    turned: set[str] = field(default_factory=set)
    columns: dict[str, Array] = field(default_factory=dict)


@dataclass
class _Product:
    node: ir.Node
    turned: bool  # the weight is [K, N]
    bias: ir.Value | None = None


def product_inputs(model: ir.Model) -> list[str]:
    """Names of the values in the main graph that are multiplied by a matrix."""
    found: dict[str, None] = {}
    for weight in model.graph.initializers.values():
        if weight.dtype is ir.DataType.FLOAT and len(weight.shape or ()) == 2:
            uses = _uses(weight)
            for product in [] if isinstance(uses, str) else uses[0]:
                x = product.node.inputs[0]
                if product.node.graph is model.graph and x is not None:
                    found[str(x.name)] = None
    return list(found)


def quantise_nodes(model: ir.Model, choose: Choose, level: int, outliers: Outliers) -> Edited:
    """Edit `model`: each product with a matrix that `choose` gives a grid for, and each lookup.

    level: the accuracy_level of MatMulNBits. outliers: columns of an input to multiply in float.
    Products that read the same value become one, whose result is split.
    """
    edited = Edited()
    groups: dict[Any, list[tuple[_Product, Grid, str]]] = {}
    for weight in list(model.graph.initializers.values()):
        shape = weight.shape
        if weight.dtype is not ir.DataType.FLOAT or shape is None or len(shape) != 2:
            continue
        name = str(weight.name)
        found = _uses(weight)
        if isinstance(found, str):
            if static(weight, 0) * static(weight, 1) >= SMALLEST:
                edited.kept[name] = found
            continue
        products, lookups = found
        turned = bool(products) and products[0].turned
        array: Array = weight.const_value.numpy()  # type: ignore[union-attr]
        array = np.ascontiguousarray(array.T) if turned else array
        grid = choose(name, array, bool(lookups))
        if isinstance(grid, str):
            edited.kept[name] = grid
            continue
        edited.grids[name] = grid
        if turned:
            edited.turned.add(name)
        if lookups:
            _look_up(model, weight, lookups, grid)
        for product in products:
            alone = len(products) > 1 or bool(lookups) or product.bias is not None
            kind = (grid.bits, grid.block, grid.zeros is None, grid.minima is None)
            key = (product.node.inputs[0], product.node.graph, kind, name if alone else "")
            groups.setdefault(key, []).append((product, grid, name))
    thin = _Thin(model, outliers)
    for (x, *_), members in groups.items():
        thin.add(x, [g for _, g, _ in members])
    for members in groups.values():
        _multiply(model, members, level, thin)
    edited.columns = thin.columns
    for name in edited.grids:
        if not model.graph.initializers[name].uses():
            del model.graph.initializers[name]
    model.opset_imports.setdefault(MICROSOFT, 1)
    model.graph.sort()
    return edited


def _uses(weight: ir.Value) -> tuple[list[_Product], list[ir.Node]] | str:
    """The products and the lookups that read a matrix; a reason if there are other readers."""
    if static(weight, 0) * static(weight, 1) < SMALLEST or min(weight.shape or [0]) < 16:  # type: ignore[type-var, operator]
        return "it is small"
    products: list[_Product] = []
    lookups: list[ir.Node] = []
    for node, index in weight.uses():
        attribute = lambda key, default, n=node: (  # noqa: E731
            n.attributes[key].value if key in n.attributes else default
        )
        scaled = attribute("alpha", 1.0) != 1.0 or attribute("beta", 1.0) != 1.0
        if node.op_type == "Gather" and index == 0 and attribute("axis", 0) == 0:
            lookups.append(node)
        elif node.op_type == "MatMul" and index == 1:
            products.append(_Product(node, True))
        elif node.op_type in ("FusedMatMul", "Gemm") and index == 1 and not scaled:
            if any(attribute(k, 0) for k in ("transA", "transBatchA", "transBatchB")):
                return f"{node.op_type} transposes its input"
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            if bias is not None and (bias.shape is None or len(bias.shape) != 1):
                return "what its product adds is no vector"
            products.append(_Product(node, not attribute("transB", 0), bias))
        else:
            return f"{node.op_type} reads it"
    if not products and not lookups:
        return "nothing reads it"
    if len({p.turned for p in products} | ({False} if lookups else set())) > 1:
        return "it is read both as it is and transposed"
    return products, lookups


def _constant(model: ir.Model, name: str, array: Array) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.val(name, tensor.dtype, list(array.shape), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _look_up(model: ir.Model, weight: ir.Value, lookups: list[ir.Node], grid: Grid) -> None:
    """Rows of a grid, from the tensor that a product reads as well."""
    name = str(weight.name)
    data = _constant(model, f"{name}.quants", grid.packed())
    # One scale for each block of each row; MatMulNBits wants them as [N, K / block].
    scales = _constant(model, f"{name}.lookup_scales", grid.scales[..., None])
    for number, node in enumerate(lookups):
        op = Nodes(f"{name}.lookup_{number}")
        rows = op.GatherBlockQuantized(
            data,
            node.inputs[1],
            scales,
            domain=MICROSOFT,
            bits=grid.bits,
            block_size=grid.block,
            quantize_axis=2,
            gather_axis=0,
        )
        made = op.Reshape(
            rows, op.Concat(op.Shape(node.inputs[1]), op.constant([grid.columns]), axis=0)
        )
        _replace(node, op, [made], [node.outputs[0]])


def _multiply(
    model: ir.Model, members: list[tuple[_Product, Grid, str]], level: int, thin: _Thin
) -> None:
    """One MatMulNBits for products of one input, and its split."""
    first = members[0][0].node
    grid = join([g for _, g, _ in members])
    name = ".".join(dict.fromkeys(n for *_, n in members))
    op = Nodes(f"{name}.product_{first.name}")

    def constant(kind: str, array: Array | None) -> ir.Value | None:
        known = model.graph.initializers.get(f"{name}.{kind}")
        if known is not None or array is None:
            return known
        return _constant(model, f"{name}.{kind}", array)

    x, rest, matrix = thin.split(op, first.inputs[0], grid)
    inputs = [
        x,
        constant("quants", grid.packed()),
        constant("scales", grid.scales),
        constant("zeros", grid.packed_zeros()),
        None,
        members[0][0].bias,
    ]
    while inputs[-1] is None:
        inputs.pop()
    made = op.MatMulNBits(
        *inputs,
        domain=MICROSOFT,
        K=grid.columns,
        N=grid.rows,
        bits=grid.bits,
        block_size=grid.block,
        accuracy_level=level,
    )
    if matrix is not None:
        made = op.Add(made, op.MatMul(rest, constant("rest", matrix)))
    parts = [made]
    if len(members) > 1:
        sizes = op.constant([g.rows for _, g, _ in members])
        parts = op.Split(made, sizes, axis=-1, outputs=len(members))
    _replace(first, op, parts, [p.node.outputs[0] for p, *_ in members])
    for product, *_ in members[1:]:
        product.node.graph.remove(product.node, safe=True)  # type: ignore[union-attr]


class _Thin:
    """What of a product MatMulNBits does not do: minima, and columns that are multiplied in float.

    Both are a product of a few numbers for each row of the input, x @ table, with a thin matrix:
    sums of blocks with minima, and columns of x with those of the weights.
    """

    def __init__(self, model: ir.Model, outliers: Outliers) -> None:
        self.model, self.outliers = model, outliers
        self.energy: dict[str, Array] = {}
        self.columns: dict[str, Array] = {}
        self.made: dict[Any, Any] = {}

    def add(self, x: Any, grids: list[Grid]) -> None:
        """Say what reads x, before the first `split`."""
        found = sum((g.weights().astype(np.float64) ** 2).sum(0) for g in grids)
        name = str(x.name)
        self.energy[name] = self.energy.get(name, 0) + found

    def split(self, op: Nodes, x: Any, grid: Grid) -> tuple[Any, Any, Array | None]:
        """x for MatMulNBits; x @ table and the matrix that it is multiplied by, or None."""
        name = str(x.name)  # the value itself is another one once its product is replaced
        if name not in self.columns:
            self.columns[name] = self.outliers(name, self.energy[name])
        columns = self.columns[name]
        parts = [grid.weights()[:, columns].T] if len(columns) else []
        if grid.minima is not None:
            parts.insert(0, grid.minima.T)
        if not parts:
            return x, None, None
        sums = 0 if grid.minima is None else grid.minima.shape[1]
        key = (name, sums)
        if key not in self.made:
            self.made[key] = self._inputs(op, x, grid, columns, sums)
        return *self.made[key], np.ascontiguousarray(np.concatenate(parts))

    def _inputs(self, op: Nodes, x: Any, grid: Grid, columns: Array, sums: int) -> tuple[Any, Any]:
        mask = np.ones(grid.columns, np.float32)
        mask[columns] = 0
        table = np.kron(np.eye(sums), np.ones((grid.block, 1)))[: grid.columns]
        table = table.reshape(-1, sums) if sums else np.zeros((grid.columns, 0))
        picked = np.eye(grid.columns)[:, columns]
        table = np.concatenate([table * mask[:, None], picked], 1).astype(np.float32)
        name = f"block_sums_{grid.columns}" if not len(columns) else f"{x.name}.table_{sums}"
        known = self.model.graph.initializers.get(name)
        rest = op.MatMul(x, _constant(self.model, name, table) if known is None else known)
        return (op.Mul(x, mask) if len(columns) else x), rest


def _replace(node: ir.Node, op: Nodes, new: list[ir.Value], old: list[ir.Value]) -> None:
    for before, after in zip(old, new, strict=True):
        after.name, after.shape, after.type = before.name, before.shape, before.type
    node.graph.insert_before(node, op.made)  # type: ignore[union-attr]
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)  # type: ignore[union-attr]
