"""Which of a pass's sites a step touches, and why the others are none."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from rewriter.errors import PlanError
from rewriter.protocol import NearMiss, PassConfig, Site


def select(
    sites: Iterable[Site | NearMiss], config: PassConfig, total_layers: int, name: str
) -> tuple[list[Site], list[NearMiss]]:
    """Apply `layers` and `targets` to what a pass found; both must hold where both are given.

    total_layers: layers of the model, for range checks. name: of the pass, for messages.
    Returns the sites to rewrite and the near misses among the places selected.
    Raises PlanError when a layer lies outside of the model and, unless the step says
    `missing: skip`, when a listed layer, a target or the whole selection has no site.
    """
    everything = list(sites)
    layers = _layers(config, total_layers, name)
    targets = config.targets

    def chosen(place: Site | NearMiss) -> bool:
        in_layers = layers is None or place.layer in layers
        return in_layers and (targets is None or any(_matches(t, place.name) for t in targets))

    found = [p for p in everything if isinstance(p, Site) and chosen(p)]
    misses = [p for p in everything if isinstance(p, NearMiss) and chosen(p)]
    if config.missing == "skip":
        return found, misses

    for target in targets or []:
        at = [p for p in everything if _matches(target, p.name)]
        if not any(isinstance(p, Site) for p in at):
            raise _nothing(f"target '{target}'", target, everything, at, name)
    if not found:
        what = " and ".join(
            ([f"layers {_spell(config)}"] if layers is not None else [])
            + ([f"targets {targets}"] if targets else [])
        )
        pattern = targets[0] if targets else None
        raise _nothing(what or "the model", pattern, everything, misses, name)
    if isinstance(config.layers, list):
        covered = {site.layer for site in found}
        for layer in config.layers:
            if layer not in covered:
                at = [miss for miss in misses if miss.layer == layer]
                raise _nothing(f"layer {layer}", None, everything, at, name)
    return found, misses


def _matches(target: str, path: str) -> bool:
    if target.startswith("re:"):
        return re.fullmatch(target[3:], path) is not None
    return target == path


def _layers(config: PassConfig, total: int, name: str) -> set[int] | None:
    """The layers that a step names, checked against the model; None for all."""
    if config.layers is None:
        return None
    if isinstance(config.layers, list):
        named = wanted = list(config.layers)
    else:
        first, every = config.layers.start, config.layers.every
        last = total - 1 if config.layers.to is None else config.layers.to
        named, wanted = [first, last], list(range(first, min(last, total) + 1, every))
    for layer in named:
        if not 0 <= layer < total:
            fix = f"use layers 0 to {total - 1}" if total else "leave 'layers' out"
            raise PlanError(f"{name}: layer {layer} does not exist, the model has {total}", fix)
    return set(wanted)


def _spell(config: PassConfig) -> str:
    layers = config.layers
    if layers is None or isinstance(layers, list):
        return str(layers)
    return f"{layers.start} to {'the last' if layers.to is None else layers.to} by {layers.every}"


def _nothing(
    what: str,
    pattern: str | None,
    everything: list[Site | NearMiss],
    near: Sequence[Site | NearMiss],
    name: str,
) -> PlanError:
    """The error for an empty selection: reasons of near misses, nearest path, way out."""
    cause = f"{name}: {what} has no site to rewrite"
    # Without a near miss in the selection itself, those elsewhere may still tell why.
    misses = [p for p in near if isinstance(p, NearMiss)]
    if not misses and not any(isinstance(p, Site) for p in everything):
        misses = [p for p in everything if isinstance(p, NearMiss)]
    for miss in misses[:5]:
        where = f" (node {miss.node.name})" if miss.node is not None else ""
        cause += f"\n  near miss {miss.name}{where}: {miss.reason}"
    if len(misses) > 5:
        cause += f"\n  … and {len(misses) - 5} more"
    paths = list(dict.fromkeys(p.name for p in everything if isinstance(p, Site)))
    fixes = []
    if pattern is not None and paths:
        plain = re.sub(r"\\(.)", r"\1", pattern.removeprefix("re:")).replace(".*", "")
        nearest = difflib.get_close_matches(plain, paths, 1, cutoff=0.0)
        fixes.append(f"the nearest site is '{nearest[0]}'.")
    elif paths:
        layers = sorted(
            {p.layer for p in everything if isinstance(p, Site) and p.layer is not None}
        )
        fixes.append(f"layers with a site: {layers}." if layers else f"sites: {paths[:8]}.")
    fixes.append("Change the selection, or say 'missing: skip' in the step")
    return PlanError(cause, " ".join(fixes))
