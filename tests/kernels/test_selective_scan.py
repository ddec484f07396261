"""`rewriter::selective_scan`: every form against the float64 recurrence, and its laws."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from forms import assert_close, compare, triton_form, values_and_gradients, with_junk
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import softplus

from rewriter.kernels.selective_scan import reference, selective_scan
from rewriter.kernels.selective_scan import triton as kernels
from rewriter.kernels.ssd import ssd

pytestmark = pytest.mark.usefixtures("poison")
law = settings(max_examples=10, deadline=None, derandomize=True)
TOKENS = ("x", "dt", "B", "C")


def make(length: int, channels: int = 10, size: int = 6, batch: int = 2) -> dict[str, Tensor]:
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    return {
        "x": normal(batch, length, channels),
        "dt": softplus(normal(batch, length, channels) - 2),
        "A": -torch.linspace(0.1, 16, channels * size).reshape(channels, size),
        "B": normal(batch, length, size),
        "C": normal(batch, length, size),
        "D": normal(channels),
        "state": normal(batch, channels, size),
    }


def cut(inputs: dict[str, Tensor], start: int, stop: int, state: Tensor) -> dict[str, Tensor]:
    parts = {n: t[:, start:stop] if n in TOKENS else t for n, t in inputs.items()}
    return parts | {"state": state}


@pytest.mark.parametrize("length", [1, 15, 16, 63, 130])
def test_op_equals_reference(length: int) -> None:
    compare(selective_scan, reference.selective_scan, make(length))


@pytest.mark.parametrize(("length", "channels", "size"), [(1, 10, 6), (33, 70, 16), (70, 9, 3)])
def test_triton_equals_reference(length: int, channels: int, size: int) -> None:
    inputs = make(length, channels, size, batch=2 if length == 1 else 1)
    compare(triton_form(kernels), reference.selective_scan, inputs)


@pytest.mark.parametrize("form", [selective_scan, triton_form(kernels)])
def test_masked_tokens_are_inert_whatever_they_hold(form) -> None:
    inputs = make(21)
    mask = torch.rand(2, 21, generator=torch.Generator().manual_seed(1)) < 0.6
    compare(form, reference.selective_scan, inputs, mask=mask)
    junk = with_junk(inputs, mask, TOKENS)
    actual, expected = (values_and_gradients(form, i, mask=mask) for i in (junk, inputs))
    assert all(torch.equal(actual[n], expected[n]) for n in expected)


def test_optional_arguments() -> None:
    inputs = make(20)
    zeros = {n: torch.zeros_like(inputs[n]) for n in ("D", "state")}
    few = {n: t for n, t in inputs.items() if n not in zeros}
    for form in (selective_scan, kernels.forward):
        expected = reference.selective_scan(**few, **zeros)
        for a, e in zip(form(**few), expected, strict=True):
            assert_close(a, e)


def test_strong_decay_stays_finite() -> None:
    inputs = make(40)
    inputs["dt"] = inputs["dt"] + 50
    compare(selective_scan, reference.selective_scan, inputs)


@law
@given(length=st.integers(2, 40), data=st.data())
def test_split_anywhere(length: int, data) -> None:
    split = data.draw(st.integers(1, length - 1))
    inputs = make(length)
    y, final = selective_scan(**inputs)
    first, middle = selective_scan(**cut(inputs, 0, split, inputs["state"]))
    second, last = selective_scan(**cut(inputs, split, length, middle))
    assert_close(torch.cat([first, second], 1), y)
    assert_close(last, final)


@law
@given(length=st.integers(1, 40))
def test_one_decay_a_head_is_ssd(length: int) -> None:
    inputs = make(length, channels=12)
    A, dt = -torch.linspace(0.1, 4, 3), inputs["dt"][..., ::4]
    inputs |= {"dt": dt.repeat_interleave(4, 2), "A": A.repeat_interleave(4)[:, None].expand(12, 6)}
    y, final = selective_scan(**inputs)
    heads = {n: inputs[n].unflatten(-1, (3, 4)) for n in ("x",)}
    other, last = ssd(
        heads["x"], dt, A, inputs["B"][:, :, None], inputs["C"][:, :, None],
        state=inputs["state"].unflatten(1, (3, 4)),
    )  # fmt: skip
    assert_close(y, other.flatten(2) + inputs["D"] * inputs["x"])
    assert_close(final, last.flatten(1, 2))


@law
@given(token=st.integers(0, 39))
def test_causal(token: int) -> None:
    inputs, changed = make(40), make(40)
    changed["x"][:, token] += 1
    y, other = selective_scan(**inputs)[0], selective_scan(**changed)[0]
    assert torch.equal(y[:, :token], other[:, :token])
    assert not torch.equal(y[:, token], other[:, token])


def test_rows_are_independent() -> None:
    inputs = make(20, batch=3)
    alone = {n: t if n in ("A", "D") else t[1:2] for n, t in inputs.items()}
    for a, e in zip(selective_scan(**alone), selective_scan(**inputs), strict=True):
        assert_close(a, e[1:2])


def test_low_precision_keeps_a_float32_state() -> None:
    inputs = make(20)
    low = {n: t.bfloat16() if n in TOKENS else t for n, t in inputs.items()}
    exact = {n: t.float() for n, t in low.items()}
    for form in (selective_scan, kernels.forward):
        y, final = form(**low)
        assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
        assert_close(y, reference.selective_scan(**exact)[0], limit=1e-2)


def test_wrong_shapes_are_named() -> None:
    inputs = make(5)
    with pytest.raises(ValueError, match="state is"):
        selective_scan(**{**inputs, "state": inputs["state"][:, :1]})


def test_opcheck() -> None:
    args = tuple(t.requires_grad_() for t in make(3).values())
    cheap = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = torch.ops.rewriter.selective_scan.default
    torch.library.opcheck(op, (*args, torch.ones(2, 3, dtype=torch.bool)), test_utils=cheap)
