"""`rewriter::low_rank_linear`: every form against the dense product in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from rewriter.kernels.low_rank_linear import cpu, low_rank_linear, reference
from rewriter.kernels.low_rank_linear import triton as kernels

pytestmark = pytest.mark.usefixtures("poison")

#: outputs and rank of each sibling; ranks that are no multiple of a tile, and one that is.
SIBLINGS = {
    "one": [(40, 24)],
    "gate_up": [(70, 16), (70, 33)],
    "qkv": [(48, 20), (16, 16), (130, 9)],
}
COLUMNS = 72


def make(siblings: list[tuple[int, int]], *rows: int, pivot: bool = False, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=g)
    second = [normal(m - r if pivot else m, r) for m, r in siblings]
    order, start = [], 0
    for m, _ in siblings:
        order.append(start + torch.randperm(m, generator=g))
        start += m
    return (
        normal(*rows, COLUMNS),
        normal(sum(r for _, r in siblings), COLUMNS),
        second,
        normal(start),
        torch.cat(order) if pivot else None,
    )


def wide(args):
    x, first, second, bias, order = args
    bias = None if bias is None else bias.double()
    return x.double(), first.double(), [s.double() for s in second], bias, order


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative root mean square error."""
    assert actual.shape == expected.shape
    if not expected.numel():
        return 0.0
    difference = actual.double() - expected.double()
    return float(difference.square().mean().sqrt() / expected.double().square().mean().sqrt())


FORMS = {
    "op": lambda *args: low_rank_linear(*args),
    "second_factor": partial(kernels.forward, fused=False),
    "both_factors": partial(kernels.forward, fused=True),
}


@pytest.mark.parametrize("pivot", [False, True])
@pytest.mark.parametrize("rows", [(1,), (63,), (2, 65)])
@pytest.mark.parametrize("siblings", SIBLINGS)
def test_forms_equal_the_dense_product(siblings: str, rows: tuple[int, ...], pivot: bool) -> None:
    args = make(SIBLINGS[siblings], *rows, pivot=pivot)
    truth = reference.low_rank_linear(*wide(args))
    for name, form in FORMS.items():
        if not (pivot and name == "both_factors"):
            assert error(form(*args), truth) <= 1e-5, name
    args = (*args[:3], None, args[4])
    truth = reference.low_rank_linear(*wide(args))
    assert error(low_rank_linear(*args), truth) <= 1e-5
    assert error(kernels.forward(*args), truth) <= 1e-5


@pytest.mark.parametrize("pivot", [False, True])
def test_bfloat16_is_no_further_from_the_truth_than_torch(pivot: bool) -> None:
    args = make(SIBLINGS["qkv"], 65, pivot=pivot)
    x, first, second, bias, order = args
    half = (x.bfloat16(), first.bfloat16(), [s.bfloat16() for s in second], bias.bfloat16(), order)
    truth = reference.low_rank_linear(*wide(half))
    torchs = error(cpu.low_rank_linear(*half), truth)
    for fused in (False, True) if not pivot else (False,):
        made = kernels.forward(*half, fused=fused)
        assert made.dtype == torch.bfloat16
        assert error(made, truth) <= 1.1 * torchs


@pytest.mark.parametrize("pivot", [False, True])
@pytest.mark.parametrize("siblings", SIBLINGS)
def test_gradients(siblings: str, pivot: bool) -> None:
    args = make(SIBLINGS[siblings], 2, 33, pivot=pivot)

    def gradients(form, args):
        x, first, second, bias, order = args
        leaves = [t.detach().requires_grad_() for t in (x, first, bias, *second)]
        y = form(leaves[0], leaves[1], leaves[3:], leaves[2], order)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
        return torch.autograd.grad((y * weight).sum(), leaves)

    truth = gradients(reference.low_rank_linear, wide(args))
    for form in (low_rank_linear, cpu.low_rank_linear):
        for ours, theirs in zip(gradients(form, args), truth, strict=True):
            assert error(ours, theirs) <= 1e-5


def test_packing_is_exact_and_the_pivot_form_holds_what_it_stands_for() -> None:
    x, first, second, bias, _ = make(SIBLINGS["qkv"], 19)
    packed = low_rank_linear(x, first, second, bias)
    start, rank = 0, 0
    for factor in second:
        m, r = factor.shape
        alone = low_rank_linear(x, first[rank : rank + r], [factor], bias[start : start + m])
        assert error(packed[:, start : start + m], alone) <= 1e-6
        start, rank = start + m, rank + r

    from rewriter.linear_algebra import to_pivot

    a, b = second[0].double(), first[: second[0].shape[1]].double()
    form = to_pivot(a, b)
    y = low_rank_linear(x.double(), form.pivot, [form.rest], None, form.order)
    assert error(y, x.double() @ (a @ b).T) <= 1e-10


def test_all_pivots_and_no_rest() -> None:
    """Rank m: the pivot rows are all the rows, and the second factor has none."""
    g = torch.Generator().manual_seed(0)
    x, first = torch.randn(5, COLUMNS, generator=g), torch.randn(24, COLUMNS, generator=g)
    args = (x, first, [torch.empty(0, 24)], None, torch.randperm(24, generator=g))
    truth = reference.low_rank_linear(*wide(args))
    assert error(low_rank_linear(*args), truth) <= 1e-5
    assert error(kernels.forward(*args), truth) <= 1e-5


def test_more_siblings_than_the_kernel_takes_and_other_types_run_in_torch() -> None:
    args = make([(8, 4)] * 5, 3)
    assert error(kernels.forward(*args), reference.low_rank_linear(*wide(args))) <= 1e-5
    args = wide(make(SIBLINGS["one"], 3))
    assert error(kernels.forward(*args), reference.low_rank_linear(*args)) <= 1e-12


def test_wrong_shapes_are_named() -> None:
    x, first, second, bias, _ = make(SIBLINGS["gate_up"], 3)
    with pytest.raises(ValueError, match="the ranks add up to 16"):
        low_rank_linear(x, first, second[:1], bias)
    with pytest.raises(ValueError, match="x has 71 columns"):
        low_rank_linear(x[:, 1:], first, second, bias)
    with pytest.raises(ValueError, match=r"bias is \(139,\), expected \(140,\)"):
        low_rank_linear(x, first, second, bias[1:])


@pytest.mark.parametrize("pivot", [False, True])
def test_opcheck_and_export(pivot: bool) -> None:
    x, first, second, bias, order = make(SIBLINGS["gate_up"], 4, 5, pivot=pivot)
    leaves = (x.requires_grad_(), first.requires_grad_(), second, bias.requires_grad_(), order)
    torch.library.opcheck(
        torch.ops.rewriter.low_rank_linear.default,
        leaves,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )

    class Model(torch.nn.Module):
        def forward(self, x):
            return low_rank_linear(x, first.detach(), second, bias.detach(), order)

    rows = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}
    program = torch.export.export(Model(), (x.detach(),), dynamic_shapes=(rows,))
    calls = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert torch.ops.rewriter.low_rank_linear.default in calls
    longer = make(SIBLINGS["gate_up"], 3, 17, seed=1)[0]
    torch.testing.assert_close(program.module()(longer), Model()(longer))
