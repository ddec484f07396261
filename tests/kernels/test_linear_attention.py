"""`rewriter::linear_attention`: every form against the float64 recurrence, and its laws."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from forms import assert_close, compare, triton_form, with_junk
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize, softplus

from rewriter.kernels.linear_attention import cpu, feature_maps, linear_attention, reference
from rewriter.kernels.linear_attention import triton as kernels
from rewriter.kernels.ssd import ssd

pytestmark = pytest.mark.usefixtures("poison")
law = settings(max_examples=12, deadline=None, derandomize=True)
TOKENS = ("q", "k", "v", "log_decay", "beta")

#: heads of q, k, v and log_decay; what else there is.
CASES = {
    "plain": ((4, 4, 4, 0), ""),
    "grouped": ((6, 2, 2, 0), ""),
    "grouped normalised": ((6, 2, 2, 0), "normalise"),
    "decay": ((4, 4, 4, 4), ""),
    "grouped decay": ((6, 2, 2, 2), ""),
    "decay of every query head": ((6, 2, 2, 6), ""),
    "shared query and key": ((2, 2, 4, 4), ""),
    "decay normalised": ((6, 2, 2, 2), "normalise"),
    "key decay": ((4, 2, 2, 2), "channel"),
    "key decay normalised": ((4, 2, 2, 2), "channel normalise"),
    "delta": ((4, 2, 2, 0), "delta"),
    "gated delta": ((4, 2, 4, 4), "delta"),
    "key decay delta": ((4, 2, 2, 2), "channel delta"),
}
CHUNKED = [n for n, (_, kind) in CASES.items() if "channel" not in kind and "delta" not in kind]


def make(case: str, length: int, K: int = 24, V: int = 20, batch: int = 2, seed: int = 0):
    """Inputs and options of a case."""
    (q, k, v, decay), kind = CASES[case]
    return inputs_for((q, k, v, decay), kind, length, K, V, batch, seed)


def inputs_for(heads, kind, length, K=24, V=20, batch=2, seed=0):
    hq, hk, hv, hd = heads
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    states = max(hk, hv, hd)
    inputs = {
        "q": normal(batch, length, hq, K),
        "k": normalize(normal(batch, length, hk, K), dim=-1),
        "v": normal(batch, length, hv, V),
        "state": normal(batch, states, K, V),
    }
    if "normalise" in kind:
        inputs |= {"q": inputs["q"].abs(), "k": inputs["k"].abs()}
        inputs["z"] = normal(batch, states, K).abs()
    if hd:
        shape = (batch, length, hd, K) if "channel" in kind else (batch, length, hd)
        inputs["log_decay"] = -softplus(normal(*shape))
    if "delta" in kind:
        inputs["beta"] = torch.sigmoid(normal(batch, length, hk))
    return inputs, {"normalise": "normalise" in kind, "scale": 0.5}


def cut(inputs: dict[str, Tensor], start: int, stop: int, **state: Tensor) -> dict[str, Tensor]:
    parts = {n: t[:, start:stop] if n in TOKENS else t for n, t in inputs.items()}
    return parts | state


def carried(results, inputs) -> dict[str, Tensor]:
    return {"state": results[1]} | ({"z": results[2]} if "z" in inputs else {})


# ---- forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 63, 130])
@pytest.mark.parametrize("case", CASES)
def test_op_equals_reference(case: str, length: int) -> None:
    inputs, options = make(case, length)
    compare(linear_attention, reference.linear_attention, inputs, **options)


@pytest.mark.parametrize("case", CASES)
def test_triton_equals_reference(case: str) -> None:
    inputs, options = make(case, 67 if case in CHUNKED else 19, batch=1)
    compare(triton_form(kernels), reference.linear_attention, inputs, **options)


@pytest.mark.parametrize("length", [1, 32, 63, 130])
def test_triton_lengths(length: int) -> None:
    inputs, options = make("grouped decay", length, K=16, V=16, batch=1)
    compare(triton_form(kernels), reference.linear_attention, inputs, **options)


@pytest.mark.parametrize("case", ["grouped decay", "decay normalised"])
def test_recurrent_kernel_equals_chunked(case: str) -> None:
    inputs, options = make(case, 35, batch=1)
    recurrent = kernels.forward(**inputs, **options, one_by_one=True)
    chunked = kernels.forward(**inputs, **options, one_by_one=False)
    for a, b in zip(recurrent, chunked, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("width", [48, 64, 80, 128])
def test_widths(width: int) -> None:
    inputs, options = make("grouped decay", 33, K=width, V=width, batch=1)
    compare(linear_attention, reference.linear_attention, inputs, **options)
    compare(triton_form(kernels), reference.linear_attention, inputs, **options)


@pytest.mark.parametrize("groups", [1, 3, 4, 8])
def test_groups(groups: int) -> None:
    inputs, options = inputs_for((groups * 2, 2, 2, 2), "", 33, K=16, V=16, batch=1)
    compare(linear_attention, reference.linear_attention, inputs, **options)
    compare(triton_form(kernels), reference.linear_attention, inputs, **options)


@pytest.mark.parametrize("case", ["decay", "key decay", "gated delta"])
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_chunk_length_does_not_matter(case: str, chunk: int) -> None:
    inputs, options = make(case, 33)
    form = partial(cpu.linear_attention, chunk=chunk)
    compare(form, reference.linear_attention, inputs, **options)


def test_optional_states() -> None:
    for case in ("grouped normalised", "delta"):
        inputs, options = make(case, 20)
        zeros = {n: torch.zeros_like(inputs[n]) for n in ("state", "z") if n in inputs}
        few = {n: t for n, t in inputs.items() if n not in zeros}
        expected = reference.linear_attention(**{**inputs, **zeros}, **options)
        for form in (linear_attention, kernels.forward):
            for a, e in zip(form(**few, **options), expected, strict=True):
                assert_close(a, e)


def test_float64() -> None:
    inputs, options = make("gated delta", 70)
    inputs = {n: t.double() for n, t in inputs.items()}
    compare(linear_attention, reference.linear_attention, inputs, limit=1e-12, **options)


def test_low_precision_keeps_a_float32_state() -> None:
    inputs, options = make("grouped decay", 70, K=64, V=64, batch=1)
    low = {n: t.bfloat16() if n in ("q", "k", "v") else t for n, t in inputs.items()}
    truth = reference.linear_attention(**inputs, **options)
    for form in (linear_attention, kernels.forward):
        y, final, _ = form(**low, **options)
        assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
        assert_close(y, truth[0], limit=2e-2)
        assert_close(final, truth[1], limit=2e-2)


@pytest.mark.parametrize("decay", [-300.0, -1e6, float("-inf")])
def test_a_strong_decay_forgets_and_keeps_its_digits_after(decay: float) -> None:
    inputs, options = make("grouped decay", 40, batch=1)
    inputs["log_decay"][:, 10] = decay
    for form in (linear_attention, triton_form(kernels)):
        compare(form, reference.linear_attention, inputs, **options)


# ---- padding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [linear_attention, triton_form(kernels)])
@pytest.mark.parametrize("case", ["grouped normalised", "grouped decay", "key decay delta"])
def test_masked_tokens_are_inert_whatever_they_hold(case: str, form) -> None:
    inputs, options = make(case, 36)
    mask = torch.rand(2, 36, generator=torch.Generator().manual_seed(1)) < 0.7
    junk = with_junk(inputs, mask, TOKENS)
    compare(form, reference.linear_attention, inputs, mask=mask, **options)
    actual, expected = form(**junk, **options, mask=mask), form(**inputs, **options, mask=mask)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    assert not actual[0][~mask].any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["grouped normalised", "decay", "key decay", "gated delta"])
def test_unequal_lengths_equal_separate_runs(case: str, side: str) -> None:
    inputs, options = make(case, 70)
    lengths = (70, 41)
    position = torch.arange(70)
    mask = torch.stack([position >= 70 - n if side == "left" else position < n for n in lengths])
    y, final, z = linear_attention(**inputs, **options, mask=mask)
    for row, real in enumerate(mask):
        alone = {n: t[row : row + 1] for n, t in inputs.items()}
        alone = {n: t[:, real] if n in TOKENS else t for n, t in alone.items()}
        y1, final1, z1 = linear_attention(**alone, **options)
        assert_close(y[row : row + 1, real], y1)
        assert_close(final[row : row + 1], final1)
        assert_close(z[row : row + 1], z1)


def test_only_masked_tokens_leave_the_state_bit_for_bit() -> None:
    for case in CASES:
        inputs, options = make(case, 20)
        _, final, _ = linear_attention(**inputs, **options, mask=torch.zeros(2, 20))
        assert torch.equal(final, inputs["state"]), case


# ---- laws -------------------------------------------------------------------------------------

cases = st.sampled_from(sorted(CASES))


@law
@given(case=cases, length=st.integers(2, 80), data=st.data())
def test_split_anywhere(case: str, length: int, data) -> None:
    split = data.draw(st.integers(1, length - 1))
    inputs, options = make(case, length)
    whole = linear_attention(**inputs, **options)
    first = linear_attention(**cut(inputs, 0, split), **options)
    second = linear_attention(**cut(inputs, split, length, **carried(first, inputs)), **options)
    assert_close(torch.cat([first[0], second[0]], 1), whole[0])
    assert_close(second[1], whole[1])
    assert_close(second[2], whole[2])


@law
@given(case=cases, length=st.integers(1, 20))
def test_prefill_is_a_fold_of_steps(case: str, length: int) -> None:
    inputs, options = make(case, length)
    whole = linear_attention(**inputs, **options)
    state, steps = {}, []
    for t in range(length):
        step = linear_attention(**cut(inputs, t, t + 1, **state), **options)
        state = carried(step, inputs)
        steps.append(step[0])
    assert_close(torch.cat(steps, 1), whole[0])
    assert_close(step[1], whole[1])


@law
@given(case=cases, token=st.integers(0, 69))
def test_causal(case: str, token: int) -> None:
    inputs, options = make(case, 70)
    changed = {n: t.clone() for n, t in inputs.items()}
    changed["v"][:, token] += 1
    y, other = (linear_attention(**i, **options)[0] for i in (inputs, changed))
    assert torch.equal(y[:, :token], other[:, :token])
    assert not torch.equal(y[:, token], other[:, token])


@law
@given(case=cases, length=st.integers(1, 70))
def test_rows_are_independent(case: str, length: int) -> None:
    inputs, options = make(case, length, batch=3)
    whole = linear_attention(**inputs, **options)
    alone = linear_attention(**{n: t[1:2] for n, t in inputs.items()}, **options)
    for a, e in zip(alone, whole, strict=True):
        assert_close(a, e[1:2])


@law
@given(length=st.integers(1, 70), normalised=st.booleans())
def test_no_decay_is_linear_attention(length: int, normalised: bool) -> None:
    inputs, _ = make("grouped normalised", length)
    q, k, v = (inputs[n].double() for n in ("q", "k", "v"))
    weights = torch.einsum("bihk,bjhk->bhij", q, k.repeat_interleave(3, 2)).tril()
    if normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.einsum("bhij,bjhv->bihv", weights, v.repeat_interleave(3, 2))
    for decay in (None, torch.zeros(2, length, 2), torch.zeros(2, length, 2, 24)):
        y, *_ = linear_attention(inputs["q"], inputs["k"], inputs["v"], decay, normalise=normalised)
        assert_close(y, expected)


@law
@given(length=st.integers(1, 70))
def test_a_constant_decay_is_retention(length: int) -> None:
    inputs, _ = make("plain", length)
    gamma = 1 - 2.0 ** -torch.arange(3, 7).double()
    distance = (torch.arange(length)[:, None] - torch.arange(length)).clamp(min=0)
    weights = torch.einsum("bihk,bjhk->bhij", inputs["q"].double(), inputs["k"].double())
    weights = (weights * gamma[:, None, None] ** distance).tril()
    expected = torch.einsum("bhij,bjhv->bihv", weights, inputs["v"].double())
    decay = gamma.log().float().expand(2, length, 4)
    assert_close(linear_attention(inputs["q"], inputs["k"], inputs["v"], decay)[0], expected)


@law
@given(length=st.integers(1, 70), groups=st.sampled_from([1, 2, 4]))
def test_ssd_is_linear_attention(length: int, groups: int) -> None:
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(length))
    x, B, C = normal(2, length, 4, 6), normal(2, length, groups, 5), normal(2, length, groups, 5)
    dt, A = softplus(normal(2, length, 4)), -torch.linspace(0.1, 4, 4)
    y, final = ssd(x, dt, A, B, C)
    other, last, _ = linear_attention(C, B, dt[..., None] * x, dt * A)
    assert_close(y, other)
    assert_close(final, last.mT)


@law
@given(case=cases)
def test_state_has_the_size_of_the_formula(case: str) -> None:
    (_, k, v, decay), _ = CASES[case]
    inputs, options = make(case, 9)
    _, final, z = linear_attention(**inputs, **options)
    states = max(k, v, decay)
    assert final.shape == (2, states, 24, 20)
    assert z.shape == (2, states, 24 if options["normalise"] else 0)


def test_delta_rule_replaces_what_a_key_held() -> None:
    k = torch.eye(4)[None, [0, 1, 0], None]
    v = torch.randn(1, 3, 1, 5, generator=torch.Generator().manual_seed(0))
    y, final, _ = linear_attention(k, k, v, beta=torch.ones(1, 3, 1))
    assert_close(y, v)
    assert_close(final[0, 0, :2], torch.stack([v[0, 2, 0], v[0, 1, 0]]))


# ---- feature maps, registration, mistakes -----------------------------------------------------


def test_feature_maps() -> None:
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    for name, f in feature_maps.FEATURE_MAPS.items():
        y = f(x)
        assert y.shape == x.shape
        assert name == "identity" or bool((y >= 0).all())
    assert_close(feature_maps.softmax(x).sum(-1), torch.ones(2, 3, 4))
    weight = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1))
    split, joint = (feature_maps.hedgehog(x, weight, joint=j) for j in (False, True))
    assert split.shape == joint.shape == (2, 3, 4, 10)
    assert_close(split.sum(-1), torch.full((2, 3, 4), 2.0))
    assert_close(joint.sum(-1), torch.ones(2, 3, 4))
    assert not torch.allclose(split, 2 * joint)


def test_wrong_arguments_are_named() -> None:
    inputs, _ = make("gated delta", 5)
    with pytest.raises(ValueError, match="no normalised form"):
        linear_attention(**inputs, normalise=True)
    with pytest.raises(ValueError, match="state is"):
        linear_attention(**{**inputs, "state": inputs["state"][:, :1]})
    with pytest.raises(ValueError, match="3 heads of k do not divide 4"):
        linear_attention(**{**inputs, "k": torch.zeros(2, 5, 3, 24)})
    with pytest.raises(ValueError, match="log_decay is"):
        linear_attention(**{**inputs, "log_decay": torch.zeros(2, 4, 4)})
    with pytest.raises(ValueError, match="do not divide 3 query heads"):
        linear_attention(torch.zeros(2, 5, 3, 24), inputs["k"], inputs["v"][:, :, :2])


def test_opcheck() -> None:
    op = torch.ops.rewriter.linear_attention.default
    cheap = ("test_schema", "test_autograd_registration", "test_faketensor")
    for case in ("grouped normalised", "key decay delta"):
        inputs, options = make(case, 5)
        names = ("q", "k", "v", "log_decay", "beta", "state", "z")
        q, k, v, g, b, s, z = (inputs[n].requires_grad_() if n in inputs else None for n in names)
        mask = torch.arange(5).ge(2).expand(2, -1)
        args = (q, k, v, g, b, 0.5, options["normalise"], s, z, mask)
        torch.library.opcheck(op, args, test_utils=cheap)


def test_export_keeps_one_node() -> None:
    class Model(torch.nn.Module):
        def forward(self, q, k, v, log_decay, mask):
            return linear_attention(q, k, v, log_decay, mask=mask)

    both = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("time", min=1)}

    def arguments(length: int, batch: int):
        inputs, _ = make("grouped decay", length, batch=batch)
        return (*(inputs[n] for n in TOKENS[:4]), torch.ones(batch, length, dtype=torch.bool))

    program = torch.export.export(Model(), arguments(12, 2), dynamic_shapes=(both,) * 5)
    calls = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert calls.count(torch.ops.rewriter.linear_attention.default) == 1
    for length in (1, 70):
        args = arguments(length, 3)
        for a, e in zip(program.module()(*args), Model()(*args), strict=True):
            assert_close(a, e)
