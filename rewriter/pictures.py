"""Pictures of a report: matplotlib figures, embedded as SVG. No display, no global state."""

from __future__ import annotations

import base64
import io
import math
from typing import TYPE_CHECKING, Any

from rewriter.state_size import pays_from, state_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEFORE, AFTER = "#8795a4", "#1b6fb5"
MAX_BARS = 40


def svg_uri(figure: Figure) -> str:
    """The figure as a data URI; the same figure gives the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "rewriter", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def errors(sites: list[dict[str, Any]]) -> Figure:
    """A bar for the error of every site (worst first; the worst 40 when there are more)."""
    shown = sites[:MAX_BARS]
    figure, axes = _figure(1.0 + 0.24 * len(shown))
    values = [s["error"] if _finite(s["error"]) else math.nan for s in shown]
    positive = [v for v in values if v > 0]
    floor = min(positive, default=1e-9) / 3
    top = max(positive, default=1.0)
    for row, (site, value) in enumerate(zip(shown, values, strict=True)):
        if math.isnan(value):
            axes.barh(row, top, color="#c0392b", hatch="//", edgecolor="white")
        else:
            axes.barh(row, max(value, floor), color=AFTER)
        label = number(site["error"])
        at = top if math.isnan(value) else max(value, floor)
        axes.annotate(label, (at, row), (4, 0), textcoords="offset points", va="center", size=8)
    axes.set_yticks(range(len(shown)), [shorten(s["site"]) for s in shown], size=8)
    axes.set_xscale("log")
    axes.set_xlim(floor, top * (top / floor) ** 0.15)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("relative error, max|Δ| / max|original| (log scale)")
    return figure


def pair(before: float, after: float, label: str) -> Figure:
    """Two bars, original and rewritten, from zero."""
    figure, axes = _figure(1.6)
    for row, (value, colour) in enumerate(((before, BEFORE), (after, AFTER))):
        axes.barh(row, value if _finite(value) else 0, color=colour, height=0.6)
        width = value if _finite(value) else 0
        axes.annotate(number(value), (width, row), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks([0, 1], ["original", "rewritten"])
    axes.invert_yaxis()
    largest = max((v for v in (before, after) if _finite(v)), default=1)
    axes.set_xlim(0, (largest or 1) * 1.15)
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.set_xlabel(label)
    return figure


def state(sizes: dict[str, Any]) -> Figure:
    """State of one sequence against its length, for both models, crossing marked."""
    from matplotlib.ticker import MultipleLocator

    before, after = sizes["before"], sizes["after"]
    crossing = sizes["pays_from"] if "pays_from" in sizes else pays_from(before, after)
    caps = [c["tokens"] for part in (before, after) for c in part.get("capped") or []]
    end = max(1024, 4 * max([crossing or 0, *caps]))
    tokens = sorted({*(end * i // 256 for i in range(257)), *caps, crossing or 0})
    figure, axes = _figure(3.6)
    for part, name, colour in ((before, "original", BEFORE), (after, "rewritten", AFTER)):
        axes.plot(tokens, [state_bytes(part, t) for t in tokens], color=colour, lw=2, label=name)
    if crossing:
        at = state_bytes(after, crossing)
        axes.plot([crossing], [at], "o", color="#c0392b", zorder=3)
        axes.axvline(crossing, color="#c0392b", lw=0.8, ls=":")
        axes.annotate(
            f"smaller from {crossing:,} tokens",
            (crossing, 0.97),
            (6, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            color="#c0392b",
        )
    axes.set_xlim(0, end)
    axes.set_ylim(bottom=0)
    most = max(state_bytes(before, end), state_bytes(after, end), 8)
    axes.yaxis.set_major_locator(MultipleLocator(2 ** math.ceil(math.log2(most / 6))))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: size(value))
    axes.set_xlabel("tokens in the sequence")
    axes.set_ylabel("state of one sequence")
    axes.legend(frameon=False, loc="lower right")
    return figure


def number(value: Any) -> str:
    """Four significant digits; large ones with a unit letter."""
    if not _finite(value):
        return "not finite" if isinstance(value, float) else str(value)
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= scale:
            return f"{value / (1e3 if unit == 'k' else scale):.4g} {unit}"
    return f"{value:.4g}"


def size(value: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


def shorten(path: str, width: int = 44) -> str:
    """Keep the end of a long module path: that is where sites differ."""
    return path if len(path) <= width else "…" + path[-(width - 1) :]


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
