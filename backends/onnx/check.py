"""Run an exported file in ONNX Runtime against the torch graph, prefill and decode."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from rewriter.errors import RewriterError
from rewriter.graph import Graph
from rewriter.state import Recurrent, make_state

PREFILL, DECODE = 32, 32


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
    """Makes inputs for a graph: ids, mask and positions by name, states from a dry run."""

    def __init__(self, graph: Graph, module: GraphModule) -> None:
        self.graph = graph
        holders = [n for n in module.graph.nodes if n.op == "placeholder"]
        self.inputs = [n for n in holders if not str(n.target).startswith("state_")]
        config = graph.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.vocabulary = int(getattr(text, "vocab_size", 0) or 32)
        self.random = torch.Generator().manual_seed(0)
        # State tensors [B, …] as one token leaves them: names, shapes and types.
        self.states: dict[str, Tensor] = {}
        self.shapes: dict[str, torch.Size] = {}  # of every node in that run, by name
        if graph.states:
            mixers = [make_state(s) for s in graph.states]
            tracer = _Shapes(module, self.shapes)
            tracer.run(*self.tokens(torch.ones(3, 4, dtype=torch.long), 4).values(), *mixers)
            for i, mixer in enumerate(mixers):
                for name, value in mixer.tensors().items():
                    if isinstance(mixer, Recurrent):
                        self.states[f"{name}_state_{i}"] = value
                    elif name in ("key", "value"):
                        self.states[f"past_{name}_{i}"] = value[:, :, :0]

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

    def start(self, names: list[str], batch: int) -> dict[str, Tensor]:
        """States of a sequence that has not begun: zeros, and caches of no columns."""
        return {
            n: self.states[n].new_zeros((batch, *self.states[n].shape[1:]))
            for n in names
            if n in self.states
        }

    def example(self, names: list[str]) -> tuple[Tensor, ...]:
        """Arguments to trace with: batch 3, five columns of past, four new tokens."""
        past = 5 if any(n.startswith("past_") for n in names) else 0
        made = self.tokens(torch.ones(3, past + 4, dtype=torch.long), 4)
        for name, value in self.start(names, 3).items():
            made[name] = (
                value.new_zeros((*value.shape[:2], past, value.shape[3]))
                if name.startswith("past_")
                else value
            )
        # A strided example would make its stride a symbol, which ONNX has no word for.
        return tuple(made[n].contiguous() for n in names)

    def dynamic(self, name: str) -> tuple[int, ...]:
        """Dimensions of an input that vary."""
        if name in self.states:
            return (0, 2) if name.startswith("past_") else (0,)
        node = next(n for n in self.inputs if n.target == name)
        value = node.meta.get("val")
        if value is None:
            return (0, 1)
        return tuple(i for i, s in enumerate(value.shape) if isinstance(s, torch.SymInt))


class _Shapes(torch.fx.Interpreter):
    """Records shapes: a graph that was read from a file carries none."""

    def __init__(self, module: GraphModule, shapes: dict[str, torch.Size]) -> None:
        super().__init__(module)
        self.shapes = shapes

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = value.shape
        return value


class Runner:
    """One sequence in ONNX Runtime: feeds each call's states to the next."""

    def __init__(
        self, session: Any, names: dict[str, list[str]], states: dict[str, Tensor]
    ) -> None:
        self.session, self.names = session, names
        self.states = {k: v.numpy() for k, v in states.items()}

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """First output for these inputs."""
        feed = {k: v.numpy() for k, v in inputs.items() if k in self.names["inputs"]} | self.states
        out = dict(zip(self.names["outputs"], self.session.run(None, feed), strict=True))
        for name in self.states:
            self.states[name] = out[
                "present_" + (name.removeprefix("past_") if name.startswith("past_") else name)
            ]
        return torch.from_numpy(next(iter(out.values())))


def open_session(file: Path) -> Any:
    """A CPU session that prints errors only."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def compare(
    graph: Graph,
    module: GraphModule,
    file: Path,
    names: dict[str, list[str]],
    batched_chunks: bool,
) -> dict[str, float]:
    """max|Δ| / max|reference| of the first output over real tokens, in each phase.

    Batch and lengths differ from those traced. Phases: `prefill` (2 rows, the first padded on
    the left), `decode` (one token at a time), `chunked` (a second stretch of tokens after a
    past; batch 1 unless `batched_chunks`); for a graph without states, `forward` with padding
    on the right.
    """
    feeder, session = Feeder(graph, module), open_session(file)
    if not graph.states:
        mask = torch.ones(2, 19, dtype=torch.long)
        mask[0, 12:] = 0
        return {"forward": _run(feeder, session, module, names, [], mask, [19])[0]}
    mask = torch.ones(2, PREFILL + DECODE, dtype=torch.long)
    mask[0, :5] = 0
    steps = _run(feeder, session, module, names, graph.states, mask, [PREFILL] + [1] * DECODE)
    chunked = mask if batched_chunks else mask[:1]
    rest = _run(feeder, session, module, names, graph.states, chunked, [11, 14, 7])
    return {"prefill": steps[0], "decode": max(steps[1:]), "chunked": max(rest)}


def _run(
    feeder: Feeder,
    session: Any,
    module: GraphModule,
    names: dict[str, list[str]],
    states: list[dict[str, Any]],
    mask: Tensor,
    lengths: list[int],
) -> list[float]:
    """Error of each call when a sequence is fed in stretches of `lengths` tokens."""
    mixers = [make_state(s) for s in states]
    runner = Runner(session, names, feeder.start(names["inputs"], mask.shape[0]))
    errors, seen = [], 0
    for new in lengths:
        seen += new
        inputs = feeder.tokens(mask[:, :seen], new)
        want = module(*inputs.values(), *mixers)
        want = next(iter(want.values())) if isinstance(want, dict) else want
        want = want[0] if isinstance(want, (tuple, list)) else want
        got = runner(inputs)
        if want.dim() >= 2 and want.shape[:2] == (mask.shape[0], new):
            real = mask[:, seen - new : seen].bool()
            want, got = want[real], got[real]
        difference = (got.double() - want.double()).abs().max()
        errors.append(float(difference / want.double().abs().max()))
    return [e if e == e else float("inf") for e in errors]
