"""`rewriter::ssd`: every form against the float64 recurrence, values and gradients."""

from __future__ import annotations

from functools import partial

import forms
import pytest
import torch
from forms import assert_close
from torch import Tensor

from rewriter.kernels.ssd import cpu, reference, ssd
from rewriter.kernels.ssd import triton as kernels

pytestmark = pytest.mark.usefixtures("poison")

HEADS, WIDTH, SIZE = 4, 5, 7
NAMES = ("x", "dt", "A", "B", "C", "D", "state")


def make(length: int, groups: int = 2, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return {
        "x": normal(batch, length, HEADS, WIDTH),
        "dt": torch.nn.functional.softplus(normal(batch, length, HEADS) - 2),
        "A": -torch.linspace(0.1, 16, HEADS),  # from long memory to almost none
        "B": normal(batch, length, groups, SIZE),
        "C": normal(batch, length, groups, SIZE),
        "D": normal(HEADS),
        "state": normal(batch, HEADS, WIDTH, SIZE),
    }


def cut(inputs: dict[str, Tensor], start: int, stop: int, state: Tensor) -> dict[str, Tensor]:
    parts = {n: inputs[n][:, start:stop] for n in ("x", "dt", "B", "C")}
    return {**inputs, **parts, "state": state}


def compare(form, inputs: dict[str, Tensor], mask: Tensor | None = None) -> None:
    forms.compare(form, reference.ssd, inputs, mask=mask)


@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 197])
def test_op_equals_reference(length: int, groups: int) -> None:
    compare(ssd, make(length, groups))


@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("length", [1, 63, 67, 130])
def test_triton_equals_reference(length: int, groups: int) -> None:
    compare(forms.triton_form(kernels), make(length, groups, batch=1))


@pytest.mark.parametrize("width", [48, 64, 80, 128])
def test_triton_widths(width: int) -> None:
    inputs = make(33, 1, batch=1)
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(2))
    inputs |= {"x": normal(1, 33, HEADS, width), "state": normal(1, HEADS, width, width)}
    inputs |= {"B": normal(1, 33, 1, width), "C": normal(1, 33, 1, width)}
    compare(forms.triton_form(kernels), inputs)


def test_triton_steps_equal_the_chunked_kernels() -> None:
    inputs = make(35, batch=1)
    chunked = kernels.forward(**inputs, one_by_one=False)
    for a, e in zip(kernels.forward(**inputs, one_by_one=True), chunked, strict=True):
        assert_close(a, e)
    few = {n: inputs[n] for n in ("x", "dt", "A", "B", "C")}
    zeros = {n: torch.zeros_like(inputs[n]) for n in ("D", "state")}
    for a, e in zip(kernels.forward(**few), reference.ssd(**few, **zeros), strict=True):
        assert_close(a, e)


@pytest.mark.parametrize("form", [ssd, forms.triton_form(kernels)])
@pytest.mark.parametrize("length", [1, 40])
def test_masked_tokens_are_inert_whatever_they_hold(length: int, form) -> None:
    inputs = make(length)
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.6
    junk = forms.with_junk(inputs, mask, ("x", "dt", "B", "C"))
    compare(form, inputs, mask)
    actual, expected = form(**junk, mask=mask), form(**inputs, mask=mask)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    assert not actual[0][~mask].any()
    leaves = {n: t.requires_grad_() for n, t in junk.items()}
    form(**leaves, mask=mask)[0].sum().backward()
    assert all(bool(t.grad.isfinite().all()) for t in leaves.values())


@pytest.mark.parametrize("chunk", [1, 16, 256])
def test_chunk_length_does_not_matter(chunk: int) -> None:
    compare(lambda **kw: cpu.ssd(**kw, chunk=chunk), make(65))


def test_reference_in_float32() -> None:
    compare(reference.ssd, make(65))


def test_float64_state_and_precision() -> None:
    inputs = {n: t.double() for n, t in make(130).items()}
    for actual, expected in zip(ssd(**inputs), reference.ssd(**inputs), strict=True):
        assert actual.dtype == torch.float64
        assert_close(actual, expected, limit=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_random_mask(dtype: torch.dtype) -> None:
    mask = (torch.rand(2, 70, generator=torch.Generator().manual_seed(1)) < 0.6).to(dtype)
    compare(ssd, make(70), mask)


def test_masked_tokens_leave_the_state_bit_for_bit() -> None:
    for length in (1, 5, 70):
        inputs = make(length)
        _, final = ssd(**inputs, mask=torch.zeros(2, length, dtype=torch.bool))
        assert torch.equal(final, inputs["state"])


def test_optional_arguments() -> None:
    inputs = make(65)
    full = {**inputs, "D": torch.zeros(HEADS), "state": torch.zeros_like(inputs["state"])}
    few = {n: inputs[n] for n in ("x", "dt", "A", "B", "C")}
    for actual, expected in zip(ssd(**few), reference.ssd(**full), strict=True):
        assert_close(actual, expected)
    x = few["x"].requires_grad_()
    ssd(**few)[1].square().sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)


@pytest.mark.parametrize("split", [1, 37, 64, 100, 129])
def test_prefill_in_two_pieces(split: int) -> None:
    inputs = make(130)
    y, final = ssd(**inputs)
    first, middle = ssd(**cut(inputs, 0, split, inputs["state"]))
    second, last = ssd(**cut(inputs, split, 130, middle))
    assert_close(torch.cat([first, second], 1), y)
    assert_close(last, final)


def test_prefill_equals_steps() -> None:
    inputs = make(66)
    y, final = ssd(**inputs)
    state, steps = inputs["state"], []
    for t in range(66):
        step, state = ssd(**cut(inputs, t, t + 1, state))
        steps.append(step)
    assert_close(torch.cat(steps, 1), y)
    assert_close(state, final)


def test_left_padding_equals_no_padding() -> None:
    inputs, padding = make(70), 11
    y, final = ssd(**inputs)
    junk = make(padding, seed=3)
    padded = {
        n: torch.cat([junk[n], inputs[n]], 1) if n in ("x", "dt", "B", "C") else inputs[n]
        for n in NAMES
    }
    mask = torch.arange(70 + padding).ge(padding).expand(2, -1)
    padded_y, padded_final = ssd(**padded, mask=mask)
    assert_close(padded_y[:, padding:], y)
    assert_close(padded_final, final)


def test_no_decay_is_linear_attention() -> None:
    inputs = make(97, groups=HEADS)
    q, k, v = (inputs[n].transpose(1, 2).double() for n in ("C", "B", "x"))
    expected = (q @ k.transpose(-1, -2)).tril() @ v
    y, _ = ssd(inputs["x"], torch.ones(2, 97, HEADS), torch.zeros(HEADS), inputs["B"], inputs["C"])
    assert_close(y.transpose(1, 2), expected)


@pytest.mark.parametrize("name", ["x", "dt", "B", "C"])
def test_causal(name: str) -> None:
    inputs, changed = make(130), make(130)
    changed[name][:, 80] += 1
    y, other = ssd(**inputs)[0], ssd(**changed)[0]
    assert torch.equal(y[:, :80], other[:, :80])
    assert not torch.equal(y[:, 80], other[:, 80])


def test_rows_are_independent() -> None:
    inputs = make(70, batch=3)
    y, final = ssd(**inputs)
    row = {n: t if n in ("A", "D") else t[1:2] for n, t in inputs.items()}
    y1, final1 = ssd(**row)
    assert_close(y1, y[1:2])
    assert_close(final1, final[1:2])


def test_strong_decay_stays_finite() -> None:
    inputs = make(130)
    inputs["dt"] = inputs["dt"] + 20  # exp(-l) alone would overflow
    compare(ssd, inputs)
    compare(forms.triton_form(kernels), inputs)


def test_low_precision_keeps_a_float32_state() -> None:
    inputs = make(70)
    low = {n: t.bfloat16() if n in ("x", "B", "C") else t for n, t in inputs.items()}
    for form in (ssd, kernels.forward):
        y, final = form(**low)
        assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
        assert_close(y, reference.ssd(**inputs)[0], limit=1e-2)


def test_autocast_leaves_the_recurrence_in_float32() -> None:
    def form(**kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return ssd(**kwargs)

    compare(form, make(70))


def test_strided_inputs() -> None:
    inputs = make(65)
    strided = {
        n: torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0] for n, t in inputs.items()
    }
    for actual, expected in zip(ssd(**strided), ssd(**inputs), strict=True):
        assert actual.is_contiguous()
        assert_close(actual, expected)


def test_wrong_shapes_are_named() -> None:
    inputs = make(5)
    with pytest.raises(ValueError, match="state is"):
        ssd(**{**inputs, "state": inputs["state"][:, :1]})
    with pytest.raises(ValueError, match="do not divide"):
        ssd(**make(5, groups=3))


def test_opcheck() -> None:
    op = torch.ops.rewriter.ssd.default
    args = tuple(t.requires_grad_() for t in make(1, groups=1, batch=1).values())
    torch.library.opcheck(op, (*args, torch.ones(1, 1, dtype=torch.bool)))
    args = tuple(t.requires_grad_() for t in make(65).values())
    mask = torch.arange(65).ge(9).expand(2, -1)
    cheap = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (*args, mask), test_utils=cheap)
    torch.library.opcheck(op, (*args[:5], None, None, None), test_utils=cheap)


def test_compiled_training_step() -> None:
    compiled = torch.compile(ssd, backend="aot_eager", fullgraph=True)
    compare(lambda **kw: compiled(**kw), make(65))


def test_export_keeps_one_node() -> None:
    class Model(torch.nn.Module):
        def forward(self, x, dt, A, B, C, D, state, mask):
            return ssd(x, dt, A, B, C, D, state, mask)

    batch, time = torch.export.Dim("batch", min=1), torch.export.Dim("time", min=1)
    both = {0: batch, 1: time}
    inputs = make(12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    program = torch.export.export(
        Model(),
        (*inputs.values(), mask),
        dynamic_shapes=(both, both, None, both, both, None, {0: batch}, both),
    )
    calls = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert calls.count(torch.ops.rewriter.ssd.default) == 1
    assert not [c for c in calls if str(c).startswith("aten")]
    for length in (1, 70):
        longer = make(length, batch=3)
        mask = torch.ones(3, length, dtype=torch.bool)
        for a, e in zip(program.module()(*longer.values(), mask), ssd(**longer), strict=True):
            assert_close(a, e)
