"""`rewriter::gated_rms_norm`: every form against float64, in both orders."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from forms import assert_close, compare, triton_form
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from rewriter.kernels.gated_rms_norm import gated_rms_norm, reference
from rewriter.kernels.gated_rms_norm import triton as kernels

pytestmark = pytest.mark.usefixtures("poison")
FORMS = {
    "reference": reference.gated_rms_norm,
    "op": gated_rms_norm,
    "triton": triton_form(kernels),
}


def make(tokens: int, channels: int) -> dict[str, Tensor]:
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    return {
        "x": normal(2, tokens, channels),
        "gate": normal(2, tokens, channels),
        "weight": normal(channels),
    }


def written_out(x, weight, gate=None, group_size=None, eps=1e-5, norm_before_gate=False):
    """Independent of `reference.py`: torch's own norm."""
    gate = 1 if gate is None else silu(gate)
    u = x if norm_before_gate else x * gate
    y = rms_norm(u.unflatten(-1, (-1, group_size)), (group_size,), eps=eps).flatten(-2) * weight
    return y * gate if norm_before_gate else y


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize(("channels", "group"), [(60, 60), (60, 20), (96, 48), (3 * 128, 128)])
def test_equals_reference(form: str, norm_before_gate: bool, channels: int, group: int) -> None:
    options = {"group_size": group, "eps": 1e-3, "norm_before_gate": norm_before_gate}
    compare(FORMS[form], written_out, make(37, channels), **options)


@pytest.mark.parametrize("form", FORMS)
def test_without_gate_and_one_token(form: str) -> None:
    inputs = make(1, 48)
    del inputs["gate"]
    options = {"group_size": 16, "eps": 1e-5, "norm_before_gate": False, "gate": None}
    compare(FORMS[form], written_out, inputs, **options)


def test_one_group_is_the_default() -> None:
    assert inspect.signature(gated_rms_norm).parameters["group_size"].default is None
    inputs = make(5, 24)
    assert_close(gated_rms_norm(**inputs), written_out(**inputs, group_size=24))


def test_low_precision() -> None:
    inputs = make(9, 64)
    low = {n: t.bfloat16() for n, t in inputs.items()}
    for form in (gated_rms_norm, kernels.forward):
        y = form(**low, group_size=32)
        assert y.dtype == torch.bfloat16
        assert_close(y, written_out(**inputs, group_size=32), limit=1e-2)


def test_wrong_arguments_are_named() -> None:
    inputs = make(3, 24)
    with pytest.raises(ValueError, match="groups of 7 do not divide 24"):
        gated_rms_norm(**inputs, group_size=7)
    with pytest.raises(ValueError, match="gate is"):
        gated_rms_norm(**{**inputs, "gate": inputs["gate"][..., :3]})


def test_opcheck() -> None:
    inputs = make(3, 24)
    args = (*(t.requires_grad_() for t in inputs.values()), 12, 1e-5, True)
    torch.library.opcheck(torch.ops.rewriter.gated_rms_norm.default, args)
