"""Real activations of the original model: what passes calibrate on and the gate compares with."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from tqdm import tqdm

from rewriter.errors import RewriterError
from rewriter.graph import Graph
from rewriter.linear_algebra import gram
from rewriter.protocol import Calibration

SAMPLE = Path(__file__).parent / "data" / "sample.txt"


def copy_module(module: GraphModule) -> GraphModule:
    """The same graph with its own nodes and folders; tensors are shared, names kept."""
    graph = FxGraph()
    mapping: dict[Node, Node] = {}
    output = graph.graph_copy(module.graph, mapping)
    graph.output(output)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    return GraphModule(module, graph)


def walk(module: GraphModule, inputs: list[Any]) -> Iterator[tuple[Node, Any, dict[Node, Any]]]:
    """Run a graph node by node, forgetting values after their last use.

    Yields (node, value, environment); the caller may replace `environment[node]`.
    """
    nodes = list(module.graph.nodes)
    last: dict[Node, Node] = {}
    for node in nodes:
        for used in node.all_input_nodes:
            last[used] = node
    dead: dict[Node, list[Node]] = {}
    for used, node in last.items():
        dead.setdefault(node, []).append(used)
    environment: dict[Node, Any] = {}
    given = iter(inputs)
    for node in nodes:
        if node.op == "placeholder":
            value = next(given, None)
        elif node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            value = getattr(module.get_submodule(owner), leaf)
        elif node.op == "output":
            yield node, map_arg(node.args[0], environment.__getitem__), environment
            return
        else:
            args = map_arg(node.args, environment.__getitem__)
            kwargs = map_arg(node.kwargs, environment.__getitem__)
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        environment[node] = value
        yield node, value, environment
        for used in dead.get(node, ()):
            environment.pop(used, None)


def spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly over the list."""
    if len(items) <= count:
        return items
    return [items[i * len(items) // count] for i in range(count)]


@dataclass
class _Waiting:
    """A sequence on its way through the graph, stopped where its last wanted value was made."""

    steps: Iterator[tuple[Node, Any, dict[Node, Any]]]
    uses: Counter[str]  # by name of a node: how often its value will still be taken
    kept: dict[str, Any] = field(default_factory=dict)

    def take(self, name: str) -> Any:
        with torch.no_grad():
            while name not in self.kept:
                node, value, _ = next(self.steps)
                if self.uses[node.name]:
                    self.kept[node.name] = value
        self.uses[name] -= 1
        return self.kept[name] if self.uses[name] else self.kept.pop(name)


class Activations(Calibration):
    """Runs the original graph (or, for nodes a pass has made, the graph as it now is)."""

    def __init__(
        self,
        reference: GraphModule,
        graph: Graph,
        batches: list[list[Tensor]],
        gradient_tokens: int = 4096,
    ) -> None:
        self.reference, self.graph, self.batches = reference, graph, batches
        self.gradient_tokens = gradient_tokens
        self.quiet = False

    def _module(self, nodes: list[Node]) -> tuple[GraphModule, dict[str, Node]]:
        original = {n.name: n for n in self.reference.graph.nodes}
        if all(n.name in original and original[n.name].target == n.target for n in nodes):
            return self.reference, {n.name: n for n in nodes}
        return self.graph.module, {n.name: n for n in nodes}

    def _each(self, nodes: list[Node], label: str, visit: Callable[[Node, Tensor], None]) -> None:
        for one in self._values(nodes, label):
            for node, value in one:
                visit(node, value)

    def _values(self, nodes: list[Node], label: str) -> Iterator[Iterator[tuple[Node, Tensor]]]:
        """For every batch, the values of the nodes in order; nothing after the last is run."""
        module, wanted = self._module(nodes)
        for batch in tqdm(self.batches, desc=label, leave=False, disable=None):
            with torch.no_grad():
                found = ((n, v) for n, v, _ in walk(module, batch) if n.name in wanted)
                yield ((wanted[n.name], v) for n, v in itertools.islice(found, len(wanted)))

    def inputs(self, nodes: list[Node]) -> dict[Node, Tensor]:
        rows: dict[Node, list[Tensor]] = {n: [] for n in nodes}
        self._each(nodes, "activations", lambda n, v: rows[n].append(v.flatten(0, 1)))
        return {n: torch.cat(v) for n, v in rows.items()}

    def sequences(self, groups: list[list[Node]]) -> Iterator[list[dict[Node, Tensor]]]:
        wanted = [n for group in groups for n in group]
        module, uses = self._module(wanted)[0], Counter(n.name for n in wanted)
        waiting = [_Waiting(walk(module, batch), Counter(uses)) for batch in self.batches]
        total = len(groups) * len(waiting)
        with tqdm(total=total, desc="activations", leave=False, disable=None) as bar:
            for group in groups:
                values = []
                for one in waiting:
                    values.append({n: one.take(n.name) for n in group})
                    bar.update()
                yield values

    def grams(self, nodes: list[Node]) -> dict[Node, Tensor]:
        total: dict[Node, Tensor] = {}
        self._each(nodes, "Gram matrices", lambda n, v: _add_gram(total, n, v))
        return total

    def output_grams(self, nodes: list[Node]) -> dict[Node, Tensor]:
        """Fisher information of the outputs: labels are sampled from the model itself."""
        module, wanted = self._module(nodes)
        generator = torch.Generator().manual_seed(0)
        total: dict[Node, Tensor] = {}
        count = max(1, self.gradient_tokens // self.batches[0][0].shape[1])
        for batch in tqdm(spread(self.batches, count), desc="Fisher", leave=False, disable=None):
            kept: dict[Node, Tensor] = {}
            with torch.enable_grad():
                logits = None
                for node, value, environment in walk(module, batch):
                    if node.name in wanted:
                        if not value.requires_grad:
                            value = value.detach().requires_grad_(True)
                            environment[node] = value
                        kept[wanted[node.name]] = value
                    if node.op == "output":
                        logits = value[0]
                if logits is None or logits.dim() != 3:
                    raise RewriterError("the Fisher weighting needs a model with token logits")
                flat = logits.flatten(0, 1).float()
                with torch.no_grad():
                    probabilities = flat.softmax(-1)
                    labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
                loss = torch.nn.functional.cross_entropy(flat, labels, reduction="sum")
                gradients = torch.autograd.grad(loss, list(kept.values()), allow_unused=True)
            for node, gradient in zip(kept, gradients, strict=True):
                if gradient is not None:
                    _add_gram(total, node, gradient)
        return total


def _add_gram(total: dict[Node, Tensor], node: Node, value: Tensor) -> None:
    made = gram(value.reshape(-1, value.shape[-1]))
    total[node] = total[node].add_(made) if node in total else made


# ---- text ---------------------------------------------------------------------------------


def read_text(data: Any) -> tuple[list[list[str]], str]:
    """Sources, each a list of documents, and a word on them.

    data: None, a path, a Hub data set, several of these (a source each), or texts.
    """
    if data is None:
        return [[SAMPLE.read_text()]], "the public-domain sample that ships with rewriter"
    if isinstance(data, (str, Path)):
        return [_source(data)], str(data)
    if all(isinstance(d, Path) or _is_name(d) for d in data):
        return [_source(d) for d in data], ", ".join(str(d) for d in data)
    return [[str(d)] for d in data], "texts given by the caller"


def _is_name(text: str) -> bool:
    """A path or the name of a data set, not a text."""
    return len(text) < 256 and (Path(text).expanduser().exists() or _is_hub_id(text))


def _is_hub_id(text: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text) is not None


def _source(name: str | Path) -> list[str]:
    path = Path(name).expanduser()
    if path.is_file():
        return [_read(path)]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*.txt"))
        if not files:
            raise RewriterError(f"{path} holds no .txt files", "give a folder of text files")
        return [_read(p) for p in files]
    if _is_hub_id(str(name)):
        return _hub(str(name))
    raise RewriterError(f"there is no file or folder {name}", "give `data:` an existing path")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RewriterError(f"cannot read {path}: {error}", "give UTF-8 text") from None


def _hub(name: str) -> list[str]:
    try:
        from datasets import load_dataset

        rows = load_dataset(name, split="train", streaming=True)
        return [row["text"] for row, _ in zip(rows, range(1000), strict=False)]
    except Exception as error:
        raise RewriterError(f"cannot read the data set {name}: {error}", "give a path") from None


def token_batches(
    graph: Graph, tokenizer: Any, data: Any, sequences: int, length: int, seed: int
) -> tuple[list[list[Tensor]], dict[str, Any]]:
    """Unpadded batches [1, length] as graph inputs, and the report's `data` entry."""
    vocabulary = int(getattr(graph.config.get_text_config(), "vocab_size", 0))
    if isinstance(data, Tensor):
        rows, source, note = list(data), "tokens given by the caller", ""
    elif tokenizer is None:
        if data is not None:
            raise RewriterError(
                "there is text but no tokenizer", "give token ids, or a model with its tokenizer"
            )
        generator = torch.Generator().manual_seed(seed)
        rows = list(torch.randint(3, vocabulary, (sequences, length), generator=generator))
        source, note = "random tokens", "no tokenizer and no data: figures mean little"
    else:
        sources, source = read_text(data)
        note = "" if data is not None else "no data was given"
        parts = [_windows(tokenizer, s, -(-sequences // len(sources)), length) for s in sources]
        turns = itertools.chain.from_iterable(itertools.zip_longest(*parts))
        rows = [row for row in turns if row is not None and len(row) > 1][:sequences]
    if not rows:
        raise RewriterError(f"{source} is too short: not one sequence", "give more text")
    batches = [graph_inputs(graph, r[None]) for r in rows]
    tokens = sum(len(r) for r in rows)
    return batches, {"source": source, "tokens": tokens, "note": note}


def _windows(tokenizer: Any, documents: list[str], count: int, length: int) -> list[Tensor]:
    """`count` windows spread evenly over the documents, put one after another.

    Spread: openings of famous books are memorised. Only the text around a window is tokenised.
    """
    text = "\n\n".join(documents)
    room = length * 12  # characters that surely hold the tokens of a window
    if len(text) <= room * count:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
        count = max(1, min(count, len(ids) // length))
        starts = torch.linspace(0, max(0, len(ids) - length), count).long().tolist()
        return [ids[s : s + length] for s in starts]
    rows = []
    for start in torch.linspace(0, len(text) - room, count).long().tolist():
        piece = text[start : start + room]
        piece = piece[piece.find(" ") + 1 :]  # from a whole word on
        ids = torch.tensor(tokenizer(piece, verbose=False)["input_ids"], dtype=torch.long)
        rows.append(ids[:length])
    return rows


def text_inputs(ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """What a text model may take, by name, for tokens [B, L] and a padding mask [B, L]."""
    mask = torch.ones_like(ids) if mask is None else mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
        "token_type_ids": torch.zeros_like(ids),
    }


def graph_inputs(graph: Graph, ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """Inputs of the graph for tokens [B, L] and a padding mask [B, L]."""
    known = text_inputs(ids, mask)
    return [known[name] for name in graph.inputs]
