"""`rewriter::hybrid_attention`: every form against the float64 quadratic form, state laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rewriter.kernels.hybrid_attention import HybridState, hybrid_attention, reference, triton

HEADS, KV_HEADS, WIDTH, OUT, SIZE, WINDOW, SINKS = 4, 2, 8, 6, 10, 16, 3
NAMES = ("query", "key", "value", "query_features", "key_features", "gate")
KINDS = [(True, "none"), (True, "max"), (True, "mean"), (False, "none"), (False, "mean")]


def make(length: int, groups: int = KV_HEADS, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return {
        "query": 2 * normal(batch, HEADS, length, WIDTH),
        "key": 2 * normal(batch, KV_HEADS, length, WIDTH),
        "value": normal(batch, KV_HEADS, length, OUT),
        "query_features": normal(batch, HEADS, length, SIZE).softmax(-1),
        "key_features": normal(batch, groups, length, SIZE).exp(),
        "gate": normal(batch, HEADS, length),
    }


def options(block_aligned: bool = True, reference: str = "none", **other: Any) -> dict[str, Any]:
    default = {"scale": WIDTH**-0.5, "window": WINDOW, "sinks": SINKS, "far_cap": 20.0}
    return {**default, "block_aligned": block_aligned, "reference": reference, **other}


def padding(kind: str, length: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "random":
        return torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.7
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, : length // 2] = 0
    return mask if kind == "left" else mask.flip(1)


def cut(inputs: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {n: t[:, :, start:stop] for n, t in inputs.items()}


def in_pieces(
    inputs: dict[str, Tensor], mask: Tensor | None, sizes: list[int], **kind: Any
) -> tuple[Tensor, HybridState]:
    """The whole sequence, `sizes` tokens at a time, over and over."""
    length, start, state = inputs["query"].shape[2], 0, None
    found: list[Tensor] = []
    while start < length:
        stop = min(start + sizes[len(found) % len(sizes)], length)
        part = None if mask is None else mask[:, start:stop]
        y, state = hybrid_attention(**cut(inputs, start, stop), mask=part, state=state, **kind)
        found.append(y)
        start = stop
    assert state is not None
    return torch.cat(found, 1), state


def assert_close(actual: Tensor, expected: Tensor, name: str = "", limit: float = 1e-5) -> None:
    """Relative root mean square error."""
    assert actual.shape == expected.shape, name
    error = (actual.double() - expected.double()).square().mean().sqrt()
    scale = expected.double().square().mean().sqrt()
    assert error <= limit * scale, f"{name}: {error / scale:.2e}"


def assert_same_state(actual: HybridState, expected: HybridState) -> None:
    assert torch.equal(actual.count, expected.count)
    for name, left, right in zip(HybridState._fields, actual, expected, strict=True):
        assert_close(left, right, name) if left.numel() else None


def values_and_gradients(form, inputs: dict[str, Tensor], mask: Tensor | None, **kind: Any):
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    y = form(**leaves, mask=mask, **kind)
    y = y[0] if isinstance(y, tuple) else y
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    gradients = torch.autograd.grad((y * weight.to(y.dtype)).sum(), list(leaves.values()))
    return {"y": y, **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("groups", [KV_HEADS, HEADS])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [2, 16, 31, 33, 97])
def test_op_equals_reference(length: int, kind: tuple[bool, str], groups: int) -> None:
    inputs, chosen = make(length, groups), options(*kind)
    for pad in ("none", "left", "random") if length > 2 else ("none",):
        mask = padding(pad, length)
        wide = {n: t.double() for n, t in inputs.items()}
        truth = values_and_gradients(reference.hybrid_attention, wide, mask, **chosen)
        for name, value in values_and_gradients(hybrid_attention, inputs, mask, **chosen).items():
            if bool(truth[name].any()):  # nothing is far in two tokens
                assert_close(value, truth[name], f"{name}, padding {pad}", 2e-5)


@pytest.mark.parametrize("pad", ["none", "left", "right", "random"])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_and_steps_equal_the_whole(kind: tuple[bool, str], pad: str) -> None:
    inputs, mask, chosen = make(83), padding(pad, 83), options(*kind)
    y, state = hybrid_attention(**inputs, mask=mask, **chosen)
    for sizes in ([1], [5, 1, 40, 1, 16], [82, 1]):
        found, after = in_pieces(inputs, mask, sizes, **chosen)
        assert_close(found, y, str(sizes))
        assert_same_state(after, state)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_go_through_the_state(kind: tuple[bool, str]) -> None:
    inputs, chosen = make(70), options(*kind)
    whole = values_and_gradients(hybrid_attention, inputs, None, **chosen)
    split = values_and_gradients(
        lambda mask, **kw: in_pieces({n: kw[n] for n in NAMES}, mask, [37, 1], **chosen),
        inputs,
        None,
    )
    for name, value in whole.items():
        assert_close(split[name], value, name, 2e-5)


def test_left_padding_equals_no_padding() -> None:
    inputs = make(60)
    padded = {n: torch.cat([t[:, :, :7] * 3, t], 2) for n, t in inputs.items()}
    mask = torch.cat([torch.zeros(2, 7), torch.ones(2, 60)], 1).bool()
    for kind in KINDS:
        y, state = hybrid_attention(**inputs, **options(*kind))
        found, after = hybrid_attention(**padded, mask=mask, **options(*kind))
        assert_close(found[:, 7:], y)
        assert not found[:, :7].any()
        assert_same_state(after, state)


@pytest.mark.parametrize("block_aligned", [True, False])
@pytest.mark.parametrize("length", [40, 48, 50])
def test_state_is_what_it_says(length: int, block_aligned: bool) -> None:
    inputs = {n: t.double() for n, t in make(length).items()}
    _, state = hybrid_attention(**inputs, **options(block_aligned))
    start = (length // WINDOW - 1) * WINDOW if block_aligned else length - WINDOW + 1
    features, value = (inputs[n][:, :, SINKS:start] for n in ("key_features", "value"))
    assert_close(state.far_value, features.mT @ value, limit=1e-12)
    assert_close(state.far_mass, features.sum(2), limit=1e-12)
    ring = state.ring_key.shape[2]
    assert ring == (2 * WINDOW if block_aligned else WINDOW)
    for rank in range(length - ring, length):
        assert torch.equal(state.ring_key[:, :, rank % ring], inputs["key"][:, :, rank])
        assert torch.equal(
            state.ring_features[:, :, rank % ring], inputs["key_features"][:, :, rank]
        )
    assert torch.equal(state.sink_value, inputs["value"][:, :, :SINKS])
    assert state.count.tolist() == [length, length]


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_over_everything_is_softmax(kind: tuple[bool, str]) -> None:
    inputs = make(60)
    key, value = (inputs[n].repeat_interleave(2, 1) for n in ("key", "value"))
    truth = torch.nn.functional.scaled_dot_product_attention(
        inputs["query"], key, value, is_causal=True
    )
    y, _ = hybrid_attention(**inputs, **options(*kind, window=60))
    torch.testing.assert_close(y, truth.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_beam_reorder_and_batch_independence() -> None:
    inputs, mask = make(50), padding("left", 50)
    assert mask is not None
    _, state = hybrid_attention(**cut(inputs, 0, 45), mask=mask[:, :45], **options())
    kept = torch.tensor([1, 1])
    state = HybridState(*(t[kept] for t in state))
    rest = {n: t[kept] for n, t in cut(inputs, 45, 50).items()}
    y, _ = hybrid_attention(**rest, mask=mask[kept, 45:], state=state, **options())
    whole, _ = hybrid_attention(**{n: t[1:] for n, t in inputs.items()}, mask=mask[1:], **options())
    for row in y:
        assert_close(row, whole[0, 45:])


def test_what_padding_holds_touches_nothing() -> None:
    for length in (1, 50):
        inputs, mask = make(length), padding("left", length)
        mask = torch.zeros(2, 1) if length == 1 or mask is None else mask
        y, state = hybrid_attention(**inputs, mask=mask, **options())
        dirty = {n: t.clone() for n, t in inputs.items()}
        for t in dirty.values():
            t[mask.bool().logical_not()[:, None].expand(t.shape[:3])] = torch.nan
        found, after = hybrid_attention(**dirty, mask=mask, **options())
        assert torch.equal(found, y)
        assert all(torch.equal(a, b) for a, b in zip(after, state, strict=True))


def test_extreme_weights_stay_finite() -> None:
    inputs = make(50)
    for gate, factor in ((300.0, 1.0), (-300.0, 1.0), (0.0, 100.0)):
        changed = {**inputs, "gate": inputs["gate"] + gate, "query": inputs["query"] * factor}
        for kind in KINDS:
            for value in values_and_gradients(
                hybrid_attention, changed, None, **options(*kind)
            ).values():
                assert bool(value.isfinite().all())


def test_far_cap_bounds_the_far_mass() -> None:
    """Beyond the cap the far weight of equal tokens no longer grows with their number."""
    inputs = {n: torch.zeros_like(t) for n, t in make(1000).items()}
    inputs |= {n: torch.ones_like(inputs[n]) for n in ("query_features", "key_features")}
    inputs["value"][:, :, :960] = 1  # all that is far from the last query, nothing near it
    chosen = options(sinks=0, window=20)
    for cap, mass in ((20.0, 20.0 * SIZE), (0.0, 960.0 * SIZE)):
        y, _ = hybrid_attention(**inputs, **{**chosen, "far_cap": cap})
        assert_close(y[:, -1], torch.full_like(y[:, -1], mass / (mass + 40)), f"cap {cap}")


def test_low_precision_keeps_the_state_in_float32() -> None:
    inputs = {n: t.bfloat16() if n != "gate" else t for n, t in make(70).items()}
    y, state = hybrid_attention(**inputs, **options())
    truth = reference.hybrid_attention(**{n: t.double() for n, t in inputs.items()}, **options())
    assert y.dtype == state.ring_key.dtype == state.ring_features.dtype == torch.bfloat16
    assert state.far_value.dtype == state.far_mass.dtype == torch.float32
    assert_close(y, truth, limit=5e-3)
    steps, _ = in_pieces(inputs, None, [33, 1], **options())
    assert_close(steps, truth, limit=5e-3)


def by_triton(
    inputs: dict[str, Tensor], mask: Tensor | None, state: Any, chosen: dict[str, Any]
) -> tuple[Tensor, HybridState]:
    names = ("scale", "window", "block_aligned", "sinks", "reference", "far_cap")
    before = state if state is not None else (None,) * 8
    y, *after = triton.forward(*inputs.values(), mask, *before, *(chosen[n] for n in names))
    return y, HybridState(*after)


@pytest.mark.parametrize(
    ("kind", "groups", "cases"),
    [
        (KINDS[0], HEADS, (("none", {}), ("random", {"window": 21}))),
        (KINDS[1], KV_HEADS, (("left", {}),)),
        (KINDS[2], KV_HEADS, (("none", {"sinks": 0}),)),
        (KINDS[3], KV_HEADS, (("random", {"window": 21}),)),
        (KINDS[4], HEADS, (("left", {"sinks": 0}),)),
    ],
)
def test_triton_equals_reference(
    kind: tuple[bool, str], groups: int, cases: tuple[tuple[str, dict[str, Any]], ...]
) -> None:
    inputs = make(61, groups, seed=4)
    for pad, other in cases:
        mask, chosen = padding(pad, 61), options(*kind, **other)
        wide = {n: t.double() for n, t in inputs.items()}
        truth = reference.hybrid_attention(**wide, mask=mask, **chosen)
        y, state = by_triton(inputs, mask, None, chosen)
        assert_close(y, truth, pad)
        assert_same_state(state, hybrid_attention(**inputs, mask=mask, **chosen)[1])
        first, middle = by_triton(cut(inputs, 0, 40), mask if mask is None else mask[:, :40],
                                  None, chosen)  # fmt: skip
        second, last = by_triton(cut(inputs, 40, 61), mask if mask is None else mask[:, 40:],
                                 middle, chosen)  # fmt: skip
        assert_close(torch.cat([first, second], 1), truth, pad)
        assert_same_state(last, state)


def test_triton_in_bfloat16_is_close() -> None:
    inputs = {n: t.bfloat16() if n != "gate" else t for n, t in make(70).items()}
    truth = reference.hybrid_attention(**{n: t.double() for n, t in inputs.items()}, **options())
    y, state = by_triton(inputs, None, None, options())
    assert y.dtype == torch.bfloat16 and state.far_value.dtype == torch.float32
    assert_close(y, truth, limit=8e-3)


def test_triton_backward_and_compilations() -> None:
    inputs = make(40)
    names = ("scale", "window", "block_aligned", "sinks", "reference", "far_cap")
    rest = [options()[n] for n in names]
    leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    y, _ = hybrid_attention(**leaves, **options())
    truth = torch.autograd.grad(y.square().sum(), list(leaves.values()))
    grads = (2 * y.detach(), *[None] * 8)
    found = triton.backward(grads, *inputs.values(), *[None] * 9, *rest)
    for name, left, right in zip(NAMES, found, truth, strict=False):
        assert left is not None
        assert_close(left, right, name)
    assert found[6:] == (None,) * 15
    kernels = {c.kernel for c in triton.compilations()}
    assert kernels == {triton.enter_states, triton.outputs}


def test_registration() -> None:
    inputs, chosen = make(20), options()
    names = ("scale", "window", "block_aligned", "sinks", "reference", "far_cap")
    rest = [chosen[n] for n in names]
    _, state = hybrid_attention(**inputs, **chosen)
    op = torch.ops.rewriter.hybrid_attention.default
    for before in ([None] * 8, list(state)):
        given = (*inputs.values(), None, *before, *rest)
        torch.library.opcheck(op, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sinks": 17}, "17 sinks do not fit"),
        ({"reference": "mode"}, "unknown reference"),
        ({"gate": torch.zeros(HEADS)}, "gate is"),
        ({"key_features": torch.zeros(2, 3, 20, SIZE)}, "must divide"),
        ({"mask": torch.ones(2, 19)}, "mask is"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        hybrid_attention(**{**make(20), **options(), **change})
