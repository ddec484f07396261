"""An evaluation for people: a table with both models, the worst tasks, and a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewriter.evaluate.suite import Evaluation, Row
from rewriter.pictures import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType


#: Metrics as the table names them, which fits in 80 columns.
SHORT = {"perplexity": "ppl", "accuracy": "hits", "agreement": "same"}


def table(found: Evaluation) -> RenderableType:
    """Every row with the original beside the rewritten model, then the worst rows by name."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("task", "metric"):
        made.add_column(column, no_wrap=True)
    for column in ("tokens", "n", "original", "rewritten", "change", "excess", "kept"):
        made.add_column(column, justify="right", no_wrap=True)
    worst = found.worst()
    for row in found.rows:
        style = "yellow" if any(row is w for w in worst.values()) else ""
        made.add_row(*cells(row), style=style)
    parts: list[RenderableType] = [made, Text("")]
    parts += [Text(line, "bold") for line in worst_lines(found)]
    for skipped in found.skipped:
        what = f"{skipped['task']} at {skipped['length']:,} tokens: {skipped['why']}"
        parts.append(Text(f"left out: {what}", "dim"))
    note = "excess: nats per token over the original; kept: of the original's hits"
    return Group(*parts, Text(note, "dim"))


def cells(row: Row) -> list[str]:
    """One row as text: task, metric, tokens, n, original, rewritten, change, excess, kept."""
    if row.ratio is not None:
        change = f"×{row.ratio:.4f}"
    else:
        change = "" if row.difference is None else f"{100 * row.difference:+.1f}pt"
    show = number if row.metric == "perplexity" else _percent
    return [
        row.task,
        SHORT[row.metric],
        f"{row.length:,}",
        str(row.count),
        show(row.original),
        show(row.rewritten),
        change,
        "" if row.excess is None else f"{row.excess:+.3f}",
        "" if row.kept is None else _percent(row.kept),
    ]


def worst_lines(found: Evaluation) -> list[str]:
    """A sentence for the greatest excess loss, and one for the hits most lost."""
    worst, lines = found.worst(), []
    if row := worst.get("excess"):
        lines.append(f"worst task: {row.task} at {row.length:,} tokens, {row.excess:+.4f} nats")
    if row := worst.get("kept"):
        lines.append(
            f"worst retrieval: {row.task} at {row.length:,} tokens keeps "
            f"{_percent(row.kept)} of the original's hits"
        )
    return lines


def figure(found: Evaluation) -> Figure | None:
    """Loss by position of both models, and their difference, for the longest windows of text."""
    from matplotlib.figure import Figure

    rows = [row for row in found.rows if row.metric == "perplexity"]
    if not rows:
        return None
    longest: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row.length):
        longest[row.task] = row
    made = Figure(figsize=(11, 6), layout="constrained")
    upper, lower = made.subplots(2, 1, sharex=True)
    for index, (name, row) in enumerate(longest.items()):
        curve, colour = row.details["curve"], f"C{index}"
        block = curve["block"]
        places = [(i + 0.5) * block for i in range(len(curve["original"]))]
        for which, line in (("original", ":"), ("rewritten", "-")):
            label = f"{name}, {which}: perplexity {number(getattr(row, which))}"
            upper.plot(places, curve[which], line, color=colour, lw=1.8, label=label)
        pairs = zip(curve["rewritten"], curve["original"], strict=True)
        excess = [a - b if math.isfinite(a - b) else math.nan for a, b in pairs]
        label = f"{name}: {number(row.excess)} on average"
        lower.plot(places, excess, color=colour, lw=1.8, label=label)
    lower.axhline(0, color="0.6", lw=0.8)
    upper.set_ylabel("loss, nats per token")
    lower.set_ylabel("over the original")
    lower.set_xlabel("position in the window, tokens")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return made


def save_figure(found: Evaluation, path: Path) -> bool:
    """Write the picture as PNG, the same bytes for the same figures; False without text rows."""
    made = figure(found)
    if made is None:
        return False
    made.savefig(path, format="png", dpi=120, metadata={"Software": None})
    return True


def compared(results: dict[str, dict[str, Any]]) -> RenderableType:
    """Several evaluations (name to `Evaluation.to_dict()`), a line each: methods by tasks.

    A cell is the perplexity's ratio, or the fraction of the original's hits that is kept (the
    accuracy where the original has none); the last column names the worst task by excess loss.
    """
    from rich.table import Table

    made = Table(box=None, header_style="dim", pad_edge=False)
    made.add_column("method", no_wrap=True)
    columns = list(
        dict.fromkeys((r["task"], r["length"]) for found in results.values() for r in found["rows"])
    )
    for task, length in columns:
        made.add_column(f"{task} {length}", justify="right")
    made.add_column("worst task", no_wrap=True)
    for name, found in results.items():
        rows = {(r["task"], r["length"]): r for r in found["rows"]}
        shown = [_cell(rows.get(column)) for column in columns]
        worst = found["worst"].get("excess")
        end = f"{worst['task']} {worst['length']}: {worst['excess']:+.3f}" if worst else ""
        made.add_row(name, *shown, end)
    return made


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["ratio"] is not None:
        return f"× {row['ratio']:.3f}"
    return _percent(row["rewritten"] if row["kept"] is None else row["kept"])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"
