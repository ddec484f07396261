"""Run an exported file in ONNX Runtime against the torch graph, prefill and decode."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from rewriter.errors import GateError, RewriterError
from rewriter.graph import Graph, argument
from rewriter.state import make_state

if TYPE_CHECKING:
    from rewriter.backends.onnx.registry import StateTensor

PREFILL, DECODE = 32, 64
#: A window longer than this is not filled by the check.
LONGEST_WINDOW = 512


def require() -> None:
    """Raise a RewriterError that names the extra if a package is missing."""
    missing = [
        name
        for name in ("onnx", "onnxruntime", "onnxscript")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise RewriterError(f"ONNX export needs {', '.join(missing)}", "pip install rewriter[onnx]")


class Feeder:
    """Makes inputs for a graph: ids, mask and positions by name; knows all shapes from a dry run.

    values: every tensor of the dry run (batch 3, 4 tokens) by node name, on the meta device.
    """

    def __init__(self, graph: Graph, module: GraphModule) -> None:
        self.graph = graph
        holders = [n for n in module.graph.nodes if n.op == "placeholder"]
        self.inputs = [n for n in holders if not str(n.target).startswith("state_")]
        config = graph.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.vocabulary = int(getattr(text, "vocab_size", 0) or 32)
        self.random = torch.Generator().manual_seed(0)
        self.values: dict[str, Any] = {}
        mixers = [make_state(s) for s in graph.states]
        tokens = self.tokens(torch.ones(3, 4, dtype=torch.long), 4)
        _Shapes(module, self.values).run(*tokens.values(), *mixers)

    def tokens(self, mask: Tensor, new: int) -> dict[str, Tensor]:
        """The graph's own inputs for the last `new` of the columns of `mask` [B, T]."""
        made: dict[str, Tensor] = {}
        batch = mask.shape[0]
        for node in self.inputs:
            name = str(node.target)
            if name == "attention_mask":
                made[name] = mask
            elif name == "position_ids":
                made[name] = (mask.cumsum(-1) - 1).clamp_min(0)[:, -new:]
            elif name in ("input_ids", "decoder_input_ids"):
                made[name] = torch.randint(0, self.vocabulary, (batch, new), generator=self.random)
            else:
                made[name] = self._other(node, batch, new)
        return made

    def _other(self, node: Node, batch: int, new: int) -> Tensor:
        value = node.meta.get("val")
        if value is None and node.target == "token_type_ids":
            return torch.zeros(batch, new, dtype=torch.long)
        if value is None:  # the graph was read from a folder, which keeps no shapes
            raise RewriterError(
                f"the shape of the graph's input '{node.target}' is not known",
                "export the model that rewrite() returned, in the same process",
            )
        symbols = list(dict.fromkeys(str(s) for s in value.shape if isinstance(s, torch.SymInt)))
        sizes = {s: (batch if i == 0 else new) for i, s in enumerate(symbols)}
        shape = [sizes.get(str(s), s) if isinstance(s, torch.SymInt) else s for s in value.shape]
        if value.dtype.is_floating_point:
            return torch.randn(*shape, generator=self.random).to(value.dtype)
        return torch.zeros(*shape, dtype=value.dtype)

    def example(self, names: list[str], states: dict[str, StateTensor]) -> tuple[Tensor, ...]:
        """Arguments to trace with: batch 3, five columns of past, four new tokens."""
        past = 5 if states else 0  # two sizes that are equal here would be taken for one
        made = self.tokens(torch.ones(3, past + 4, dtype=torch.long), 4)
        for name, state in states.items():
            value = state.start(3)
            if state.grows is not None:
                sizes = list(value.shape)
                sizes[state.grows] = past
                value = value.new_zeros(sizes)
            made[name] = value
        # A strided example would make its stride a symbol, which ONNX has no word for.
        return tuple(made[n].contiguous() for n in names)

    def dynamic(self, name: str, states: dict[str, StateTensor]) -> tuple[int, ...]:
        """Dimensions of an input that vary."""
        if name in states:
            grows = states[name].grows
            return (0,) if grows is None else (0, grows)
        node = next(n for n in self.inputs if n.target == name)
        value = node.meta.get("val")
        if value is None:
            return (0, 1)
        return tuple(i for i, s in enumerate(value.shape) if isinstance(s, torch.SymInt))


class _Shapes(torch.fx.Interpreter):
    """Records shapes and types: a graph that was read from a file carries none."""

    def __init__(self, module: GraphModule, values: dict[str, Any]) -> None:
        super().__init__(module)
        self.values = values

    def run_node(self, n: Node) -> Any:
        made = super().run_node(n)
        if isinstance(made, Tensor):
            self.values[n.name] = torch.empty_like(made, device="meta")
        return made


@dataclass
class Sequence:
    """One sequence of calls and what the graph answers.

    phases: of each call. real: [B, new] of each call. wants: first outputs. by_call: the graph's
    answers call by call, where `wants` are those of one call over the whole sequence.
    """

    phases: list[str]
    inputs: list[dict[str, Tensor]]
    real: list[Tensor]
    wants: list[Tensor] = field(default_factory=list)
    by_call: Callable[[], list[Tensor]] | None = None


def sequences(
    graph: Graph, module: GraphModule, feeder: Feeder, batched_chunks: bool
) -> list[Sequence]:
    """Calls at other batches and lengths than those traced, answered by the torch graph.

    `prefill` and `decode` (2 rows, the first padded on the left; one token at a time) and
    `chunked` (stretches of tokens after a past, long enough to fill a window and to be cut into
    blocks; batch 1 unless `batched_chunks`); without states `forward`, padded on the right.
    The graph of a text model answers a sequence in one call, which costs a tenth of 65 calls.
    """
    if not graph.states:
        mask = torch.ones(2, 19, dtype=torch.long)
        mask[0, 12:] = 0
        return [_sequence(graph, module, feeder, mask, [("forward", 19)])]
    windows = [s["window"] for s in graph.states if s["kind"] == "ring"]
    windows += [  # its far tokens lie before two blocks
        2 * argument(n, "window")
        for n in module.graph.nodes
        if str(n.target) == "rewriter.hybrid_attention.default"
    ]
    long = min(max(windows), LONGEST_WINDOW) + 137 if windows else 14
    steps = [("prefill", PREFILL)] + [("decode", 1)] * DECODE
    chunks = [("chunked", n) for n in (11, long, 7, 1, 1)]
    made = []
    for calls, rows in ((steps, 2), (chunks, 2 if batched_chunks else 1)):
        mask = torch.ones(rows, sum(n for _, n in calls), dtype=torch.long)
        mask[0, :5] = 0
        if calls is chunks and not batched_chunks:
            mask[0] = 1
        made.append(_sequence(graph, module, feeder, mask, calls))
    return made


def _sequence(
    graph: Graph,
    module: GraphModule,
    feeder: Feeder,
    mask: Tensor,
    calls: list[tuple[str, int]],
) -> Sequence:
    made, seen = Sequence([], [], []), 0
    for phase, new in calls:
        seen += new
        made.phases.append(phase)
        made.inputs.append(feeder.tokens(mask[:, :seen], new))
        made.real.append(mask[:, seen - new : seen].bool())

    def answers(inputs: list[dict[str, Tensor]]) -> list[Tensor]:
        mixers = [make_state(s) for s in graph.states]
        return [_first(module(*given.values(), *mixers)) for given in inputs]

    if set(made.inputs[0]) <= {"input_ids", "attention_mask", "position_ids"}:
        whole = {n: torch.cat([i[n] for i in made.inputs], 1) for n in made.inputs[0]}
        if "attention_mask" in whole:
            whole["attention_mask"] = mask
        logits = answers([whole])[0]
        if logits.shape[:2] == mask.shape:
            made.wants = list(logits.split([new for _, new in calls], 1))
            made.by_call = partial(answers, made.inputs)
            return made
    made.wants = answers(made.inputs)
    return made


def _first(output: Any) -> Tensor:
    output = next(iter(output.values())) if isinstance(output, dict) else output
    return output[0] if isinstance(output, (tuple, list)) else output


def open_session(file: Path, optimised: bool = True) -> Any:
    """A CPU session that prints errors only."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def compare(
    runs: list[Sequence],
    file: Path,
    outputs: list[str],
    states: dict[str, StateTensor],
    tolerance: float,
) -> dict[str, float]:
    """max|Δ| / max|reference| of the first output over real tokens, the worst of each phase.

    With ONNX Runtime's optimisations, and without (`prefill, not optimised` and so on). A graph
    that answers otherwise call by call than in one call (a window without sinks amplifies
    rounding) is asked again where its answer in one call is further off than `tolerance`.
    """
    errors: dict[str, float] = {}
    for optimised in (True, False):
        found = []
        try:
            session = open_session(file, optimised)
            for run in runs:
                worst = errors_of(session.run, run, outputs, states)
                if run.by_call is not None and not max(worst) <= tolerance:
                    run.wants, run.by_call = run.by_call(), None
                    worst = errors_of(session.run, run, outputs, states)
                found.append(worst)
        except Exception as error:  # its exception types are not public
            raise GateError(f"ONNX Runtime does not run the file: {error}") from error
        for run, each in zip(runs, found, strict=True):
            for phase, value in zip(run.phases, each, strict=True):
                name = phase if optimised else f"{phase}, not optimised"
                errors[name] = max(errors.get(name, 0.0), value)
    return errors


def errors_of(
    call: Any, run: Sequence, outputs: list[str], states: dict[str, StateTensor]
) -> list[float]:
    """Error of each call; `call(None, feed)` runs the file and each call feeds the next."""
    held = {n: s.start(run.real[0].shape[0]).numpy() for n, s in states.items()}
    errors = []
    for inputs, real, want in zip(run.inputs, run.real, run.wants, strict=True):
        feed = {k: v.numpy() for k, v in inputs.items()} | held
        out = dict(zip(outputs, call(None, feed), strict=True))
        held = {n: out[s.output] for n, s in states.items()}
        got = torch.from_numpy(next(iter(out.values())))
        if want.dim() >= 2 and want.shape[:2] == real.shape:
            if got.shape[1] != real.shape[1]:  # the last token alone
                want, real = want[:, -1:], real[:, -1:]
            want, got = want[real], got[real]
        difference = float((got.double() - want.double()).abs().max() / want.double().abs().max())
        errors.append(difference if difference == difference else float("inf"))
    return errors
