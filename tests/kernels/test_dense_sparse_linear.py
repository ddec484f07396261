"""`rewriter::dense_sparse_linear`: every form against the dense product in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from rewriter.kernels.dense_sparse_linear import cpu, dense_sparse_linear, reference
from rewriter.kernels.dense_sparse_linear import triton as kernels
from rewriter.kernels.low_rank_linear import low_rank_linear

pytestmark = pytest.mark.usefixtures("poison")

#: outputs, blocks, atoms, coefficients
SHAPES = {"one block": (70, 1, 40, 5), "four blocks": (144, 4, 20, 3), "all atoms": (48, 3, 16, 16)}
COLUMNS = 56


def make(shape: str, *rows: int, dtype: torch.dtype = torch.float32, integer=torch.uint8):
    m, p, k, s = SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=g)
    index = torch.stack([torch.randperm(k, generator=g)[:s] for _ in range(m)]).to(integer)
    floats = normal(*rows, COLUMNS), normal(p, k, COLUMNS), normal(m, s), normal(m)
    x, basis, value, bias = (t.to(dtype) for t in floats)
    return x, basis, index, value, bias


def wide(args):
    return tuple(t.double() if t.is_floating_point() else t for t in args)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative root mean square error."""
    assert actual.shape == expected.shape
    difference = actual.double() - expected.double()
    return float(difference.square().mean().sqrt() / expected.double().square().mean().sqrt())


FORMS = {
    "op": lambda *args: dense_sparse_linear(*args),
    "gather": partial(kernels.forward, many=False),
    "product": partial(kernels.forward, many=True),
}


@pytest.mark.parametrize("rows", [(1,), (3,), (2, 33)])
@pytest.mark.parametrize("shape", SHAPES)
def test_forms_equal_the_dense_product(shape: str, rows: tuple[int, ...]) -> None:
    args = make(shape, *rows)
    truth = reference.dense_sparse_linear(*wide(args))
    for name, form in FORMS.items():
        assert error(form(*args), truth) <= 1e-5, name
    truth = reference.dense_sparse_linear(*wide(args[:4]))
    for name, form in FORMS.items():
        assert error(form(*args[:4], None), truth) <= 1e-5, name


@pytest.mark.parametrize("integer", [torch.int16, torch.int32, torch.int64])
def test_index_types_and_repeated_entries(integer: torch.dtype) -> None:
    x, basis, index, value, bias = make("four blocks", 5, integer=integer)
    index[:, 1] = index[:, 0]
    args = (x, basis, index, value, bias)
    truth = reference.dense_sparse_linear(*wide(args))
    for name, form in FORMS.items():
        assert error(form(*args), truth) <= 1e-5, name


def test_bfloat16_is_no_further_from_the_truth_than_torch() -> None:
    args = make("one block", 65, dtype=torch.bfloat16)
    truth = reference.dense_sparse_linear(*wide(args))
    torchs = error(cpu.dense_sparse_linear(*args), truth)
    for many in (False, True):
        assert error(kernels.forward(*args, many=many), truth) <= 1.1 * torchs


@pytest.mark.parametrize("rows", [(1,), (2, 17)])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape: str, rows: tuple[int, ...]) -> None:
    args = make(shape, *rows)

    def gradients(form, args):
        x, basis, index, value, bias = args
        leaves = [t.detach().requires_grad_() for t in (x, basis, value, bias)]
        y = form(leaves[0], leaves[1], index, leaves[2], leaves[3])
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
        return torch.autograd.grad((y * weight).sum(), leaves)

    truth = gradients(reference.dense_sparse_linear, wide(args))
    for form in (dense_sparse_linear, cpu.dense_sparse_linear):
        for ours, theirs in zip(gradients(form, args), truth, strict=True):
            assert error(ours, theirs) <= 1e-5


def test_laws() -> None:
    """All atoms in order: a low-rank linear. An identity basis: any matrix."""
    x, basis, _, value, bias = make("all atoms", 9)
    every = torch.arange(16).expand(48, 16)
    ranks = low_rank_linear(x, basis.flatten(0, 1), list(value.split(16)), bias)
    assert error(dense_sparse_linear(x, basis, every, value, bias), ranks) <= 1e-5
    weight = torch.randn(30, COLUMNS)
    columns = torch.arange(COLUMNS).expand(30, COLUMNS)
    y = dense_sparse_linear(x, torch.eye(COLUMNS)[None], columns, weight)
    assert error(y, x @ weight.T) <= 1e-6


def test_wrong_shapes_are_named() -> None:
    x, basis, index, value, bias = make("four blocks", 3)
    with pytest.raises(ValueError, match="4 blocks do not divide 143"):
        dense_sparse_linear(x, basis, index[1:], value[1:], bias[1:])
    with pytest.raises(ValueError, match=r"value is \(144, 2\), expected \(144, 3\)"):
        dense_sparse_linear(x, basis, index, value[:, 1:], bias)
    with pytest.raises(ValueError, match="x has 55 columns, basis 56"):
        dense_sparse_linear(x[:, 1:], basis, index, value, bias)


def test_opcheck() -> None:
    x, basis, index, value, bias = make("one block", 4, 5)
    args = (x.requires_grad_(), basis.requires_grad_(), index, value.requires_grad_(), bias)
    torch.library.opcheck(
        torch.ops.rewriter.dense_sparse_linear.default,
        args,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
