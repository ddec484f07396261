"""`rewriter::long_conv` and `rewriter::s4d`: FFT = direct sum = recurrence."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from forms import assert_close, compare, triton_form, values_and_gradients, with_junk
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.kernels.long_conv import long_conv
from rewriter.kernels.long_conv import reference as direct
from rewriter.kernels.long_conv import triton as long_conv_kernels
from rewriter.kernels.s4d import reference, s4d
from rewriter.kernels.s4d import triton as s4d_kernels

pytestmark = pytest.mark.usefixtures("poison")
law = settings(max_examples=10, deadline=None, derandomize=True)
METHODS = ("zoh", "bilinear")


def make_s4d(length: int, channels: int = 5, size: int = 6, batch: int = 2) -> dict[str, Tensor]:
    """S4D-Lin: A_n = -1/2 + i pi n, every channel with its own step."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    A = torch.stack([torch.full((size,), -0.5), math.pi * torch.arange(size)], -1)
    return {
        "u": normal(batch, length, channels),
        "A": A.expand(channels, size, 2).clone(),
        "B": normal(channels, size, 2),
        "C": normal(channels, size, 2),
        "dt": torch.logspace(-3, -1, channels),
        "D": normal(channels),
        "state": normal(batch, channels, size, 2),
    }


def cut(inputs: dict[str, Tensor], start: int, stop: int, state: Tensor) -> dict[str, Tensor]:
    return inputs | {"u": inputs["u"][:, start:stop], "state": state}


@pytest.mark.parametrize("form", [long_conv, triton_form(long_conv_kernels)])
@pytest.mark.parametrize(
    ("length", "lags", "before"),
    [(1, 1, 0), (1, 5, 2), (63, 63, 0), (70, 139, 69), (70, 9, 3), (70, 300, 150)],
)
def test_fft_equals_the_direct_sum(length: int, lags: int, before: int, form) -> None:
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    inputs = {"u": normal(2, length, 3), "kernel": normal(3, lags)}
    compare(form, direct.long_conv, inputs, before=before)


def test_relative_positions_are_a_toeplitz_matrix() -> None:
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    table, u = normal(2, 2 * 12 - 1), normal(1, 12, 2)
    matrix = torch.stack([table[:, t + 11 - torch.arange(12)] for t in range(12)], 1)
    assert_close(long_conv(u, table, before=11), torch.einsum("hts,bsh->bth", matrix, u))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 130])
def test_convolution_equals_the_recurrence(length: int, method: str) -> None:
    compare(s4d, reference.s4d, make_s4d(length), method=method)


def test_gpu_form_of_s4d() -> None:
    compare(triton_form(s4d_kernels), reference.s4d, make_s4d(20), method="zoh")


@pytest.mark.parametrize("method", METHODS)
def test_kernel_is_the_response_to_an_impulse(method: str) -> None:
    inputs = make_s4d(90)
    few = {n: inputs[n] for n in ("A", "B", "C", "dt")}
    impulse = torch.zeros(1, 90, 5)
    impulse[:, 0] = 1
    kernel = s4d(impulse, **few, method=method)[0][0].T
    y, _ = s4d(inputs["u"], **few, method=method)
    assert_close(direct.long_conv(inputs["u"].double(), kernel.double()), y)


@pytest.mark.parametrize("method", METHODS)
def test_discretisation_is_stable(method: str) -> None:
    A = torch.complex(-torch.logspace(-3, 3, 8), torch.linspace(-99, 99, 8)).expand(5, 8)
    log_a, _ = reference.discretise(A, torch.ones_like(A), torch.logspace(-3, 0, 5), method)
    assert bool((torch.exp(log_a).abs() < 1).all())


@pytest.mark.parametrize("length", [1, 70])
def test_masked_tokens_are_inert_whatever_they_hold(length: int) -> None:
    inputs = make_s4d(length)
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(2)) < 0.6
    compare(s4d, reference.s4d, inputs, mask=mask)
    junk = with_junk(inputs, mask, ("u",))
    actual, expected = (values_and_gradients(s4d, i, mask=mask) for i in (junk, inputs))
    assert all(torch.equal(actual[n], expected[n]) for n in expected)
    y = long_conv(junk["u"], torch.ones(5, length), mask=mask)
    assert_close(
        y, direct.long_conv(inputs["u"].double(), torch.ones(5, length).double(), mask=mask)
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_unequal_lengths_equal_separate_runs(side: str) -> None:
    inputs, position = make_s4d(70), torch.arange(70)
    mask = torch.stack([position >= 70 - n if side == "left" else position < n for n in (70, 41)])
    y, final = s4d(**inputs, mask=mask)
    for row, real in enumerate(mask):
        alone = {"u": inputs["u"][row : row + 1, real], "state": inputs["state"][row : row + 1]}
        y1, final1 = s4d(**{**inputs, **alone})
        assert_close(y[row : row + 1, real], y1)
        assert_close(final[row : row + 1], final1)


@law
@given(length=st.integers(2, 90), method=st.sampled_from(METHODS), data=st.data())
def test_split_anywhere(length: int, method: str, data) -> None:
    split = data.draw(st.integers(1, length - 1))
    inputs = make_s4d(length)
    y, final = s4d(**inputs, method=method)
    first, middle = s4d(**cut(inputs, 0, split, inputs["state"]), method=method)
    second, last = s4d(**cut(inputs, split, length, middle), method=method)
    assert_close(torch.cat([first, second], 1), y)
    assert_close(last, final)


@law
@given(length=st.integers(1, 20))
def test_prefill_is_a_fold_of_steps(length: int) -> None:
    inputs = make_s4d(length)
    y, final = s4d(**inputs)
    state, steps = inputs["state"], []
    for t in range(length):
        step, state = s4d(**cut(inputs, t, t + 1, state))
        steps.append(step)
    assert_close(torch.cat(steps, 1), y)
    assert_close(state, final)


@law
@given(token=st.integers(1, 69))
def test_causal(token: int) -> None:
    inputs, changed = make_s4d(70), make_s4d(70)
    changed["u"][:, token] += 1
    y, other = s4d(**inputs)[0], s4d(**changed)[0]
    assert_close(y[:, :token], other[:, :token])  # an FFT rounds all positions together
    assert not torch.allclose(y[:, token], other[:, token])


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="method is 'euler'"):
        s4d(**make_s4d(3), method="euler")
    with pytest.raises(ValueError, match="state is"):
        s4d(**{**make_s4d(3), "state": torch.zeros(2, 5, 1, 2)})
    with pytest.raises(ValueError, match="before is 5"):
        long_conv(torch.zeros(1, 3, 2), torch.zeros(2, 5), before=5)


def test_opcheck() -> None:
    cheap = ("test_schema", "test_autograd_registration", "test_faketensor")
    args = tuple(t.requires_grad_() for t in make_s4d(5).values())
    mask = torch.arange(5).ge(2).expand(2, -1)
    torch.library.opcheck(torch.ops.rewriter.s4d.default, (*args, mask, "zoh"), test_utils=cheap)
    args = (args[0], torch.ones(5, 4, requires_grad=True), 1, mask)
    torch.library.opcheck(torch.ops.rewriter.long_conv.default, args, test_utils=cheap)
