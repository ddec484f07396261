"""What the commands `inspect` and `verify` look at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewriter.errors import PlanError, RewriterError
from rewriter.graph import Graph, layer_of, path_of
from rewriter.plan import Plan, select
from rewriter.protocol import NearMiss, Pass, Site, passes

if TYPE_CHECKING:
    from rich.console import RenderableType


def by_pass(graph: Graph) -> list[dict[str, Any]]:
    """What every known pass finds in the graph, whatever its options."""
    found = []
    for name, known in passes().items():
        # Most sites do not depend on options; some options have no default to build it with.
        instance = known(known.Config.model_construct())
        needed = [key for key, f in known.Config.model_fields.items() if f.is_required()]
        try:
            found.append(_entry(name, known, list(instance.sites(graph))))
        except AttributeError:
            if not needed:
                raise
            problem = f"sites depend on {', '.join(needed)}: give a plan that sets them"
            found.append(_entry(name, known, []) | {"problem": problem})
    return found


def by_plan(graph: Graph, plan: Plan) -> list[dict[str, Any]]:
    """What every step of a plan would touch.

    Sites are looked for in the original graph. A step after the first may name what an earlier
    one makes; when it finds nothing here, that is its "problem" and not yet an error.
    Raises PlanError when the first step has no site.
    """
    layers, found = total_layers(graph), []
    for index, step in enumerate(plan.steps):
        instance = step.build()
        try:
            sites, misses = select(instance.sites(graph), instance.config, layers, step.name)
        except PlanError as error:
            if index == 0:
                raise
            found.append(_entry(step.name, type(instance), []) | {"problem": str(error)})
            continue
        found.append(_entry(step.name, type(instance), [*sites, *misses]))
    return found


def total_layers(graph: Graph) -> int:
    """Number of layers: the configuration's, or one more than the highest in a module path."""
    config = graph.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    counted = getattr(text, "num_hidden_layers", None)
    if counted:
        return int(counted)
    return 1 + max((layer_of(path_of(n)) or 0 for n in graph.module.graph.nodes), default=-1)


def table(model: str, found: list[dict[str, Any]]) -> RenderableType:
    """The findings for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [Text(model, "bold")]
    for entry in found:
        head = f"{entry['pass']} ({entry['contract']}): {len(entry['sites'])} sites"
        rows = Table(box=None, show_header=False, pad_edge=True)
        for site in entry["sites"]:
            rows.add_row(Text(site["site"]), Text(site["about"], "dim"))
        for miss in entry["near_misses"]:
            rows.add_row(Text(miss["site"], "yellow"), Text(f"no: {miss['reason']}", "yellow"))
        parts += [Text(head, "cyan"), rows]
        if "problem" in entry:
            parts.append(Text(entry["problem"], "yellow"))
    return Group(*parts)


def check_files(folder: Path) -> list[str]:
    """Compare a folder with the SHA-256 hashes in its lock; returns the names checked.

    The lock holds "files" (relative path: hash of the bytes), "tensors" (name in
    model.safetensors: hash of the values), or both.
    Raises RewriterError naming whatever is missing or differs.
    """
    try:
        lock = json.loads((folder / "lock.json").read_text(encoding="utf-8"))
        files, tensors = dict(lock.get("files") or {}), dict(lock.get("tensors") or {})
    except (ValueError, AttributeError, TypeError):
        files, tensors = {}, {}
    if not files and not tensors:
        raise RewriterError(
            f"lock.json of '{folder}' is damaged: it holds no hashes", "apply the plan again"
        )
    wrong = [*_wrong_files(folder, files), *(_wrong_tensors(folder, tensors) if tensors else [])]
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise RewriterError(
            f"'{folder}' is not what its lock says: {'; '.join(wrong[:8])}{more}",
            "apply the plan again",
        )
    return sorted({*files, *(["model.safetensors"] if tensors else [])})


def _wrong_files(folder: Path, files: dict[str, str]) -> Iterator[str]:
    for name, expected in files.items():
        path = folder / name
        # A name that leads outside is not one that `apply` wrote.
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            yield f"{name} is missing"
        elif sha256(path) != str(expected).removeprefix("sha256:"):
            yield f"{name} has changed"


def _wrong_tensors(folder: Path, tensors: dict[str, str]) -> Iterator[str]:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            names = set(file.keys())
            yield from (f"{name} is not in the lock" for name in sorted(names - set(tensors)))
            for name, expected in tensors.items():
                if name not in names:
                    yield f"{name} is missing"
                    continue
                data = file.get_tensor(name).reshape(-1).view(torch.uint8).numpy()
                if hashlib.sha256(data.tobytes()).hexdigest() != expected:
                    yield f"{name} has changed"
    except (SafetensorError, FileNotFoundError) as error:
        yield f"model.safetensors cannot be read: {error}"


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder by relative path, lock.json left out."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: sha256(path) for name, path in names.items() if name != "lock.json"}


def check_forward(folder: Path) -> dict[str, Any] | None:
    """Load the model and run it on eight tokens; None for a model that takes no tokens.

    Raises RewriterError when it does not load or computes values that are not finite.
    """
    import torch

    from rewriter import load

    model = load(folder)
    if "input_ids" not in model.graph.inputs:
        return None
    text = model.config.get_text_config()
    tokens = torch.arange(8)[None] % int(getattr(text, "vocab_size", None) or 8)
    with torch.no_grad():
        output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    first = output[0]
    if not bool(torch.isfinite(first).all()):
        raise RewriterError(f"'{folder}' computes values that are not finite")
    return {"shape": list(first.shape), "largest": float(first.abs().max())}


def sha256(path: Path) -> str:
    """Hash of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entry(name: str, known: type[Pass], places: list[Site | NearMiss]) -> dict[str, Any]:
    return {
        "pass": name,
        "contract": str(known.contract),
        "sites": [
            {"site": p.name, "layer": p.layer, "about": p.about}
            for p in places
            if isinstance(p, Site)
        ],
        "near_misses": [
            {"site": p.name, "layer": p.layer, "reason": p.reason}
            for p in places
            if isinstance(p, NearMiss)
        ],
    }
