"""The report of a run: report.json for programs, report.html and a summary for people."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewriter import pictures

if TYPE_CHECKING:
    from rich.console import RenderableType

MEANING = {
    "exact": "The rewritten model computes what the original computes.",
    "approximate": "No training; the measured errors are below.",
    "unrecovered": "Needs training: the rewrite lost accuracy and recovery has not run yet.",
    "recovered": "Trained after the rewrite against the original.",
}
STYLE = {"exact": "green", "recovered": "green", "approximate": "yellow", "unrecovered": "red"}


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write report.json and a self-contained report.html into `folder`.

    report: {"model", "plan" (YAML), "status", "data": {"source", "tokens", "note"},
    "sites": [{"pass", "site", "layer", "error", "facts"}],
    "near_misses": [{"pass", "site", "reason"}],
    "whole": {"kl" (nats per token), "top1" (share of equal top tokens), "perplexity_before",
    "perplexity_after"}, "parameters": {"before", "after"},
    "state": {"before": part, "after": part, "pays_from": tokens or None} (`state_size`),
    "seconds": {name: seconds}, "warnings": [str], "recovery": what `recover` made}. "model",
    "plan" and "status" are required; a missing or None section is left out of the page. In
    report.json numbers that are not finite are the strings "nan", "inf" and "-inf", which JSON
    has no number for.

    Raises OSError when the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(report), indent=2, ensure_ascii=False, allow_nan=False)
    page = render(report)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page, encoding="utf-8")


def render(report: dict[str, Any]) -> str:
    """The page of a report as HTML; nothing in it is loaded from elsewhere."""
    import jinja2

    from rewriter.report_template import TEMPLATE

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.ChainableUndefined)
    sites = [
        site | {"error": pictures.number(site["error"]), "facts": _facts(site.get("facts"))}
        for site in worst_first(report)
    ]
    return environment.from_string(TEMPLATE).render(
        r=report,
        meaning=MEANING.get(report["status"], ""),
        tiles=tiles(report),
        pictures=[
            {"title": title, "text": text, "uri": pictures.svg_uri(figure)}
            for title, text, figure in figures(report)
        ],
        sites=sites,
        seconds=[(name, f"{value:.1f}") for name, value in (report.get("seconds") or {}).items()],
    )


def figures(report: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """(title, sentence, matplotlib figure) for every section that the report has."""
    made: list[tuple[str, str, Any]] = []
    if recovery := report.get("recovery"):
        from rewriter.recover.report import figures as of_recovery

        made += of_recovery(recovery)
    if sites := [site for site in worst_first(report) if site["error"] is not None]:
        few = f"The worst {pictures.MAX_BARS} of {len(sites)} sites."
        text = few if len(sites) > pictures.MAX_BARS else f"{len(sites)} sites, worst first."
        made.append(("Error per site", text, pictures.errors(sites)))
    if whole := _both(report.get("whole"), "perplexity_before", "perplexity_after"):
        text = f"From {_number(whole[0])} to {_number(whole[1])}; lower is better."
        made.append(("Perplexity", text, pictures.pair(*whole, "perplexity")))
    if counts := _both(report.get("parameters"), "before", "after"):
        text = f"From {counts[0]:,} to {counts[1]:,}, {_change(*counts)}."
        made.append(("Parameters", text, pictures.pair(*counts, "parameters")))
    if sizes := report.get("state"):
        made.append(("State while generating", _state_text(sizes), pictures.state(sizes)))
    return made


def tiles(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, value) of the run's main figures."""
    made = []
    whole = report.get("whole") or {}
    if whole.get("kl") is not None:
        made.append(("KL to the original, nats per token", _number(whole["kl"])))
    if whole.get("top1") is not None:
        made.append(("same top token as the original", f"{whole['top1']:.2%}"))
    if perplexity := _both(whole, "perplexity_before", "perplexity_after"):
        made.append(("perplexity", " → ".join(map(_number, perplexity))))
    if counts := _both(report.get("parameters"), "before", "after"):
        made.append(("parameters", " → ".join(map(_number, counts))))
    if sizes := report.get("state"):
        crossing = _crossing(sizes)
        value = "never" if crossing is None else f"{crossing:,} tokens"
        made.append(("state is smaller from", value))
    made.append(("sites rewritten", str(len(report.get("sites") or []))))
    if recovery := report.get("recovery"):
        from rewriter.recover.report import tiles as of_recovery

        made += of_recovery(recovery)
    return made


def summary(report: dict[str, Any], rows: int = 10) -> RenderableType:
    """The run on a terminal: status, main figures, and the `rows` worst sites."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    status = report["status"]
    head = Text.assemble(
        (report["model"], "bold"), "  ", (status, STYLE.get(status, "")), f"  {MEANING[status]}"
    )
    facts = Table.grid(padding=(0, 2))
    for label, value in tiles(report):
        facts.add_row(Text(label, "dim"), Text(value))
    parts: list[RenderableType] = [head, facts]
    if sites := worst_first(report):
        table = Table(box=None, header_style="dim", pad_edge=False)
        table.add_column("worst sites", overflow="fold")
        table.add_column("pass")
        table.add_column("error", justify="right")
        for site in sites[:rows]:
            table.add_row(
                Text(site["site"]), Text(site["pass"]), Text(pictures.number(site["error"]))
            )
        parts.append(table)
        if len(sites) > rows:
            parts.append(Text(f"… and {len(sites) - rows} more in report.html", "dim"))
    if misses := report.get("near_misses"):
        parts.append(Text(f"near misses: {len(misses)}, with reasons in report.html", "dim"))
    parts += [Text(f"warning: {warning}", "yellow") for warning in report.get("warnings") or []]
    return Group(*parts)


def worst_first(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Sites by falling error: not finite first, not measured last."""

    def key(site: dict[str, Any]) -> float:
        error = site["error"]
        if error is None:
            return math.inf
        return -error if math.isfinite(error) else -math.inf

    return sorted(report.get("sites") or [], key=key)


def plain(value: Any) -> Any:
    """The value as JSON can hold it: numbers that are not finite and unknown types as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "tolist"):  # NumPy and torch scalars and arrays
        return plain(value.tolist())
    return str(value)


def _both(section: dict[str, Any] | None, before: str, after: str) -> tuple[Any, Any] | None:
    values = ((section or {}).get(before), (section or {}).get(after))
    return None if None in values else values


def _number(value: Any) -> str:
    return pictures.number(value)


def _change(before: float, after: float) -> str:
    if before == after or not before:
        return "unchanged"
    return f"{abs(after - before) / before:.1%} {'fewer' if after < before else 'more'}"


def _crossing(sizes: dict[str, Any]) -> int | None:
    from rewriter.state_size import pays_from

    return (
        sizes["pays_from"] if "pays_from" in sizes else pays_from(sizes["before"], sizes["after"])
    )


def _state_text(sizes: dict[str, Any]) -> str:
    crossing = _crossing(sizes)
    if crossing is None:
        return "The rewritten model's state is smaller at no length."
    where = f"from {crossing:,} tokens on" if crossing else "at every length"
    return f"The rewritten model's state is smaller {where}."


def _facts(facts: dict[str, Any] | None) -> str:
    def text(value: Any) -> str:
        return pictures.number(value) if isinstance(value, float) else str(value)

    return ", ".join(f"{key} {text(value)}" for key, value in (facts or {}).items())
