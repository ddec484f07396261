"""`mamba2`: where the weights land, the exact degenerate case, the fit, padding, reasons."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.fx import Interpreter
from transformers.pytorch_utils import Conv1D

from rewriter.capture import capture
from rewriter.errors import PlanError
from rewriter.passes._mamba2_mixer import Mixer, fit, mixer_features
from rewriter.passes.mamba2 import Mamba2
from rewriter.protocol import Calibration, NearMiss, Site

DIM, HEADS, KV_HEADS, WIDTH = 24, 4, 2, 6
SIZES = [HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH]
ATTENTION = torch.ops.rewriter.attention.default


class Rotary(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.arange(x.shape[1])[:, None] / 10.0 ** torch.arange(3)
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor], partial: bool) -> Tensor:
    cos, sin = table
    if partial:
        rest, x, cos, sin = x[..., 4:], x[..., :4], cos[:, :4], sin[:, :4]
    low, high = x.chunk(2, -1)
    x = x * cos + torch.cat([-high, low], -1) * sin
    return torch.cat([x, rest], -1) if partial else x


class SelfAttention(nn.Module):
    def __init__(
        self,
        fused: str = "",
        bias: bool = True,
        norm: bool = False,
        cross: bool = False,
        causal: bool = True,
        partial: bool = False,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.fused, self.cross, self.causal, self.partial = fused, cross, causal, partial
        if fused:
            self.qkv_proj = nn.Linear(DIM, sum(SIZES), bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(DIM, n, bias) for n in SIZES)
        self.o_proj = nn.Linear(SIZES[0], DIM, bias)
        if transposed:  # GPT-2's linears: [in, out] weights on flattened tokens
            self.qkv_proj, self.o_proj = Conv1D(sum(SIZES), DIM), Conv1D(DIM, SIZES[0])
            nn.init.normal_(self.qkv_proj.bias)
        self.q_norm = nn.RMSNorm(WIDTH) if norm else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None, table) -> Tensor:
        batch, length, _ = x.shape
        if self.fused == "blocks":
            q, k, v = self.qkv_proj(x).split(SIZES, -1)
            q, k, v = (t.view(batch, length, -1, WIDTH) for t in (q, k, v))
        elif self.fused == "groups":  # every key head with its query heads and its value head
            grouped = self.qkv_proj(x).view(batch, length, KV_HEADS, -1, WIDTH)
            q, k, v = grouped[:, :, :, :-2], grouped[:, :, :, -2], grouped[:, :, :, -1]
            q = q.reshape(batch, length, HEADS, WIDTH)
        else:
            other = x + 1 if self.cross else x
            q, k, v = self.q_proj(x), self.k_proj(other), self.v_proj(x)
            q, k, v = (t.view(batch, length, -1, WIDTH) for t in (q, k, v))
        q, k, v = (t.transpose(1, 2) for t in (self.q_norm(q), k, v))
        q, k = rotate(q, table, self.partial), rotate(k, table, self.partial)
        y = ATTENTION(q, k, v, mask, None, None, None, WIDTH**-0.5, self.causal, 0, 0, 0, 0.0)
        return self.o_proj(y.reshape(batch, length, -1))


class Model(nn.Module):
    """Two residual layers on given embeddings."""

    def __init__(self, masked=True, **kind):
        super().__init__()
        torch.manual_seed(0)
        self.masked, self.rotary = masked, Rotary()
        self.layers = nn.ModuleList(SelfAttention(**kind) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        table = self.rotary(x)
        for layer in self.layers:
            x = x + layer(x, mask if self.masked else None, table)
        return x


def inputs(length: int = 10, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, DIM, generator=g), torch.ones(batch, length, dtype=torch.bool)


def make(**kind):
    return capture(Model(**kind), example=inputs())


class Text(Calibration):
    """Random sequences of several lengths through the graph as it is."""

    def __init__(self, graph, count=10):
        self.graph = graph
        self.data = [inputs(40 + i, 1, seed=i) for i in range(count)]

    def sequences(self, groups):
        nodes = [n for group in groups for n in group]
        found = []
        for x, mask in self.data:
            run = Interpreter(self.graph.module, garbage_collect_values=False)
            run.run(x, mask)
            found.append({n: run.env[n].detach() for n in nodes})
        return ([{n: one[n] for n in group} for one in found] for group in groups)

    inputs = grams = output_grams = None


def rewrite(graph, calibration=None, **options):
    method = Mamba2(**options)
    sites = list(method.sites(graph))
    assert len(sites) == 2 and all(isinstance(s, Site) for s in sites), sites
    method.prepare(graph, sites, calibration)
    made = []
    for site in sites:
        made.append(method.rewrite(graph, site))
        graph.sweep(made[-1].dropped)
    return made


def run(graph, x: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return graph.module(x, mask)[0]


def test_weights_land_where_matvlm_puts_them():
    graph = make()
    old = dict(graph.parameters())
    rewrite(graph, init="matvlm", fit="none", seed=3)
    new = dict(graph.parameters())
    for i in range(2):
        a, m = f"layers.{i}", f"layers.{i}.mamba2"
        rows = [SIZES[0], *SIZES[1:], SIZES[0], HEADS]
        z, x, b, c, dt = new[f"{m}.in_proj.weight"].split(rows)
        for part, name in ((x, "v_proj"), (b, "k_proj"), (c, "q_proj")):
            assert torch.equal(part, old[f"{a}.{name}.weight"])
            assert f"{a}.{name}.weight" not in new
        zb, xb, bb, cb, dtb = new[f"{m}.in_proj.bias"].split(rows)
        for part, name in ((xb, "v_proj"), (bb, "k_proj"), (cb, "q_proj")):
            assert torch.equal(part, old[f"{a}.{name}.bias"])
        assert not zb.any() and not dtb.any()
        assert torch.equal(new[f"{m}.out_proj.weight"], old[f"{a}.o_proj.weight"])
        assert torch.equal(new[f"{m}.out_proj.bias"], old[f"{a}.o_proj.bias"])

        bound = DIM**-0.5
        for random in (z, dt):
            assert random.abs().max() <= bound and random.std() > bound / 3
        conv = new[f"{m}.conv1d.weight"]
        assert conv.shape == (sum(SIZES), 4) and 0.4 < conv.abs().max() <= 0.5
        decay, D = new[f"{m}.A_log"].exp(), new[f"{m}.D"]
        assert decay.shape == D.shape == (HEADS,) and bool((D == 1).all())
        assert 1 <= decay.min() and decay.max() <= 16
        step = nn.functional.softplus(new[f"{m}.dt_bias"])
        assert 0.99e-3 <= step.min() and step.max() <= 0.101
        assert bool((new[f"{m}.norm.weight"] == 1).all())
    first, second = (new[f"layers.{i}.mamba2.in_proj.weight"][: SIZES[0]] for i in range(2))
    assert not torch.equal(first, second)
    again = make()
    rewrite(again, init="matvlm", fit="none", seed=3)
    assert torch.equal(again.tensor("layers.0.mamba2.in_proj.weight")[: SIZES[0]], first)


def test_without_biases_there_are_none():
    graph = make()
    rewrite(graph, init="matvlm", fit="none", bias=False)
    names = [n for n, _ in graph.parameters()]
    assert not [n for n in names if n.endswith("_proj.bias")]


def test_small_tensors_stay_float32():
    graph = capture(Model().bfloat16(), example=(inputs()[0].bfloat16(), inputs()[1]))
    rewrite(graph, fit="none")
    for name, tensor in graph.parameters():
        small = name.rpartition(".")[2] in ("A_log", "dt_bias", "D")
        assert tensor.dtype == (torch.float32 if small else torch.bfloat16), name
    x, mask = inputs()
    assert run(graph, x.bfloat16(), mask).dtype == torch.bfloat16


@pytest.mark.parametrize("init", ["calibrated", "long_decay"])
def test_half_lives_are_log_spaced_over_the_heads(init):
    graph = make()
    rewrite(graph, init=init, fit="none")
    m = "layers.0.mamba2"
    step = nn.functional.softplus(graph.tensor(f"{m}.dt_bias"))
    lives = 0.6931472 / (step * graph.tensor(f"{m}.A_log").exp())  # in tokens
    low, high = (1, 64) if init == "calibrated" else (8, 2048)
    expected = low * (high / low) ** (torch.arange(HEADS) / (HEADS - 1))
    torch.testing.assert_close(lives, expected, rtol=1e-3, atol=0)
    gate = nn.functional.silu(graph.tensor(f"{m}.in_proj.bias")[: SIZES[0]])
    torch.testing.assert_close(gate, torch.ones_like(gate), rtol=1e-4, atol=1e-4)


def linear_attention(model: SelfAttention, x: Tensor) -> Tensor:
    """tril(Q Kᵀ) V with the model's own q, k before the rotary; float64."""
    model, x = model.double(), x.double()
    if model.fused == "blocks":
        q, k, v = model.qkv_proj(x).split(SIZES, -1)
    elif model.fused == "groups":
        grouped = model.qkv_proj(x).unflatten(-1, (KV_HEADS, -1, WIDTH))
        parts = grouped[..., :-2, :], grouped[..., -2, :], grouped[..., -1, :]
        q, k, v = (t.flatten(2) for t in parts)
    else:
        q, k, v = model.q_proj(x), model.k_proj(x), model.v_proj(x)
    q, k, v = (t.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    y = (q @ k.transpose(-1, -2)).tril() @ v
    return model.o_proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"bias": False},
        {"partial": True},
        {"fused": "blocks"},
        {"fused": "groups"},
        {"fused": "groups", "partial": True},
        {"fused": "blocks", "transposed": True},
        {"masked": False},
    ],
    ids=str,
)
def test_degenerate_mixer_is_unnormalised_linear_attention(kind):
    graph = make(**kind)
    made = rewrite(graph, init="linear_attention", fit="none")
    assert len(made) == 2
    model, (x, mask) = Model(**kind), inputs(70)
    truth = x.double()
    for layer in model.layers:
        truth = truth + linear_attention(layer, truth)
    actual = run(graph, x, mask).double()
    error = (actual - truth).norm() / truth.norm()
    assert error < 1e-5, error


@pytest.mark.parametrize("init", ["matvlm", "calibrated", "long_decay", "linear_attention"])
def test_graph_and_plain_function_agree_and_the_past_ignores_the_future(init):
    graph = make()
    method = Mamba2(init=init, fit="none")
    site = next(iter(method.sites(graph)))
    made = method.rewrite(graph, site)
    graph.recompile()
    x, mask = inputs(70)
    actual = Interpreter(graph.module, garbage_collect_values=False)
    actual.run(x, mask)
    prefix = "layers.0.mamba2."
    tensors = {n.removeprefix(prefix): t for n, t in graph.parameters() if n.startswith(prefix)}
    linear = init == "linear_attention"
    act = "silu" if init == "matvlm" else "none"
    mixer = Mixer(tensors, HEADS, KV_HEADS, WIDTH, act, gate=not linear, norm=not linear)
    expected = nn.functional.linear(
        mixer_features(x, mixer), tensors["out_proj.weight"], tensors["out_proj.bias"]
    )
    torch.testing.assert_close(actual.env[made.output], expected)
    assert made.output.meta["val"].dim() == 3
    y = run(graph, x, mask)
    changed = x.clone()
    changed[:, 40:] += 1
    torch.testing.assert_close(run(graph, changed, mask)[:, :40], y[:, :40])


@pytest.mark.parametrize("init", ["matvlm", "calibrated"])
def test_left_padding_changes_nothing(init):
    graph = make()
    rewrite(graph, init=init, fit="none")
    x, mask = inputs(9)
    padded = torch.cat([torch.full((2, 4, DIM), 7.0), x], 1)
    longer = torch.cat([torch.zeros(2, 4, dtype=torch.bool), mask], 1)
    actual = run(graph, padded, longer)[:, 4:]
    torch.testing.assert_close(actual, run(graph, x, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["matvlm", "calibrated"])
def test_the_fit_improves_and_is_the_least_squares_solution(init):
    graph, truth = make(), make()
    made = rewrite(graph, Text(graph), init=init)
    for m in made:
        assert m.facts["relative_error"] < 0.8 * m.facts["relative_error_before"], m.facts
        assert m.facts["error_on"] == "held-out sequences"
    x, mask = inputs(50, seed=99)  # text that the fit has not seen
    raw = make()
    rewrite(raw, init=init, fit="none")
    expected = run(truth, x, mask)
    error = (run(graph, x, mask) - expected).norm()
    assert error < 0.8 * (run(raw, x, mask) - expected).norm()


def test_the_fit_recovers_an_output_projection_that_exists():
    graph = make()
    method = Mamba2(fit="none")
    site = next(iter(method.sites(graph)))
    method.rewrite(graph, site)
    prefix = "layers.0.mamba2."
    tensors = {n.removeprefix(prefix): t for n, t in graph.parameters() if n.startswith(prefix)}
    mixer = Mixer(tensors, HEADS, KV_HEADS, WIDTH)
    weight, bias = torch.randn(DIM, SIZES[0]), torch.randn(DIM)
    pairs = []
    for i in range(4):
        x = inputs(60, 1, seed=i)[0]
        pairs.append((x, nn.functional.linear(mixer_features(x, mixer), weight, bias)))
    fitted, facts = fit(mixer, pairs, ridge=1e-9)
    torch.testing.assert_close(fitted.tensors["out_proj.weight"], weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fitted.tensors["out_proj.bias"], bias, rtol=1e-3, atol=1e-3)
    assert facts["relative_error"] < 1e-3 and facts["error_on"] == "the fitted sequences"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ({"causal": False}, "bidirectional"),
        ({"cross": True}, "cross-attention"),
        ({"norm": True}, "query's projection and the rotary"),
    ],
)
def test_near_misses_say_why(kind, reason):
    found = list(Mamba2().sites(make(**kind)))
    assert len(found) == 2
    for miss in found:
        assert isinstance(miss, NearMiss)
        assert reason in miss.reason


def test_the_fit_needs_text():
    graph = make()
    method = Mamba2()
    with pytest.raises(PlanError, match="fit: none"):
        method.prepare(graph, list(method.sites(graph)), None)
    assert method.needs_calibration and not Mamba2(fit="none").needs_calibration


def test_an_open_gate_needs_a_bias():
    with pytest.raises(ValidationError, match="bias: true"):
        Mamba2(bias=False)
