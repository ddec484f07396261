"""Reshapes with sizes from run time become reshapes with constant targets, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

import onnx_ir as ir  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402
from onnx_ir.passes import common as passes  # noqa: E402

from rewriter.backends.onnx.clean import clean  # noqa: E402

#: Steps from x [B, L, 12]: an operator, and the shape it makes; names are sizes that vary.
CHAINS = {
    "split heads": [("Reshape", ["B", "L", 3, 4])],
    "split and join": [("Reshape", ["B", "L", 3, 4]), ("Reshape", ["B", "L", 12])],
    "flattened": [("Reshape", ["B*L", 12])],
    "rows": [("Reshape", ["B*L", 12]), ("Reshape", ["B", "L", 3, 4])],
    "unsqueezed": [("Reshape", ["B", "L", 1, 12]), ("Expand", ["B", "L", 5, 12])],
    "repeated heads": [
        ("Reshape", ["B", "L", 3, 1, 4]), ("Expand", ["B", "L", 3, 2, 4]),
        ("Reshape", ["B", "L", 24]),
    ],
    "widened by what varies": [("Reshape", ["B", "L", 1, 12]), ("Expand", ["B", "L", "L", 12])],
    "two that vary move": [("Reshape", ["L", "B", 12])],
}  # fmt: skip
#: Sizes that no constant can give: both 0 (as in the input) and -1 are taken or wrong there.
KEPT = {"widened by what varies", "two that vary move"}


def model(chain: str) -> onnx.ModelProto:
    """As the exporter writes it: every size that varies comes from a Shape of the input."""
    nodes, infos, constants = [], [], []

    def number(value: int) -> str:
        name = f"c{value}"
        if name not in [c.name for c in constants]:
            constants.append(helper.make_tensor(name, TensorProto.INT64, [1], [value]))
        return name

    nodes.append(helper.make_node("Shape", ["x"], ["B"], start=0, end=1))
    nodes.append(helper.make_node("Shape", ["x"], ["L"], start=1, end=2))
    nodes.append(helper.make_node("Mul", ["B", "L"], ["B*L"]))
    value = "x"
    for i, (kind, sizes) in enumerate(CHAINS[chain]):
        parts = [s if isinstance(s, str) else number(s) for s in sizes]
        nodes.append(helper.make_node("Concat", parts, [f"t{i}"], axis=0))
        nodes.append(helper.make_node(kind, [value, f"t{i}"], [f"y{i}"]))
        infos.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, sizes))
        value = f"y{i}"
    nodes.append(helper.make_node("Neg", [value], ["y"]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "L", 12])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, CHAINS[chain][-1][1])
    graph = helper.make_graph(nodes, "chain", [x], [y], constants, value_info=infos)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(made: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("chain", CHAINS)
def test_same_values_for_every_size(chain):
    before = model(chain)
    graph = ir.from_proto(before)
    clean(graph)
    passes.RemoveUnusedNodesPass()(graph)
    after = ir.to_proto(graph)
    onnx.checker.check_model(after)
    for batch, length in ((1, 1), (1, 7), (3, 1), (2, 5), (5, 5)):
        x = np.arange(batch * length * 12, dtype=np.float32).reshape(batch, length, 12)
        assert np.array_equal(run(after, x), run(before, x))
    kinds = {n.op_type for n in after.graph.node}
    assert ("Shape" in kinds) == (chain in KEPT), kinds
    assert not clean(graph) or chain in KEPT  # nothing is left to do


def test_no_tokens():
    """A first call has an empty past, which goes through the same reshapes."""
    graph = ir.from_proto(model("split heads"))
    clean(graph)
    passes.RemoveUnusedNodesPass()(graph)
    assert run(ir.to_proto(graph), np.zeros((2, 0, 12), np.float32)).shape == (2, 0, 3, 4)
