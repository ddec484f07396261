"""Low rank in graphs: sites, forms, the sequential fit, against float64 arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from rewriter.errors import PlanError
from rewriter.graph import Graph
from rewriter.linear_algebra import cost
from rewriter.passes._low_rank_sequential import Moments, corrected, stream
from rewriter.passes.low_rank import LowRank
from rewriter.protocol import Calibration, NearMiss, Site

aten = torch.ops.aten


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    """Correlated rows with a decaying spectrum, like activations."""
    scale = torch.logspace(0, -2, width, dtype=torch.float64)
    return normal(count, width, seed=seed) * scale @ normal(width, width, seed=seed + 1)


# ---- graphs ------------------------------------------------------------------------------


class Fake(Calibration):
    """Interprets the graph on one batch; output Grams are of a fixed random gradient."""

    def __init__(self, graph: Graph, *inputs: Tensor, gradients: bool = True) -> None:
        self.graph, self.arguments, self.gradients = graph, inputs, gradients
        self.asked: list[int] = []

    def inputs(self, nodes: list[Node]) -> dict[Node, Tensor]:
        values: dict[Node, Tensor] = {}

        class Keep(Interpreter):
            def run_node(self, n: Node):
                result = super().run_node(n)
                if n in nodes:
                    values[n] = result
                return result

        with torch.no_grad():
            Keep(self.graph.module).run(*self.arguments)
        return {n: v.reshape(-1, v.shape[-1]) for n, v in values.items()}

    def sequences(self, groups: list[list[Node]]) -> Iterator[list[dict[Node, Tensor]]]:
        for nodes in groups:
            assert [n.op for n in nodes] == ["placeholder"] * len(nodes)
            rows = zip(*(a.split(1) for a in self.arguments), strict=True)
            yield [dict(zip(nodes, row, strict=True)) for row in rows]

    def grams(self, nodes: list[Node]) -> dict[Node, Tensor]:
        self.asked.append(len(nodes))
        return {n: v.double().T @ v.double() for n, v in self.inputs(nodes).items()}

    def output_grams(self, nodes: list[Node]) -> dict[Node, Tensor]:
        if not self.gradients:
            raise NotImplementedError
        found = {}
        for seed, (node, value) in enumerate(self.inputs(nodes).items()):
            g = rows(64, value.shape[-1], seed=seed)
            found[node] = g.T @ g / 64
        return found


class Conv1D(nn.Module):
    """GPT-2's linear: the weight is stored transposed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.q = nn.Linear(24, 24, bias=False)
        self.k = nn.Linear(24, 12)
        self.up = nn.Linear(24, 60)
        self.down = Conv1D(60, 24)
        self.shared = nn.Linear(24, 24)
        self.head = nn.Linear(24, 50, bias=False)
        self.head.weight = self.embed.weight
        self.one = nn.Linear(24, 1)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        x = x + self.q(x) * self.k(x).repeat(1, 1, 2)
        x = x + self.down(torch.relu(self.up(x)))
        x = self.shared(torch.tanh(self.shared(x)))
        return self.head(x), self.one(x)


IDS = torch.randint(50, (4, 40), generator=torch.Generator().manual_seed(0))


def small(model: nn.Module | None = None) -> Graph:
    if model is None:
        torch.manual_seed(0)
        model = Small()
    module = torch.export.export(model.eval(), (IDS,)).module(check_guards=False)
    graph = Graph(module=module)
    graph.sweep()  # export lists parameters that nothing reads
    return graph


def chosen(rewriting: LowRank, graph: Graph) -> list[Site]:
    return [s for s in rewriting.sites(graph) if isinstance(s, Site)]


def run(graph: Graph, **options) -> tuple[dict[str, dict], Fake]:
    """Prepare and rewrite every site as the driver does; facts by site, and the calibration."""
    rewriting = LowRank(**options)
    found = chosen(rewriting, graph)
    calibration = Fake(graph, IDS)
    rewriting.prepare(graph, found, calibration)
    facts = {}
    for site in found:
        made = rewriting.rewrite(graph, site)
        graph.sweep(made.dropped)
        facts[site.name] = made.facts
    assert set(rewriting._factored) == {s.name for s in found}  # for `expected`
    return facts, calibration


def difference(graph: Graph, expected: tuple[Tensor, Tensor]) -> float:
    actual = graph.module(IDS)
    return max(
        float((a - e).abs().max() / e.abs().max()) for a, e in zip(actual, expected, strict=True)
    )


def test_sites_and_near_misses():
    found = list(LowRank(keep=0.5).sites(small()))
    assert [s.name for s in found if isinstance(s, Site)] == ["q", "k", "up", "down"]
    reasons = {s.name: s.reason for s in found if isinstance(s, NearMiss)}
    assert "shared by 2 linears" in reasons["shared"]
    assert "rank 1" in reasons["one"]
    tied = [r for r in reasons.values() if "tied to an embedding" in r]
    assert len(tied) == 1


@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize("weighting", ["activation", "two_sided"])
def test_full_rank_is_the_original(form, weighting):
    graph = small()
    with torch.no_grad():
        expected = graph.module(IDS)
        facts, calibration = run(graph, rank=1000, form=form, weighting=weighting)
        assert difference(graph, expected) <= 1e-5
    assert {f["rank"] for f in facts.values()} == {12, 24}
    assert calibration.asked == [3]  # q and k have one input
    names = {n for n, _ in graph.parameters()}
    assert "q.weight" not in names and "down.weight" not in names
    assert {"k.bias", "down.bias"} <= names


@pytest.mark.parametrize("weighting", ["activation", "two_sided"])
def test_pivot_and_factors_are_one_function(weighting):
    graphs = {form: small() for form in ("factors", "pivot")}
    with torch.no_grad():
        before = graphs["pivot"].module(IDS)
        facts = {f: run(g, rank=8, form=f, weighting=weighting)[0] for f, g in graphs.items()}
        expected = graphs["factors"].module(IDS)
        assert difference(graphs["pivot"], expected) <= 1e-5
        assert difference(graphs["pivot"], before) > 1e-2  # rank 8 is not the original
    for name in facts["pivot"]:
        assert facts["pivot"][name]["form"] == "pivot"
        saved = (
            facts["factors"][name]["parameters_after"] - facts["pivot"][name]["parameters_after"]
        )
        assert saved == 8 * 8


@pytest.mark.parametrize("name", ["k", "up", "down"])
def test_measured_loss_is_the_predicted_one(name):
    """In the graph, in float32, for both layouts of a weight."""
    graph = small()
    rewriting = LowRank(rank=8, weighting="activation")
    site = next(s for s in chosen(rewriting, graph) if s.name == name)
    calibration = Fake(graph, IDS)
    rewriting.prepare(graph, [site], calibration)
    expected = calibration.inputs([site.node])[site.node].double()
    made = rewriting.rewrite(graph, site)
    graph.sweep(made.dropped)
    actual = calibration.inputs([made.output])[made.output].double()
    error = float((actual - expected).square().sum())
    assert made.facts["predicted_loss"] > 0.01 * made.facts["total_energy"]
    assert abs(error - made.facts["predicted_loss"]) <= 1e-6 * made.facts["total_energy"]


@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize("allocation", ["uniform", "loss_curve"])
@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_keep_is_respected(form, allocation, keep):
    graph = small()
    facts, _ = run(graph, keep=keep, form=form, allocation=allocation)
    before = sum(f["parameters_before"] for f in facts.values())
    after = sum(f["parameters_after"] for f in facts.values())
    assert after <= keep * before
    # uniform loses up to one rank a site: coarse at these widths
    assert after >= (keep - (0.01 if allocation == "loss_curve" else 0.06)) * before
    actual = sum(
        v.numel()
        for n, v in graph.parameters()
        if v.is_floating_point() and n.split(".")[0] in facts and not n.endswith(".bias")
    )
    assert actual == after


def test_keep_everything_changes_nothing():
    graph = small()
    text = str(graph)
    facts, _ = run(graph, keep=1.0)
    assert str(graph) == text
    assert {f["form"] for f in facts.values()} == {"dense"}


def test_planted_rank_is_found():
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():
        model.up.weight.copy_(torch.randn(60, 3) @ torch.randn(3, 24))
    graph = small(model)
    expected = graph.module(IDS)
    dense = 24 * 24 + 12 * 24 + 60 * 24 * 2
    facts, _ = run(graph, keep=1 - 0.8 * (1440 - cost(3, (60, 24), True)) / dense)
    assert facts["up"]["rank"] < 24 and facts["up"]["predicted_loss"] <= 1e-6
    assert {facts[n]["form"] for n in ("q", "k", "down")} == {"dense"}
    assert difference(graph, expected) <= 1e-5


def test_correction_is_least_squares_and_no_drift_is_no_change():
    weight, x = normal(12, 24, seed=3), rows(200, 24)
    drifted = x @ (torch.eye(24, dtype=x.dtype) + 0.1 * normal(24, 24, seed=4))
    drifted += 0.1 * normal(200, 24, seed=5)
    gram, drift = drifted.T @ drifted, drifted.T @ (x - drifted)
    missing = normal(200, 12, seed=6)  # of the stream that the output is added to
    for lost in (None, missing):
        moments = Moments(gram, drift, None if lost is None else drifted.T @ lost)
        made = corrected(weight, moments, 1e-12)
        target = x @ weight.T + (0 if lost is None else lost)
        wanted = torch.linalg.lstsq(drifted, target).solution.T
        assert (made - wanted).abs().max() <= 1e-8 * wanted.abs().max()
    zeros = torch.zeros_like(gram)
    assert torch.equal(corrected(weight, Moments(gram, zeros, zeros[:, :12]), 0.01), weight)
    # A site whose inputs have all become zero.
    assert not corrected(weight, Moments(zeros, zeros), 0.01).isnan().any()


@pytest.mark.parametrize("weighting", ["activation", "two_sided"])
def test_sequential_makes_up_for_earlier_sites(weighting):
    """`down` reads what `q`, `k` and `up` have changed; `down` itself has nearly full rank."""
    gaps, sites = {}, {}
    for sequential in (False, True):
        graph = small()
        node = next(n for n in graph.linears if n.name == "down").node
        fake = Fake(graph, IDS)
        exact = fake.inputs([node])[node].double()
        rewriting = LowRank(rank=10, weighting=weighting, sequential=sequential, ridge=1e-6)
        found = {s.name: s for s in chosen(rewriting, graph)}
        rewriting.prepare(graph, list(found.values()), fake)
        for site in found.values():
            made = rewriting.rewrite(graph, site)
            graph.sweep(made.dropped)
            sites[site.name, sequential] = made
        actual = fake.inputs([made.output])[made.output].double()
        gaps[sequential] = float((actual - exact).square().sum() / exact.square().sum())
    assert "drift" not in sites["down", False].facts
    assert sites["q", True].facts["drift"] <= 1e-6  # nothing before it has changed
    assert sites["down", True].facts["drift"] > 1e-2
    assert gaps[True] < 0.98 * gaps[False], gaps


def test_what_the_stream_has_lost_is_made_up_for():
    """`down` is added to a stream that `q` and `k` have changed; `q` is multiplied first."""
    graph = small()
    linears = {n.name: n for n in graph.linears}
    assert stream(linears["q"]) is None and stream(linears["shared"]) is None
    lost = stream(linears["down"])
    assert lost is not None and lost.target is torch.ops.aten.add.Tensor
    gaps = {}
    for residual in (False, True):
        graph = small()
        node = next(n for n in graph.linears if n.name == "down").node
        (view,) = node.users
        (after,) = view.users
        fake = Fake(graph, IDS)
        exact = fake.inputs([after])[after].double()
        rewriting = LowRank(rank=10, residual=residual, ridge=1e-6)
        found = chosen(rewriting, graph)
        rewriting.prepare(graph, found, fake)
        for site in found:
            graph.sweep(rewriting.rewrite(graph, site).dropped)
        actual = fake.inputs([after])[after].double()
        gaps[residual] = float((actual - exact).square().sum() / exact.square().sum())
    assert gaps[True] < 0.95 * gaps[False], gaps


def test_sequential_is_deterministic():
    made = [run(small(), keep=0.7)[0] for _ in range(2)]
    assert made[0] == made[1]


def test_falls_back_without_a_loss_unless_asked():
    graph = small()
    rewriting = LowRank(rank=4)
    found = chosen(rewriting, graph)
    rewriting.prepare(graph, found, Fake(graph, IDS, gradients=False))
    assert rewriting.rewrite(graph, found[0]).facts["weighting"] == "activation"
    graph = small()
    rewriting = LowRank(rank=4, weighting="two_sided")
    with pytest.raises(NotImplementedError):
        rewriting.prepare(graph, chosen(rewriting, graph), Fake(graph, IDS, gradients=False))


def test_ill_conditioned_pivot_falls_back(monkeypatch):
    monkeypatch.setattr("rewriter.passes.low_rank.to_pivot", lambda a, b: None)
    facts, _ = run(small(), rank=4)
    assert facts["q"]["form"] == "factors" and "ill-conditioned" in facts["q"]["fallback"]


def test_mistakes_are_explained():
    for options in ({}, {"keep": 0.5, "rank": 3}, {"keep": 1.5}, {"rank": 0}):
        with pytest.raises(ValidationError):
            LowRank(**options)
    graph = small()
    rewriting = LowRank(keep=0.01)
    with pytest.raises(PlanError, match="data"):
        rewriting.prepare(graph, chosen(rewriting, graph), None)
    with pytest.raises(PlanError, match="raise keep"):
        rewriting.prepare(graph, chosen(rewriting, graph), Fake(graph, IDS))
