"""`rewriter::attention`: the fast form against the float64 reference, and its laws."""

from __future__ import annotations

import pytest
import torch

from rewriter.kernels.attention import attention, reference

CASES = {
    "causal": {"causal": True},
    "bidirectional": {},
    "window": {"causal": True, "window": 5},
    "sinks": {"causal": True, "window": 5, "sinks": 2},
    "both sides": {"window": 4},
    "chunk": {"causal": True, "chunk": 6},
    "softcap": {"causal": True, "softcap": 2.0},
}


def call(function, q, k, v, mask=None, bias=None, sink_logits=None, key_positions=None, **kind):
    full = {"causal": False, "window": 0, "chunk": 0, "sinks": 0, "softcap": 0.0} | kind
    order = ("causal", "window", "chunk", "sinks", "softcap")
    scale = q.shape[-1] ** -0.5
    args = (q, k, v, mask, bias, sink_logits, key_positions, scale, *(full[n] for n in order))
    return function(*args)


def make(batch=2, heads=6, kv_heads=2, length=23, keys=23, width=16):
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    return r(batch, heads, length, width), *(r(batch, kv_heads, keys, width) for _ in "kv")


@pytest.mark.parametrize("kind", CASES.values(), ids=CASES)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("length", [1, 7, 23])
def test_values_and_gradients(kind, padding, length):
    q, k, v = make(length=length)
    mask = None
    if padding != "none":
        mask = torch.ones(2, 23, dtype=torch.bool)
        mask[1, slice(0, 9) if padding == "left" else slice(14, 23)] = False
    narrow = [t.clone().requires_grad_() for t in (q, k, v)]
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    got, truth = (
        call(attention, *narrow, mask, **kind),
        call(reference.attention, *wide, mask, **kind),
    )
    assert (got - truth).square().mean().sqrt() <= 1e-5 * truth.square().mean().sqrt()
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (truth * weight).sum().backward()
    for a, b in zip(narrow, wide, strict=True):
        assert (
            a.grad - b.grad
        ).square().mean().sqrt() <= 1e-5 * b.grad.square().mean().sqrt() + 1e-9


def test_sink_logits_and_bias():
    q, k, v = make()
    bias, sinks = torch.randn(1, 6, 23, 23), torch.randn(6)
    got = call(attention, q, k, v, None, bias, sinks, causal=True)
    truth = call(
        reference.attention, q.double(), k.double(), v.double(), None, bias.double(),
        sinks.double(), causal=True,
    )  # fmt: skip
    assert (got - truth).abs().max() <= 1e-5
    assert (got - call(attention, q, k, v, None, bias, causal=True)).abs().max() > 1e-2


def test_window_of_one_is_the_value():
    q, k, v = make(heads=2)
    assert torch.equal(call(attention, q, k, v, causal=True, window=1), v.transpose(1, 2))


@pytest.mark.parametrize("wrong", [{"window": 4}, {"window": 6}, {"window": 5, "causal": False}])
def test_kinds_differ(wrong):
    q, k, v = make()
    right = call(attention, q, k, v, causal=True, window=5)
    assert (right - call(attention, q, k, v, **({"causal": True} | wrong))).abs().max() > 1e-2


def test_opcheck():
    q, k, v = (t.requires_grad_() for t in make(length=5, keys=5))
    args = (q, k, v, None, None, None, None, 0.25, True, 3, 0, 1, 0.0)
    torch.library.opcheck(torch.ops.rewriter.attention.default, args)
