"""`sliding_window`: sites, reasons, numbers."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from rewriter.capture import capture
from rewriter.graph import argument
from rewriter.passes.sliding_window import SlidingWindow
from rewriter.protocol import NearMiss, Site

LENGTH, WIDTH = 12, 6
ATTENTION = torch.ops.rewriter.attention.default


class Plain(nn.Module):
    """Attention of x to itself, one head, with the node's kind as options."""

    def __init__(self, causal=True, window=0, chunk=0, sinks=0, dense=False):
        super().__init__()
        self.kind = (causal, window, chunk, sinks)
        self.dense = dense

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = x[:, None]
        seen = mask[:, None, None] & mask[:, None, :, None] if self.dense else mask
        scale = WIDTH**-0.5
        return ATTENTION(h, h, h, seen, None, None, None, scale, *self.kind, 0.0)[:, :, 0]


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, :3] = False
    return torch.randn(2, LENGTH, WIDTH), mask


def make(**kind):
    return capture(Plain(**kind), example=inputs())


def only(graph, **options):
    (found,) = SlidingWindow(**options).sites(graph)
    return found


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ({"causal": False}, "bidirectional"),
        ({"dense": True}, "dense"),
        ({"chunk": 4}, "chunks of 4"),
        ({"window": 3}, "already has a window of 3"),
        ({"window": 5}, "already has a window of 5"),
    ],
)
def test_near_misses_say_why(kind, reason):
    found = only(make(**kind), window=5)
    assert isinstance(found, NearMiss)
    assert reason in found.reason


def rewritten(graph, **options):
    site = only(graph, **options)
    assert isinstance(site, Site)
    made = SlidingWindow(**options).rewrite(graph, site)
    graph.recompile()
    assert made.output is site.node and not made.dropped
    return made


def test_window_and_sinks_are_what_a_query_sees():
    graph = make()
    made = rewritten(graph, window=3, sinks=2)
    assert made.facts == {"window": 3, "sinks": 2}
    x, mask = inputs()
    (actual,) = graph.module(x, mask)
    row, start = x[0].double(), 3  # the first row is padded by three
    logits = row @ row.T * WIDTH**-0.5
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    seen = (j <= i) & (j >= start) & ((i - j < 3) | (j < start + 2))
    expected = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ row
    torch.testing.assert_close(actual[0, start:].double(), expected[start:], rtol=1e-5, atol=1e-5)


def test_a_window_as_long_as_the_text_is_exact():
    graph, (x, mask) = make(), inputs()
    (before,) = graph.module(x, mask)
    rewritten(graph, window=LENGTH)
    (after,) = graph.module(x, mask)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_a_narrower_window_does_not_show_sinks_the_model_never_saw():
    graph = make(window=8)
    assert rewritten(graph, window=3, sinks=4).facts["sinks"] == 0
    assert argument(graph.attention[0].node, "window") == 3


@pytest.mark.parametrize("options", [{"window": 0}, {"window": 4, "sinks": -1}, {}])
def test_bad_options(options):
    with pytest.raises(ValidationError):
        SlidingWindow(**options)
