"""`rewriter::causal_conv1d` against the sum written out in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
from forms import assert_close, triton_form, values_and_gradients, with_junk
from torch import Tensor

from rewriter.kernels.causal_conv1d import causal_conv1d, reference
from rewriter.kernels.causal_conv1d import triton as kernels

pytestmark = pytest.mark.usefixtures("poison")

CHANNELS = 6
NAMES = ("x", "weight", "bias", "state")


def make(length: int, k: int = 4, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, length, CHANNELS), (CHANNELS, k), (CHANNELS,), (batch, CHANNELS, k - 1))
    return {n: torch.randn(s, generator=g) for n, s in zip(NAMES, shapes, strict=True)}


def written_out(x, weight, bias, state, mask=None, activation="silu"):
    """Independent of `reference.py`: torch's own convolution over [state | x]."""
    x = x if mask is None else x * mask[..., None].to(x.dtype)
    inputs = torch.cat([state, x.transpose(1, 2)], -1)
    y = torch.nn.functional.conv1d(inputs, weight[:, None], bias, groups=weight.shape[0])
    y = y * torch.sigmoid(y) if activation == "silu" else y
    return y.transpose(1, 2), inputs[..., x.shape[1] :]


def compare(form, inputs: dict[str, Tensor], **options) -> None:
    wide = {n: t.double() for n, t in inputs.items()}
    truth = values_and_gradients(written_out, wide, **options)
    for limit, run in ((1e-12, (reference.causal_conv1d, wide)), (1e-5, (form, inputs))):
        for name, value in values_and_gradients(*run, **options).items():
            assert_close(value, truth[name], name, limit)


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 197])
def test_op_equals_reference(length: int, k: int, activation: str) -> None:
    compare(causal_conv1d, make(length, k), activation=activation)


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 17, 63])
def test_triton_equals_reference(length: int, k: int, activation: str) -> None:
    compare(triton_form(kernels), make(length, k), activation=activation)


@pytest.mark.parametrize("form", [causal_conv1d, triton_form(kernels)])
def test_masked_tokens_are_inert_whatever_they_hold(form) -> None:
    inputs = make(21)
    mask = torch.rand(2, 21, generator=torch.Generator().manual_seed(1)) < 0.6
    compare(form, inputs, mask=mask, activation="silu")
    junk = with_junk(inputs, mask, ("x",))
    actual, expected = (
        values_and_gradients(form, i, mask=mask, activation="silu") for i in (junk, inputs)
    )
    assert all(torch.equal(actual[n], expected[n]) for n in expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_random_mask(dtype: torch.dtype) -> None:
    mask = (torch.rand(2, 63, generator=torch.Generator().manual_seed(1)) < 0.6).to(dtype)
    compare(causal_conv1d, make(63), mask=mask)


def test_optional_arguments() -> None:
    inputs = make(9)
    zeros = {n: torch.zeros_like(inputs[n]) for n in ("bias", "state")}
    expected = written_out(**{**inputs, **zeros})
    for actual, e in zip(causal_conv1d(inputs["x"], inputs["weight"]), expected, strict=True):
        assert_close(actual, e)


@pytest.mark.parametrize("split", [1, 2, 30, 64])
def test_prefill_in_two_pieces(split: int) -> None:
    inputs = make(65)
    y, final = causal_conv1d(**inputs)
    x = inputs.pop("x")
    first, middle = causal_conv1d(x[:, :split], **inputs)
    second, last = causal_conv1d(x[:, split:], **{**inputs, "state": middle})
    assert_close(torch.cat([first, second], 1), y)
    assert torch.equal(last, final)


def test_prefill_equals_steps() -> None:
    inputs = make(11)
    y, final = causal_conv1d(**inputs)
    steps, state = [], inputs["state"]
    for t in range(11):
        step, state = causal_conv1d(**{**inputs, "x": inputs["x"][:, t : t + 1], "state": state})
        steps.append(step)
    assert_close(torch.cat(steps, 1), y)
    assert torch.equal(state, final)


def test_state_is_the_last_inputs() -> None:
    inputs = make(9)
    assert torch.equal(causal_conv1d(**inputs)[1], inputs["x"][:, -3:].transpose(1, 2))


@pytest.mark.parametrize("length", [1, 2, 20])
def test_left_padding_equals_no_padding(length: int) -> None:
    inputs, padding = make(length), 5
    del inputs["state"]
    y, final = causal_conv1d(**inputs)
    junk = torch.full((2, padding, CHANNELS), float("nan"))
    padded = {**inputs, "x": torch.cat([junk, inputs["x"]], 1)}
    mask = torch.arange(length + padding).ge(padding).expand(2, -1)
    padded_y, padded_final = causal_conv1d(**padded, mask=mask)
    assert_close(padded_y[:, padding:], y)
    assert torch.equal(padded_final, final)


def test_causal() -> None:
    inputs, changed = make(20), make(20)
    changed["x"][:, 12] += 1
    y, other = causal_conv1d(**inputs)[0], causal_conv1d(**changed)[0]
    same = (y == other).all(-1).all(0)
    assert same.tolist() == [t < 12 or t > 15 for t in range(20)]


def test_rows_are_independent() -> None:
    inputs = make(20, batch=3)
    row = {n: t[1:2] if n in ("x", "state") else t for n, t in inputs.items()}
    for actual, expected in zip(causal_conv1d(**row), causal_conv1d(**inputs), strict=True):
        assert_close(actual, expected[1:2])


def test_low_precision() -> None:
    inputs = make(20)
    for form in (causal_conv1d, kernels.forward):
        y, final = form(**{n: t.bfloat16() for n, t in inputs.items()})
        assert y.dtype == final.dtype == torch.bfloat16
        assert_close(y, written_out(**inputs)[0], limit=1e-2)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="activation is 'relu'"):
        causal_conv1d(**make(5), activation="relu")
    with pytest.raises(ValueError, match="state is"):
        causal_conv1d(**{**make(5), "state": torch.zeros(2, CHANNELS, 4)})


def test_opcheck() -> None:
    args = tuple(t.requires_grad_() for t in make(9).values())
    mask = torch.arange(9).ge(4).expand(2, -1)
    op = torch.ops.rewriter.causal_conv1d.default
    torch.library.opcheck(op, (*args, mask, "silu"))
    cheap = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (*args[:2], None, None, None, "none"), test_utils=cheap)


def test_export_keeps_one_node() -> None:
    class Model(torch.nn.Module):
        def forward(self, x, weight, bias, state, mask):
            return causal_conv1d(x, weight, bias, state, mask)

    batch, time = torch.export.Dim("batch", min=1), torch.export.Dim("time", min=1)
    both = {0: batch, 1: time}
    program = torch.export.export(
        Model(),
        (*make(12).values(), torch.ones(2, 12, dtype=torch.bool)),
        dynamic_shapes=(both, None, None, {0: batch}, both),
    )
    calls = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert calls.count(torch.ops.rewriter.causal_conv1d.default) == 1
    assert not [c for c in calls if str(c).startswith("aten")]
    for length in (1, 70):
        longer = make(length, batch=3)
        actual = program.module()(*longer.values(), torch.ones(3, length, dtype=torch.bool))
        for a, e in zip(actual, causal_conv1d(**longer), strict=True):
            assert_close(a, e)
