"""Lifting: how many nodes, with which literals, and the numbers at another batch and length."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.lift import lift

ATTENTION = torch.ops.rewriter.attention.default
NAMES = [a.name for a in ATTENTION._schema.arguments]
AUTO = torch.export.Dim.AUTO
HEADS, SIZE = 4, 8
WIDTH = HEADS * SIZE


def nodes(module):
    found = [n for n in module.graph.nodes if n.target is ATTENTION]
    return [dict(zip(NAMES, n.args, strict=True)) | {"node": n} for n in found]


def sharpen(model: nn.Module) -> nn.Module:
    """Random weights large enough that attention is far from uniform and outputs are O(1)."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=1.5 / math.sqrt(p.shape[-1]))
        elif "norm" not in name and "ln_" not in name:
            nn.init.normal_(p, std=0.1)
    return model.eval()


def export(model, args, kwargs=None, dynamic=None):
    if dynamic is None:
        dynamic = tuple({0: AUTO, 1: AUTO} for _ in args)
    with torch.no_grad():
        program = torch.export.export(
            model, args, kwargs or {}, dynamic_shapes=dynamic, strict=False
        )
    return program.module()


def check(model, small, large, valid=None, kwargs=None, dynamic=None, scale=True):
    """Lift and compare with the original on `large`, inputs of another batch and length."""
    model = sharpen(model) if scale else model.eval()
    module = export(model, small, kwargs, dynamic)
    near = lift(module)
    with torch.no_grad():
        want, got = model(*large, **(kwargs or {})), module(*large, **(kwargs or {}))
    pick = lambda o: o[0] if isinstance(o, tuple) else getattr(o, "logits", o)  # noqa: E731
    want, got = pick(want), pick(got)
    if valid is not None:
        want, got = want[valid], got[valid]
    assert 0.05 < want.std() < 50, "the test is blind"
    assert not want.isnan().any()
    assert (want - got).abs().max() <= 1e-5 * max(1.0, float(want.std()))
    return module, nodes(module), near


def x(batch, length):
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(length))


def real(batch, length, left=False):
    """[B, S] bool with padding in every row but the first."""
    keep = torch.ones(batch, length, dtype=torch.bool)
    for row in range(1, batch):
        keep[row, : 2 * row] = False
    return keep if left else keep.flip(-1)


class Base(nn.Module):
    kv_heads = HEADS

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, self.kv_heads * SIZE)
        self.v = nn.Linear(WIDTH, self.kv_heads * SIZE)
        self.o = nn.Linear(WIDTH, WIDTH)

    def heads(self, x):
        b, t, _ = x.shape
        split = lambda y, h: y.view(b, t, h, SIZE)  # noqa: E731
        return (
            split(self.q(x), HEADS),
            split(self.k(x), self.kv_heads),
            split(self.v(x), self.kv_heads),
        )

    def out(self, y):
        return self.o(y.transpose(1, 2).reshape(y.shape[0], y.shape[2], WIDTH))


class Hand(Base):
    """matmul, div, in-place and padded mask, softmax, dropout, matmul."""

    def forward(self, x, keep):
        q, k, v = (t.transpose(1, 2) for t in self.heads(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(SIZE)
        scores = scores.masked_fill(~keep[:, None, None, :], float("-inf"))
        weights = F.dropout(torch.softmax(scores.float(), -1).to(q.dtype), 0.1, self.training)
        return self.out(weights @ v)


def test_hand_written_with_padding():
    keep = real(3, 13)
    _, (site,), near = check(Hand(), (x(2, 9), real(2, 9)), (x(3, 13), keep))
    assert near == []
    assert site["mask"].meta["val"].dim() == 2 and site["bias"] is None
    assert site["causal"] is False and site["window"] == 0
    assert site["scale"] == pytest.approx(1 / math.sqrt(SIZE))
    assert site["node"].meta["val"].dim() == 4


def test_nothing_of_the_old_attention_is_left():
    module, _, _ = check(Hand(), (x(2, 9), real(2, 9)), (x(3, 13), real(3, 13)))
    left = {str(n.target) for n in module.graph.nodes}
    assert not left & {"aten.softmax.int", "aten.matmul.default", "aten.dropout.default"}


class NanoGPT(Base):
    """The mask is a buffer, cut and compared with zero."""

    def __init__(self, window=0, block=40):
        super().__init__()
        mask = torch.tril(torch.ones(block, block))
        if window:
            mask = mask - torch.tril(torch.ones(block, block), -window)
        self.register_buffer("bias", mask.view(1, 1, block, block))

    def forward(self, x):
        t = x.shape[1]
        q, k, v = (t.transpose(1, 2) for t in self.heads(x))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        return self.out(F.softmax(att, dim=-1) @ v)


# A window of 20 is invisible at the example's length and at the short probes.
@pytest.mark.parametrize("window", [0, 3, 20])
def test_causal_buffer(window):
    _, (site,), near = check(NanoGPT(window), (x(2, 9),), (x(3, 31),))
    assert near == []
    assert (site["causal"], site["window"]) == (True, window)
    assert site["mask"] is None and site["bias"] is None


class Triu(Base):
    """A triangle of -inf is added; `inplace` fills the scores instead."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        t = x.shape[1]
        q, k, v = (t.transpose(1, 2) for t in self.heads(x))
        scores = q @ k.transpose(-2, -1) / SIZE**0.5
        if self.kind == "add":
            scores = scores + torch.triu(torch.full((t, t), float("-inf")), diagonal=1)
        elif self.kind == "where":
            keep = torch.ones(t, t, dtype=torch.bool).tril()
            scores = torch.where(keep, scores, torch.finfo(scores.dtype).min)
        elif self.kind == "inplace":
            scores.masked_fill_(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
        elif self.kind == "window":
            d = torch.arange(t)[:, None] - torch.arange(t)[None, :]
            scores = scores.masked_fill((d < 0) | (d >= 17), -1e9)
        elif self.kind == "view":
            scores[:, :, 0].fill_(0)
        elif self.kind == "even":  # not causal, not a window
            d = torch.arange(t)[:, None] - torch.arange(t)[None, :]
            scores = scores.masked_fill((d % 2) == 1, float("-inf"))
        elif self.kind == "sin":
            scores = torch.sin(scores)
        elif self.kind == "weak":
            scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -2.0)
        elif self.kind == "cap":
            scores = 3.0 * torch.tanh(scores / 3.0)
        return self.out(scores.softmax(-1) @ v)


@pytest.mark.parametrize("kind", ["add", "where", "inplace", "window"])
def test_causal_mask_built_in_the_graph(kind):
    _, (site,), near = check(Triu(kind), (x(2, 9),), (x(3, 31),))
    assert near == [] and site["causal"] is True
    assert site["window"] == (17 if kind == "window" else 0)
    assert site["mask"] is None and site["bias"] is None


def test_soft_cap():
    _, (site,), _ = check(Triu("cap"), (x(2, 9),), (x(3, 13),))
    assert site["softcap"] == 3.0 and site["scale"] == pytest.approx(SIZE**-0.5)


def test_other_masks_stay_dense():
    _, (site,), near = check(Triu("even"), (x(2, 9),), (x(3, 13),))
    assert near == [] and site["causal"] is False and site["mask"].meta["val"].dim() == 4


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("sin", "sin lies between"),
        ("weak", "-2.0, which does not hide"),
        ("view", "through a view"),
    ],
)
def test_near_misses_have_reasons(kind, reason):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Triu(kind)

        def forward(self, x):
            return self.block(x)

    _, sites, near = check(Outer(), (x(2, 9),), (x(3, 13),))
    assert sites == []
    ((path, text),) = near
    assert path == "block" and reason in text


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        weights = F.softmax(self.gate(x), -1)
        return (weights[..., None, :] @ self.up(x).unflatten(-1, (3, WIDTH)))[..., 0, :]


def test_router_is_no_near_miss():
    _, sites, near = check(Router(), (x(2, 9),), (x(3, 13),))
    assert sites == [] and near == []


class Einsum(Base):
    def __init__(self, scores="blhd,bshd->bhls", values="bhls,bshd->blhd"):
        super().__init__()
        self.scores, self.values = scores, values

    def forward(self, x):
        q, k, v = self.heads(x)
        if "blhs" in self.scores:
            weights = (torch.einsum(self.scores, q, k) * SIZE**-0.5).softmax(-1)
        else:
            scores = torch.einsum(self.scores, q, k) / SIZE**0.5
            t = x.shape[1]
            scores = scores + torch.full((t, t), -torch.inf).triu(1)
            weights = scores.softmax(-1)
        return self.o(torch.einsum(self.values, weights, v).flatten(2))


@pytest.mark.parametrize(
    ("scores", "values", "causal"),
    [
        ("blhd,bshd->bhls", "bhls,bshd->blhd", True),
        ("b i h d , b j h d -> b h i j", "b h i j, b j h d -> b i h d", True),
        ("blhd,bshd->blhs", "blhs,bshd->blhd", False),
    ],
)
def test_einsum(scores, values, causal):
    _, (site,), near = check(Einsum(scores, values), (x(2, 9),), (x(3, 13),))
    assert near == [] and site["causal"] is causal


class GroupedEinsum(Base):
    kv_heads = 2

    def forward(self, x):
        q, k, v = self.heads(x)
        q = q.unflatten(2, (2, 2))
        w = torch.einsum("blkgd,bskd->bkgls", q, k).mul(SIZE**-0.5).softmax(-1)
        return self.o(torch.einsum("bkgls,bskd->blkgd", w, v).flatten(2))


def test_grouped_einsum():
    _, (site,), _ = check(GroupedEinsum(), (x(2, 9),), (x(3, 13),))
    assert site["key"].meta["val"].shape[1] == 2 and site["query"].meta["val"].shape[1] == 4


class Grouped(Base):
    kv_heads = 2

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in self.heads(x))
        if self.kind == "enable_gqa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.out(y)
        repeat = {
            "expand": lambda t: t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(*q.shape),
            "interleave": lambda t: t.repeat_interleave(2, dim=1),
            "before": lambda t: t.transpose(1, 2).repeat_interleave(2, dim=2).transpose(1, 2),
            "tile": lambda t: t.repeat(1, 2, 1, 1),
        }[self.kind]
        return self.out(F.scaled_dot_product_attention(q, repeat(k), repeat(v), scale=0.5))


@pytest.mark.parametrize("kind", ["expand", "interleave", "before", "enable_gqa", "tile"])
def test_repeated_heads(kind):
    module, (site,), near = check(Grouped(kind), (x(2, 9),), (x(3, 13),))
    assert near == []
    # Tiling pairs query and key heads differently: it must stay.
    assert site["key"].meta["val"].shape[1] == (4 if kind == "tile" else 2)
    assert site["causal"] is (kind == "enable_gqa")
    assert site["scale"] == pytest.approx(SIZE**-0.5 if kind == "enable_gqa" else 0.5)


class Sdpa(Base):
    """A dense mask as transformers builds it: causal and padding in one tensor."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.table = nn.Embedding(64, HEADS)

    def forward(self, x, mask):
        b, t, _ = x.shape
        q, k, v = (t.transpose(1, 2) for t in self.heads(x))
        causal = torch.arange(t)[None, :] <= torch.arange(t)[:, None]
        both = causal[None, None] & mask[:, None, None, :].bool()
        if self.kind == "float":
            both = torch.where(both, 0.0, torch.finfo(x.dtype).min)
        elif self.kind == "old":  # (1 - mask) * min, as in older models
            both = (1.0 - mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        elif self.kind == "relative":
            d = torch.arange(t)[:, None] - torch.arange(t)[None, :]
            bias = self.table(d.clamp(-30, 30) + 30).permute(2, 0, 1)[None]
            both = bias.masked_fill(~both, float("-inf"))
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=both))


@pytest.mark.parametrize("kind", ["bool", "float", "old", "relative"])
def test_mask_of_causal_and_padding(kind):
    keep = real(3, 13)
    args = (x(2, 9), real(2, 9).long()), (x(3, 13), keep.long())
    _, (site,), near = check(Sdpa(kind), *args, valid=keep)
    assert near == []
    assert site["causal"] is (kind != "old")
    assert site["mask"].name == "mask"
    assert (site["bias"] is not None) is (kind == "relative")


class Mha(nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        self.a = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x, hidden):
        return self.a(x, x, x, key_padding_mask=hidden, need_weights=self.need_weights)[0]


class MhaWeights(Mha):
    def forward(self, x, hidden):
        return self.a(x, x, x, key_padding_mask=hidden, need_weights=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(need_weights):
    keep = real(3, 13)
    args = (x(2, 9), ~real(2, 9)), (x(3, 13), ~keep)
    _, (site,), near = check(Mha(need_weights), *args)
    assert near == []
    assert site["mask"].meta["val"].dim() == 2 and site["bias"] is None
    assert site["query"].meta["val"].shape[1] == HEADS
    assert site["scale"] == pytest.approx(1.0 if need_weights else SIZE**-0.5)


def test_weights_that_are_returned_are_reported():
    args = (x(2, 9), ~real(2, 9)), (x(3, 13), ~real(3, 13))
    module, sites, near = check(MhaWeights(True), *args)
    assert len(sites) == 1
    assert near[0][0] == "a" and near[0][1].startswith("lifted, but its weights")


def test_transformer_encoder():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.TransformerEncoder(copy.deepcopy(layer), 2)

        def forward(self, x, hidden):
            return self.e(x, src_key_padding_mask=hidden)

    keep = real(3, 13)
    args = (x(2, 9), ~real(2, 9)), (x(3, 13), ~keep)
    _, sites, near = check(Encoder(), *args, valid=keep)
    assert len(sites) == 2 and near == []
    assert all(s["mask"].meta["val"].dim() == 2 for s in sites)
    assert [s["node"].meta["path"] for s in sites] == [f"e.layers.{i}.self_attn" for i in (0, 1)]


class Cross(Base):
    def forward(self, x, memory):
        q, k, v = self.q(x), self.k(memory), self.v(memory)
        return self.o((q @ k.transpose(1, 2) / WIDTH**0.5).softmax(-1) @ v)


def test_single_head_cross_attention():
    _, (site,), near = check(Cross(), (x(2, 9), x(2, 7)), (x(3, 13), x(3, 5)))
    assert near == [] and site["query"].meta["val"].shape[1] == 1


class Similarity(nn.Module):
    def forward(self, x, y):
        return (x @ y.transpose(1, 2) / 9).softmax(-1) * 10


def test_weights_without_value_are_a_near_miss():
    _, sites, near = check(Similarity(), (x(2, 9), x(2, 7)), (x(3, 13), x(3, 5)))
    assert sites == [] and near == [("", "its weights do not multiply a value")]


class Channels(Base):
    """Attention between channels (XCiT): no mixer of positions."""

    def forward(self, x):
        q, k, v = (t.permute(0, 2, 3, 1) for t in self.heads(x))
        y = (q @ k.transpose(-1, -2) / 9).softmax(-1) @ v
        return self.o(y.permute(0, 3, 1, 2).flatten(2))


def test_channel_attention_is_a_near_miss():
    _, sites, near = check(Channels(), (x(2, 9),), (x(3, 13),))
    assert sites == [] and "over channels" in near[0][1]


# ---- transformers ------------------------------------------------------------------------


def language_model(kind):
    import transformers as t

    torch.manual_seed(0)
    common = {"vocab_size": 64, "hidden_size": WIDTH, "use_cache": False}
    if kind == "bloom":
        return t.BloomForCausalLM(t.BloomConfig(n_layer=2, n_head=HEADS, **common))
    options = {"alibi": kind == "falcon alibi", "multi_query": kind != "falcon new"}
    if kind == "falcon new":
        options |= {"new_decoder_architecture": True, "num_kv_heads": 2}
    config = t.FalconConfig(num_hidden_layers=2, num_attention_heads=HEADS, **options, **common)
    return t.FalconForCausalLM(config)


@pytest.mark.parametrize("kind", ["falcon", "falcon new", "falcon alibi", "bloom"])
@pytest.mark.parametrize("left", [False, True])
def test_language_models_outside_the_interface(kind, left):
    model = sharpen(language_model(kind))
    names = ("input_ids", "attention_mask")
    dynamic = {n: {0: AUTO, 1: AUTO} for n in names} | {"use_cache": None}
    draw = lambda b, n: {  # noqa: E731
        "input_ids": torch.randint(64, (b, n), generator=torch.Generator().manual_seed(1)),
        "attention_mask": real(b, n, left).long(),
        "use_cache": False,
    }
    module = export(model, (), draw(2, 9), dynamic)
    near = lift(module)
    sites = nodes(module)
    assert len(sites) == 2 and near == []
    for site in sites:
        assert site["causal"] is True
        assert site["mask"].name == "attention_mask"
        assert (site["bias"] is not None) is (kind in ("falcon alibi", "bloom"))
        heads = {"falcon": 1, "falcon new": 2}.get(kind, 1 if "falcon" in kind else HEADS)
        assert site["key"].meta["val"].shape[1] == heads
    large = draw(3, 19)
    with torch.no_grad():
        want, got = model(**large).logits, module(**large)[0]
    keep = large["attention_mask"].bool()
    assert want.std() > 0.05
    assert (want - got)[keep].abs().max() <= 1e-5 * max(1.0, float(want.std()))


def test_siglip_pooling_head():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=HEADS, image_size=32, patch_size=8,
    )  # fmt: skip
    model = sharpen(SiglipVisionModel(config))
    draw = lambda b: torch.randn(b, 3, 32, 32, generator=torch.Generator().manual_seed(b))  # noqa: E731
    module = export(model, (draw(2),), dynamic=({0: AUTO},))
    assert lift(module) == []
    assert len(nodes(module)) == 2
    with torch.no_grad():
        want, got = model(draw(5)), module(draw(5))
    got = got if isinstance(got, tuple) else (got["last_hidden_state"], got["pooler_output"])
    for a, b in zip((want.last_hidden_state, want.pooler_output), got, strict=True):
        assert isinstance(b, Tensor) and (a - b).abs().max() <= 1e-5
