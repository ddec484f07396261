"""Recovery in a report: pictures of the curve, the layers and the baselines, and the figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rewriter import pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINES = {
    "deleted": "layers deleted",
    "mean": "their mean output",
    "window": "window 64 + 4 sinks, untrained",
    "closed_form": "closed-form fit only",
}


def figures(recovery: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """(title, sentence, figure) for every part of `report["recovery"]`."""
    made: list[tuple[str, str, Any]] = []
    perplexity = recovery["perplexity"]
    if any(s.get("curve") for s in recovery["stages"]):
        start, end = (pictures.number(perplexity[k]) for k in ("start", "end"))
        text = (
            f"{recovery['tokens']:,} tokens of {recovery['data']}. Perplexity on "
            f"{recovery['held_out_tokens']:,} held-out tokens: {start} before, {end} after."
        )
        made.append(("Recovery", text, curve(recovery)))
    if recovery.get("layers"):
        text = "Relative error of each region on the original's inputs, before and after."
        made.append(("Error per layer", text, layers(recovery["layers"])))
    if recovery.get("baselines"):
        text = "What costs no training, beside the result. Lower is better."
        made.append(("Baselines", text, baselines(recovery)))
    return made


def curve(recovery: dict[str, Any]) -> Figure:
    """Loss of every stage, and perplexity, against tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    shift, colours = 0, ("#1b6fb5", "#2e8b57", "#8a5fb0", "#b5651b")
    points: list[tuple[float, float]] = []
    for index, stage in enumerate(recovery["stages"]):
        steps = stage.get("curve") or []
        if steps:
            x = [shift + tokens for tokens, _ in steps]
            y = _smooth([loss for _, loss in steps])
            colour = colours[index % len(colours)]
            top.plot(x, y, color=colour, label=f"{stage['stage']} loss")
            points += [(shift + e["tokens"], e["perplexity"]) for e in stage["evaluations"]]
            shift = x[-1]
            if index + 1 < len(recovery["stages"]):
                for axes in (top, bottom):
                    axes.axvline(shift, color="#c5ccd3", lw=0.8)
    top.set_yscale("log")
    top.set_ylabel("loss")
    top.legend(frameon=False)
    if points:
        bottom.plot(*zip(*points, strict=True), "o-", color="#1f2933", ms=4)
    original = recovery["perplexity"].get("original")
    if original:
        bottom.axhline(original, color=pictures.BEFORE, ls="--", lw=1)
        bottom.annotate("original", (0, original), (4, 3), textcoords="offset points", size=8)
    bottom.set_ylabel("perplexity")
    bottom.set_xlabel("tokens")
    bottom.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def layers(rows: list[dict[str, Any]]) -> Figure:
    """Two marks a region: its error before and after."""
    from matplotlib.figure import Figure

    shown = rows[: pictures.MAX_BARS]
    figure = Figure(figsize=(9, 1.2 + 0.24 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(shown):
        axes.plot([row["before"], row["after"]], [y, y], color="#c5ccd3", lw=2, zorder=1)
        axes.scatter(
            row["before"], y, color=pictures.BEFORE, zorder=2, label=None if y else "before"
        )
        last = None if y else "after"
        axes.scatter(row["after"], y, color=pictures.AFTER, zorder=2, label=last)
    axes.set_yticks(range(len(shown)), [pictures.shorten(r["site"]) for r in shown], size=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("|Δ| / |original|")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def baselines(recovery: dict[str, Any]) -> Figure:
    """A bar for every baseline, the result and the original."""
    from matplotlib.figure import Figure

    perplexity = recovery["perplexity"]
    rows = [("original", perplexity.get("original")), ("recovered", perplexity["end"])]
    rows += [(BASELINES[k], recovery["baselines"].get(k)) for k in BASELINES]
    rows = [(name, value) for name, value in rows if value is not None]
    figure = Figure(figsize=(9, 0.8 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    least = min(v for _, v in rows)
    for y, (name, value) in enumerate(rows):
        colour = pictures.AFTER if name == "recovered" else pictures.BEFORE
        axes.barh(y, value, color=colour)
        axes.annotate(
            pictures.number(value), (value, y), (4, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(least * 0.8, max(v for _, v in rows) * 1.4)
    axes.set_xlabel("perplexity on held-out text (log scale)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def tiles(recovery: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, value) of a recovery's main figures."""
    perplexity = recovery["perplexity"]
    made = [
        ("trained on", f"{recovery['tokens']:,} tokens"),
        ("training", f"{recovery['seconds'] / 60:.1f} minutes"),
    ]
    if perplexity.get("original"):
        ratio = perplexity["end"] / perplexity["original"]
        made.append(("perplexity to the original's", f"{ratio:.3f}"))
    for key, name in BASELINES.items():
        value = (recovery.get("baselines") or {}).get(key)
        if value is not None:
            made.append((f"baseline: {name}", pictures.number(value)))
    return made


def _smooth(values: list[float], keep: float = 0.9) -> list[float]:
    made, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + 1 - keep
        made.append(total / weight)
    return made
