"""Ops of the dialect, one at a time: ONNX Runtime against the op's reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")

import onnxruntime  # noqa: E402

import rewriter.kernels.linear_attention  # noqa: E402, F401  registers the op
import rewriter.kernels.low_rank_linear  # noqa: E402, F401
from rewriter.backends.onnx.ops import linear_attention, low_rank_linear  # noqa: E402
from rewriter.backends.onnx.write import write  # noqa: E402


def relative(got: np.ndarray, want: torch.Tensor) -> float:
    return float((torch.from_numpy(got) - want).abs().max() / want.abs().max())


def session(function, args, dynamic, tmp_path):
    """The function of tensors as a session; `dynamic`: dimensions of each that vary."""

    names = [f"x{i}" for i in range(len(args))]
    fx = torch.fx.Graph()  # torch.export wants one named argument an input
    fx.output(fx.call_function(function, tuple(fx.placeholder(n) for n in names)))
    module, file = torch.fx.GraphModule(torch.nn.Module(), fx), tmp_path / "model.onnx"
    with torch.no_grad():
        made = function(*args)
        outputs = [f"y{i}" for i in range(len(made) if isinstance(made, tuple) else 1)]
        write(module, args, dynamic, names, outputs, file, 21, fused=True)
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


RULES = {
    "linear": (False, False, False),
    "normalised": (False, False, True),
    "gated, normalised": (True, False, True),
    "gated": (True, False, False),
    "delta": (False, True, False),
    "gated delta": (True, True, False),
}


@pytest.mark.parametrize("form", ["with_operator", "with_scan"])
@pytest.mark.parametrize("rule", RULES)
def test_linear_attention(rule: str, form: str, tmp_path) -> None:
    """Four queries to two states, a key channel decay where there is one; padding; both lengths."""
    from rewriter.kernels.linear_attention.reference import linear_attention as reference

    gated, delta, normalise = RULES[rule]

    def inputs(batch: int, length: int) -> tuple[torch.Tensor, ...]:
        r = torch.randn
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, : length // 3] = 0
        q, k = r(batch, length, 4, 6).abs(), r(batch, length, 2, 6).abs()
        k = torch.nn.functional.normalize(k, dim=-1)
        state, z = r(batch, 2, 6, 8), r(batch, 2, 6).abs() + 1
        made = [q, k, r(batch, length, 2, 8), state, mask]
        made += [z] if normalise else []
        made += [-r(batch, length, 2, 6).abs()] if gated else []
        return (*made, *([torch.rand(batch, length, 2)] if delta else []))

    def call(function, q, k, v, state, mask, *rest):
        rest = list(rest)
        z = rest.pop(0) if normalise else None
        decay = rest.pop(0) if gated else None
        beta = rest.pop(0) if delta else None
        made = function(q, k, v, decay, beta, 0.7, normalise, state, z, mask)
        return made if normalise else made[:2]

    lowered = getattr(linear_attention, form)
    dynamic = [(0, 1) if t.shape[:2] == (3, 5) else (0,) for t in inputs(3, 5)]

    def function(*args):
        return call(lowered, *args)

    run = session(function, inputs(3, 5), dynamic, tmp_path)
    for batch, length in ((2, 33), (4, 1)):
        args = inputs(batch, length)
        got = run.run(None, {f"x{i}": a.numpy() for i, a in enumerate(args)})
        for value, want in zip(got, call(reference, *args), strict=True):
            assert relative(value, want) < 1e-5


@pytest.mark.parametrize("pivots", [False, True])
def test_low_rank_linear(pivots: bool, tmp_path) -> None:
    """Two outputs of one input, ranks 3 and 5; with the pivot form, rows put back in order."""
    from rewriter.kernels.low_rank_linear.reference import low_rank_linear as reference

    first, bias = torch.randn(8, 12), torch.randn(15)
    second = [torch.randn(7, 3), torch.randn(8, 5)]
    order = None
    if pivots:
        bias, order = torch.randn(23), torch.randperm(23)

    def lowered(x):
        return low_rank_linear.two_products(x, first, second, bias, order)

    run = session(lowered, (torch.randn(3, 5, 12),), [(0, 1)], tmp_path)
    x = torch.randn(2, 9, 12)
    assert (
        relative(run.run(None, {"x0": x.numpy()})[0], reference(x, first, second, bias, order))
        < 1e-5
    )
