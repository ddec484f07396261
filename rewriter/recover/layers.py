"""Layer choice: replace one layer at a time and measure what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from tqdm import tqdm
from transformers import PreTrainedModel

from rewriter.errors import RewriterError
from rewriter.evaluate.passkey import passkey_examples
from rewriter.evaluate.prompts import Example
from rewriter.graph import layer_of
from rewriter.plan import Plan
from rewriter.recover.data import training_text
from rewriter.recover.fit import fit_regions
from rewriter.recover.graphs import Frozen, extract, stateless
from rewriter.recover.modules import input_values, inputs_of
from rewriter.recover.regions import Region, find_regions
from rewriter.recover.session import half_precision
from rewriter.recover.stages import Fit
from rewriter.recover.teacher import teacher_graph

#: Nats of KL that a nat of the passkey's loss counts for.
PASSKEY = 0.05
FIT = 7168  # tokens of the closed-form fit


@dataclass
class Scan:
    """Cost of every layer, cheapest first, and a plan with the chosen ones.

    rows: {layer, sites, score, kl, kl_deleted, error, passkey}. kl: KL(original ‖ original with
    this layer replaced), nats a token, after the closed-form fit; kl_deleted: the same without
    the layer. error: relative error of the layer's output. passkey: rise of the loss of a
    passkey's tokens; None without a tokenizer.
    """

    rows: list[dict[str, Any]]
    layers: list[int]
    plan: Plan


@torch.no_grad()
def scan(
    model: PreTrainedModel | str | Path,
    name: str,
    data: Any = None,
    *,
    options: dict[str, Any] | None = None,
    tokens: int = 2048,
    length: int = 512,
    count: int | None = None,
    ratio: float | None = None,
    tokenizer: Any = None,
    passkey_tokens: int = 430,
    prompts: int = 2,
    seed: int = 0,
) -> Scan:
    """Rewrite every layer at once by `name`, then put them into the original one by one.

    The fit of a layer only sees the original's activations, so one rewrite serves all layers.
    score = KL after the fit + 0.05 · rise of the passkey's loss.

    Args:
        data: text, as for recovery; a small sample without it. options: of the pass.
        length: tokens of a sequence of that text; a window is only felt beyond its own length.
        count or ratio: how many layers to choose; a quarter without either.
        passkey_tokens: length of the `prompts` passkey prompts, which cost a forward each.

    Raises RewriterError: the pass has no site, or `count` is more than there are.
    """
    from rewriter.calibration import SAMPLE
    from rewriter.loading import load_model
    from rewriter.rewrite import _tokenizer, rewrite

    source = None if isinstance(model, PreTrainedModel) else str(model)
    original = model if isinstance(model, PreTrainedModel) else load_model(model)
    tokenizer = tokenizer or _tokenizer(source or str(getattr(original, "name_or_path", "")))
    data = data if data is not None else [SAMPLE]
    step = {"pass": name, **(options or {})}
    plan = {"steps": [{**step, "missing": "skip"}], "seed": seed}
    plan["gate"] = {"sequences": 1, "length": 64}
    text = training_text(data, tokenizer, tokens, length)
    made = rewrite(original, plan, data=text.sample(FIT, length, seed), tokenizer=tokenizer)
    if not made.lock["sites"]:
        raise RewriterError(f"{name} has no site in this model", "try `rewriter inspect`")
    teacher, student = stateless(teacher_graph(original, made)), stateless(made.graph)
    dtype = next(iter(made.graph.parameters()))[1].dtype
    frozen = Frozen(half=half_precision("auto", torch.device("cpu"), dtype))
    regions = find_regions(student, teacher, made.lock["sites"])
    layers = _by_layer(regions)
    wanted = count if count is not None else max(1, round((ratio or 0.25) * len(layers)))
    if wanted > len(layers):
        raise RewriterError(f"{wanted} layers are asked for, {len(layers)} have a site")
    tensors = {n: made.graph.tensor(n).detach() for r in regions for n in r.tensors}
    tensors = {n: t for n, t in tensors.items() if t.is_floating_point()}
    if not all("relative_error" in s["facts"] for s in made.lock["sites"]):
        windows = text.sample(FIT, length, seed)
        new, _ = fit_regions(student, teacher, regions, tensors, frozen, windows, Fit())
        tensors |= new
    asked = passkey_examples(tokenizer, passkey_tokens, prompts, seed) if tokenizer else []
    rows = _measure(student, teacher, layers, tensors, frozen, text.held_out, asked)
    for row in rows:
        row["score"] = row["kl"] + PASSKEY * max(0.0, row["passkey"] or 0.0)
    rows.sort(key=lambda r: r["score"])
    chosen = sorted(r["layer"] for r in rows[:wanted])
    made_plan = Plan.model_validate({"steps": [{**step, "layers": chosen}], "seed": seed})
    return Scan(rows, chosen, made_plan)


def _by_layer(regions: list[Region]) -> dict[int, list[Region]]:
    layers: dict[int, list[Region]] = {}
    for region in regions:
        layer = layer_of(region.site)
        if layer is not None:
            layers.setdefault(layer, []).append(region)
    if not layers:
        raise RewriterError("no site lies in a numbered layer", "choose sites with `targets`")
    return layers


def _measure(
    student: GraphModule,
    teacher: GraphModule,
    layers: dict[int, list[Region]],
    tensors: dict[str, Tensor],
    frozen: Frozen,
    windows: Tensor,
    prompts: list[Any],
) -> list[dict[str, Any]]:
    sums = {n: {"kl": 0.0, "kl_deleted": 0.0, "error": 0.0, "passkey": 0.0} for n in layers}
    pieces = {
        r.output: extract(student, r.inputs, [r.output], tensors, frozen)
        for regions in layers.values()
        for r in regions
    }
    logits: Any = teacher.graph.output_node().args[0]
    whole = extract(teacher, inputs_of(teacher), [logits[0].name], (), frozen)
    kinds = [(row[None], None) for row in windows] + [(e.tokens[None], e) for e in prompts]
    for ids, example in tqdm(kinds, desc="scan", leave=False, disable=None):
        values = input_values(teacher, ids)
        truth = whole(values, {})[0]
        truth = truth[0].float().log_softmax(-1)
        plain = _answer_loss(truth, example) if example is not None else 0.0
        variants = _variants(whole.module, layers, pieces, tensors, values, example is None)
        for layer, kind, made, error in variants:
            made = made[0].float().log_softmax(-1)
            total = sums[layer]
            if example is not None:
                total["passkey"] += (_answer_loss(made, example) - plain) / len(prompts)
                continue
            kl = float((truth.exp() * (truth - made)).sum(-1).mean())
            total[kind] += kl / len(windows)
            total["error"] += error / len(windows)
    return [
        {"layer": n, "sites": [r.site for r in layers[n]]}
        | sums[n]
        | ({} if prompts else {"passkey": None})
        for n in layers
    ]


def _variants(
    whole: GraphModule,
    layers: dict[int, list[Region]],
    pieces: dict[str, Any],
    tensors: dict[str, Tensor],
    values: dict[str, Tensor],
    deleted: bool,
) -> Iterator[tuple[int, str, Tensor, float]]:
    """(layer, kind, logits, error) of the original with each layer replaced, or left out.

    The original runs once; a variant goes on from the values before its first region.
    """
    nodes = list(whole.graph.nodes)
    place = {n.name: i for i, n in enumerate(nodes)}
    starts: dict[int, list[int]] = {}
    for layer, regions in layers.items():
        starts.setdefault(min(place[r.target] for r in regions), []).append(layer)
    environment: dict[Node, Any] = {}
    last = _last_uses(nodes, [r for regions in layers.values() for r in regions])
    for index, node in enumerate(nodes):
        for layer in starts.pop(index, ()):
            for kind in ("kl", "kl_deleted") if deleted else ("kl",):
                rest = _Rest(whole, nodes, last, pieces, tensors, values)
                made = rest.run(index, dict(environment), layers[layer], kind)
                yield layer, kind, *made
        if not starts:
            return
        environment[node] = _value(whole, node, environment, values)
        for used in last.get(node, ()):
            environment.pop(used, None)


@dataclass
class _Rest:
    """The rest of a forward pass, from a node on, with some values replaced."""

    whole: GraphModule
    nodes: list[Node]
    last: dict[Node, list[Node]]
    pieces: dict[str, Any]
    tensors: dict[str, Tensor]
    values: dict[str, Tensor]

    def run(
        self, start: int, environment: dict[Node, Any], regions: list[Region], kind: str
    ) -> tuple[Tensor, float]:
        """Logits, and the relative error of the replaced values."""
        replaced = {r.target: r for r in regions}
        needed = {n for r in regions for n in r.inputs}
        known = self.values | {n.name: v for n, v in environment.items() if n.name in needed}
        error = 0.0
        for node in self.nodes[start:]:
            value = _value(self.whole, node, environment, self.values)
            if node.op == "output":
                return value[0], error
            if node.name in replaced and kind == "kl":
                made = self.pieces[replaced[node.name].output](known, self.tensors)[0]
                gap = float((made - value).square().sum() / value.square().sum())
                error += gap**0.5 / len(regions)
                value = made
            elif node.name in replaced:
                value = torch.zeros_like(value)
            environment[node] = value
            if node.name in needed:
                known[node.name] = value
            for used in self.last.get(node, ()):
                environment.pop(used, None)
        raise AssertionError("a graph ends in its output")


def _last_uses(nodes: list[Node], regions: list[Region]) -> dict[Node, list[Node]]:
    """Values that are not needed after a node; a region's inputs are, until its output."""
    known = {n.name: n for n in nodes}
    reads: dict[Node, list[Node]] = {}
    for region in regions:
        reads.setdefault(known[region.target], []).extend(known[n] for n in region.inputs)
    last: dict[Node, Node] = {}
    for node in nodes:
        for used in (*node.all_input_nodes, *reads.get(node, ())):
            last[used] = node
    dead: dict[Node, list[Node]] = {}
    for used, node in last.items():
        dead.setdefault(node, []).append(used)
    return dead


def _value(
    module: GraphModule, node: Node, environment: dict[Node, Any], values: dict[str, Tensor]
) -> Any:
    if node.op == "placeholder":
        return values[node.name]
    if node.op == "get_attr":
        owner, _, leaf = str(node.target).rpartition(".")
        return getattr(module.get_submodule(owner), leaf)
    args = map_arg(node.args, environment.__getitem__)
    if node.op == "output":
        return args[0]
    kwargs = map_arg(node.kwargs, environment.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _answer_loss(logarithms: Tensor, example: Example) -> float:
    positions = torch.tensor([p for answer in example.answers for p in answer])
    rows = logarithms[positions - 1]
    return -float(rows.gather(1, example.tokens[positions][:, None]).mean())
