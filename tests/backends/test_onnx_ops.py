"""Ops of the dialect, one at a time: ONNX Runtime against the op's reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")

import onnxruntime  # noqa: E402

import rewriter.kernels.linear_attention  # noqa: E402, F401  registers the op
import rewriter.kernels.low_rank_linear  # noqa: E402, F401
from rewriter.backends.onnx.capabilities import capabilities  # noqa: E402
from rewriter.backends.onnx.ops import (  # noqa: E402
    attention,
    block_sparse_attention,
    dense_sparse_linear,
    hybrid_attention,
    linear_attention,
    low_rank_linear,
    selective_scan,
)
from rewriter.backends.onnx.registry import Context, lower_nodes  # noqa: E402
from rewriter.backends.onnx.write import write  # noqa: E402
from rewriter.errors import RewriterError  # noqa: E402


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


# ---- hybrid attention ----------------------------------------------------------------------------

HEADS, GROUPS, WIDTH, DEPTH, SIZE, WINDOW, SINKS = 4, 2, 8, 6, 10, 8, 3
#: window of blocks, feature heads, logits of features, reference, sinks
HYBRIDS = {
    "features as tokens": (True, GROUPS, True, "none", SINKS),
    "features of every head, relative to the mean": (True, HEADS, True, "mean", SINKS),
    "a sum, relative to the largest": (True, GROUPS, False, "max", 0),
    "a sliding window": (False, HEADS, False, "none", SINKS),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrid_attention(name: str, tmp_path) -> None:
    """Padding anywhere in two rows; a prefill, steps, and stretches that end inside a block."""
    from rewriter.kernels.hybrid_attention.reference import hybrid_attention as reference

    aligned, parts, logits, level, sinks = HYBRIDS[name]
    query_map, key_map = torch.randn(HEADS, WIDTH, SIZE) / 4, torch.randn(parts, WIDTH, SIZE) / 4
    pull = torch.randn(HEADS, WIDTH, 1) / 4

    def maps(query, key):
        key = key.repeat_interleave(parts // GROUPS, 1)
        return query @ query_map, torch.softmax(key @ key_map, -1), (query @ pull).squeeze(-1) + 1

    def lowered(query, key, value, mask, *pasts):
        x, key_features, gate = maps(query, key)
        return hybrid_attention.hybrid_attention(
            query, key, value, x if logits else torch.softmax(x, -1), key_features, gate, mask,
            *pasts, WIDTH**-0.5, WINDOW, aligned, sinks, level, 20.0, logits,
        )  # fmt: skip

    def tokens(batch: int, length: int) -> list[torch.Tensor]:
        shapes = [(HEADS, WIDTH), (GROUPS, WIDTH), (GROUPS, DEPTH)]
        return [torch.randn(batch, heads, length, width) for heads, width in shapes]

    slots = sinks + WINDOW * (1 + aligned)
    start = lambda batch: [  # noqa: E731
        torch.zeros(batch, GROUPS, slots, WIDTH),
        torch.zeros(batch, GROUPS, slots, DEPTH),
        torch.zeros(batch, parts, SIZE, DEPTH),
        torch.zeros(batch, parts, SIZE),
        torch.zeros(batch, dtype=torch.int64),
    ]
    example = (*tokens(3, 5), torch.ones(3, 5, dtype=torch.int64), *start(3))
    dynamic = [(0, 2)] * 3 + [(0, 1)] + [(0,)] * 5
    run = session(lowered, example, dynamic, tmp_path)

    lengths = [21, 1, 1, 30, 3, *[1] * 20, 9]
    query, key, value = tokens(2, sum(lengths))
    mask = (torch.rand(2, sum(lengths)) < 0.8).long()
    mask[0, :25] = 0  # a row that begins later than the other
    held, made, at = [t.numpy() for t in start(2)], [], 0
    for new in lengths:
        part = [t[:, :, at : at + new].numpy() for t in (query, key, value)]
        feed = [*part, mask[:, at : at + new].numpy(), *held]
        y, *held = run.run(None, {f"x{i}": t for i, t in enumerate(feed)})
        made.append(torch.from_numpy(y))
        at += new
    x, key_features, gate = maps(query, key)
    gate = gate + torch.logsumexp(x, -1) if logits else gate
    want = reference(
        *(t.double() for t in (query, key, value, torch.softmax(x, -1), key_features, gate)),
        mask,
        scale=WIDTH**-0.5,
        window=WINDOW,
        block_aligned=aligned,
        sinks=sinks,
        reference=level,
        far_cap=20.0,
    )
    real = mask.bool()
    assert relative(torch.cat(made, 1)[real].numpy(), want[real]) < 1e-5
    assert torch.equal(torch.from_numpy(held[-1]), mask.sum(1))


def test_outputs_of_padding_are_those_of_a_token(tmp_path) -> None:
    """GroupQueryAttention leaves them unwritten, and what reads them next may meet a NaN there."""
    lengths = capabilities().query_lengths  # without them padding is a bias, and all is written

    def lowered(query, key, value, past_key, past_value, mask):
        return attention.grouped_query(
            query, key, value, past_key, past_value, mask, None, 0.3, 0, 0.0, lengths
        )[0]

    def inputs(batch: int, length: int, past: int) -> tuple[torch.Tensor, ...]:
        made = [torch.randn(batch, h, length, 8) for h in (4, 2, 2)]
        made += [torch.zeros(batch, 2, past, 8)] * 2
        return (*made, torch.ones(batch, past + length).long())

    run = session(lowered, inputs(3, 4, 5), [(0, 2)] * 5 + [(0, 1)], tmp_path)
    args = inputs(2, 6, 0)
    args[-1][0, :2] = 0
    y = run.run(None, {f"x{i}": a.numpy() for i, a in enumerate(args)})[0]
    assert np.array_equal(y[0, :2], y[0, [2, 2]]) or (not lengths and np.isfinite(y).all())


# ---- others --------------------------------------------------------------------------------------


def test_selective_scan(tmp_path) -> None:
    """A padded batch in one call, then one token."""
    from rewriter.kernels.selective_scan.reference import selective_scan as reference

    decay, skip = -torch.rand(6, 4), torch.randn(6)

    def inputs(batch: int, length: int) -> tuple[torch.Tensor, ...]:
        r = torch.randn
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, : length // 3] = 0
        made = [r(batch, length, 6), torch.rand(batch, length, 6)]
        made += [r(batch, length, 4), r(batch, length, 4)]
        return (*made, r(batch, 6, 4), mask)

    def lowered(x, dt, b, c, state, mask):
        return selective_scan.selective_scan(x, dt, decay, b, c, skip, state, mask)

    dynamic = [(0, 1)] * 4 + [(0,), (0, 1)]
    run = session(lowered, inputs(3, 5), dynamic, tmp_path)
    for batch, length in ((2, 17), (4, 1)):
        x, dt, b, c, state, mask = args = inputs(batch, length)
        got = run.run(None, {f"x{i}": a.numpy() for i, a in enumerate(args)})
        real = mask.bool()
        y, after = reference(x, dt, decay, b, c, skip, state, mask)
        assert relative(torch.from_numpy(got[0])[real].numpy(), y[real]) < 1e-5
        assert relative(got[1], after) < 1e-5


@pytest.mark.parametrize("blocks", [1, 3])
def test_dense_sparse_linear(blocks: int, tmp_path) -> None:
    """A place may be named twice: the values add."""
    from rewriter.kernels.dense_sparse_linear.reference import dense_sparse_linear as reference

    basis, bias = torch.randn(blocks, 5, 12), torch.randn(9)
    index, value = torch.randint(0, 5, (9, 4), dtype=torch.int32), torch.randn(9, 4)

    def lowered(x):
        return dense_sparse_linear.two_products(x, basis, index, value, bias)

    run = session(lowered, (torch.randn(3, 5, 12),), [(0, 1)], tmp_path)
    x = torch.randn(2, 7, 12)
    got = run.run(None, {"x0": x.numpy()})[0]
    assert relative(got, reference(x, basis, index, value, bias)) < 1e-5


@pytest.mark.parametrize("length", [24, 1])
def test_block_sparse_attention(length: int, tmp_path) -> None:
    """The plan of a prefill and of a step after it; its lists are inputs of the file."""
    from rewriter.kernels.block_sparse_attention.reference import (
        block_sparse_attention as reference,
    )

    block, options = min(8, length), (True, 0, 0, 0.0)
    lists = torch.tensor([[0, -1, -1], [0, 1, -1], [0, 2, -1]], dtype=torch.int32)[-(length // 8) :]
    index = lists.expand(1, 2, -1, -1).contiguous()
    count = (index >= 0).sum(-1).int()
    full = (count - 1).contiguous()

    def inputs(batch: int) -> tuple[torch.Tensor, ...]:
        mask = torch.ones(batch, 24, dtype=torch.long)
        mask[0, :3] = 0
        made = [torch.randn(batch, h, n, 8) for h, n in ((4, length), (2, 24), (2, 24))]
        return (*made, index, count, full, mask)

    def lowered(query, key, value, index, count, full, mask):
        return call(block_sparse_attention.masked, query, key, value, index, count, full, mask)

    def call(function, *args):
        return function(*args, *[None] * 6, 0.3, block, 8, *options)

    run = session(lowered, inputs(3), [(0,)] * 3 + [()] * 3 + [(0,)], tmp_path)
    args = inputs(2)
    got = run.run(None, {f"x{i}": a.numpy() for i, a in enumerate(args)})
    want, lse = call(reference, *args)
    assert relative(got[0], want) < 1e-5
    seen = torch.isfinite(lse)
    assert np.array_equal(np.isfinite(got[1]), seen.numpy())
    assert relative(got[1][seen.numpy()], lse[seen]) < 1e-5


def test_an_op_without_a_lowering_is_named() -> None:
    fx = torch.fx.Graph()
    x = fx.placeholder("x")
    fx.output(fx.call_function(torch.ops.rewriter.gated_rms_norm.default, (x, None, x, 1e-6, 1)))
    with pytest.raises(RewriterError, match="gated_rms_norm"):
        lower_nodes(Context(fx, {}, "fused", capabilities()))


@pytest.mark.parametrize("fixed", [False, True])
def test_a_dimension_that_the_graph_fixes(fixed: bool, tmp_path, monkeypatch) -> None:
    """Equal sizes of inputs are traced as one dimension, and again where that is not so."""
    constant, traced, export = torch.randn(3, 1), [], torch.export.export

    def function(x, y):
        return (x + constant) * y if fixed else x * y

    def counted(*args, **options):
        traced.append(options["dynamic_shapes"])
        return export(*args, **options)

    monkeypatch.setattr(torch.export, "export", counted)
    run = session(function, (torch.randn(3, 5), torch.randn(3, 5)), [(0, 1), (0, 1)], tmp_path)
    assert torch.export.Dim.AUTO not in traced[0][0].values()
    assert traced[0][0] == traced[0][1] and len(traced) == 1 + fixed
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    assert relative(run.run(None, {"x0": x.numpy(), "x1": y.numpy()})[0], function(x, y)) < 1e-6
