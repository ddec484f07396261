"""Check a model's Triton form, compile what it launches, write it; and read it back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

import rewriter.model
from rewriter.backends.triton import compile as aot
from rewriter.backends.triton import forms, launches, tune
from rewriter.backends.triton.model import TritonModel
from rewriter.backends.triton.prompt import Prompts
from rewriter.calibration import copy_module
from rewriter.errors import GateError, RewriterError
from rewriter.folders import whole_folder
from rewriter.graph import Graph
from rewriter.state import make_state

#: Of max|reference|, in float32; for low precision, relative RMSE.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
PREFILL, STEPS = 17, 3


def to_triton(model: Any, check: bool = True, tolerance: float | None = None) -> TritonModel:
    """`model` with every op of the dialect on its Triton kernel; weights are shared.

    Args:
        model: a RewrittenModel.
        check: compare with the torch graph on a short prompt, prefill and decode: in the
            interpreter on a CPU, with the real kernels on a GPU.
        tolerance: largest allowed difference, see `TOLERANCE`.

    Raises:
        RewriterError: an op has no Triton form.
        GateError: the kernels do not compute what the graph does.
    """
    made, _ = _converted(model, check, tolerance)
    return made


def export_triton(
    model: Any,
    folder: str | Path,
    *,
    target: str | Iterable[str] = "sm_90",
    prefill: Iterable[int] = (1024, 1000),
    batch: int = 1,
    check: bool = True,
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Write `model` and the kernels that it launches, compiled for the targets.

    The folder is that of `save_pretrained`, and kernels/<target>/ (a binary and Triton's metadata
    for each kernel, index.json), configurations.json, triton.json (this function's result).

    Args:
        model: a RewrittenModel, in the dtype in which it will run.
        folder: must not hold anything yet; it appears whole or not at all.
        target: one or more of `compile.TARGETS`.
        prefill: lengths of the prompts to compile for. Triton compiles anew where a size is 1,
            a multiple of 16, or neither; so give one of each kind.
        batch: of the prompts.
        check, tolerance: as for `to_triton`.

    Returns: {targets, kernels: {target: number}, max_error, ops: {op: number}, tuned}.

    Raises:
        RewriterError: an op has no Triton form, an unknown target, a kernel that does not fit.
        GateError: the kernels do not compute what the graph does; nothing is written.
    """
    targets = [target] if isinstance(target, str) else list(target)
    for name in targets:
        aot.target_named(name)
    made, errors = _converted(model, check, tolerance)
    with whole_folder(folder) as aside:
        made._write(aside)
        found = {name: record(made.graph, name, prefill, batch) for name in targets}
        kernels = {
            name: len(launches.build(some, name, aside / "kernels" / name, aot.CACHE))
            for name, some in found.items()
        }
        configurations = tune.describe(dict.fromkeys(n for some in found.values() for n in some))
        (aside / tune.FILE).write_text(json.dumps(configurations, indent=1) + "\n")
        ops: dict[str, int] = {}
        for node in forms.dialect(made.graph.module):
            name = str(node.target).removesuffix(".default")
            ops[name] = ops.get(name, 0) + 1
        report = {
            "triton": triton.__version__,
            "targets": targets,
            "kernels": kernels,
            "ops": ops,
            "errors": errors,
            "max_error": max(errors.values(), default=None),
            "dtype": str(made.dtype).removeprefix("torch."),
            "prefill": list(prefill),
            "batch": batch,
            "tuned": any(c["tuned"] for c in configurations["launches"]),
        }
        (aside / "triton.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def load(folder: str | Path, device: str | None = None) -> TritonModel:
    """A model that `export_triton` wrote. On a GPU that it was compiled for, with the same
    version of Triton, no kernel of an exported shape is compiled again.

    `model.stored` says which kernels are used: {target, kernels, why}.
    """
    folder = Path(folder)
    if not (folder / "triton.json").is_file():
        raise RewriterError(
            f"{folder} has no triton.json", "write it with rewriter.export(..., to='triton')"
        )
    plain = rewriter.model.load(folder, device=device)
    made, _ = _converted(plain, check=False, tolerance=None)
    target = launches.current_target()
    made.stored = {"target": target, "kernels": 0, "why": "there is no GPU"}
    if target is not None:
        kernels = folder / "kernels" / target
        made.stored["why"] = f"not compiled for {target}"
        if kernels.is_dir():
            made.stored = launches.install(kernels)
        tune.use(json.loads((folder / tune.FILE).read_text()))
    return made


def _converted(
    model: Any, check: bool, tolerance: float | None
) -> tuple[TritonModel, dict[str, float]]:
    graph = forms.pack_low_rank(model.graph)
    forms.require_forms(graph.module)
    made = TritonModel(model.config, graph)
    made.train(model.training)
    for name in ("plan", "report", "lock", "companions", "generation_config"):
        if hasattr(model, name):
            setattr(made, name, getattr(model, name))
    errors: dict[str, float] = {}
    if check:
        errors = compare(model.graph, made)
        bound = TOLERANCE.get(model.dtype, 1e-5) if tolerance is None else tolerance
        worst = max(errors.values())
        if not worst <= bound:  # also catches NaN
            raise GateError(
                f"the Triton kernels differ from the graph by {worst:.1e} (bound {bound:g}): "
                + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()),
                "report this model",
            )
    return made, errors


def compare(graph: Graph, made: TritonModel) -> dict[str, float]:
    """Largest error of the first output over real tokens, by phase; see `TOLERANCE`.

    Two rows, the first padded on the left (on the right for a graph without states).
    """
    device, run, prompts = made.device, made.body.run, Prompts(graph)
    reference = copy_module(graph.module)
    reference.train(False)
    total = PREFILL + (STEPS if graph.states else 0)
    mask = torch.ones(2, total, dtype=torch.long)
    mask[0, slice(0, 5) if graph.states else slice(12, None)] = 0
    ours, theirs = ([make_state(s) for s in graph.states] for _ in range(2))
    errors: dict[str, float] = {}
    seen = 0
    with torch.no_grad():
        for new in [PREFILL] + [1] * (total - PREFILL):
            seen += new
            values = [v.to(device) for v in prompts(mask[:, :seen], new)]
            want, got = (_first(f(*values, *s)) for f, s in ((reference, theirs), (run, ours)))
            if want.dim() >= 2 and want.shape[:2] == (2, new):
                real = mask[:, seen - new : seen].bool().to(device)
                want, got = want[real], got[real]
            phase = "decode" if errors else "prefill" if graph.states else "forward"
            errors[phase] = max(errors.get(phase, 0.0), _error(got, want))
    return errors


def _first(outputs: Any) -> Tensor:
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def _error(got: Tensor, want: Tensor) -> float:
    difference = got.double() - want.double()
    if want.dtype in (torch.float32, torch.float64):
        return float(difference.abs().max() / want.double().abs().max())
    return float(difference.square().mean().sqrt() / want.double().square().mean().sqrt())


def record(graph: Graph, target: str, prefill: Iterable[int], batch: int) -> list[launches.Launch]:
    """What `target` launches for prompts of these lengths and for a token after each, without one.

    Kernels are not run: values are zeros, shapes are right.
    """
    prompts = Prompts(graph)
    device = next(iter(graph.parameters()))[1].device
    body = forms.Interpreted(graph.module)
    with launches.recording(target) as found, torch.no_grad():
        for length in prefill:
            states = [make_state(s) for s in graph.states]
            mask = torch.ones(batch, length + 1, dtype=torch.long)
            for seen, new in ((length, length), (length + 1, 1))[: 2 if graph.states else 1]:
                values = (v.to(device) for v in prompts(mask[:, :seen], new))
                body.run(*values, *states)
    return list(found)
