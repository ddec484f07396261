"""Reports: files, order, escaping, and the length from which a rewrite pays."""

import base64
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewriter.report import figures, render, summary, worst_first, write_report
from rewriter.state_size import pays_from, state_bytes


def site(name, error, layer=0):
    return {"pass": "p", "site": name, "layer": layer, "error": error, "facts": {"window": 8}}


@pytest.fixture
def report():
    return {
        "model": "org/<script>model",
        "plan": "steps:\n- pass: p\n",
        "status": "approximate",
        "data": {"source": "a.txt", "tokens": 2048, "note": "short"},
        "sites": [site("a", 1e-6), site("b", 0.3), site("c", math.nan), site("d", None)],
        "near_misses": [{"pass": "p", "site": "e", "reason": "dense & odd"}],
        "whole": {"kl": 0.02, "top1": 0.97, "perplexity_before": 16.0, "perplexity_after": 17.0},
        "parameters": {"before": 1000, "after": 900},
        "state": {
            "before": {"fixed": 0, "per_token": 100},
            "after": {
                "fixed": 1000,
                "per_token": 10,
                "capped": [{"bytes_per_token": 50, "tokens": 64}],
            },
            "pays_from": 47,
        },
        "seconds": {"gate": 1.25},
        "warnings": ["look <here>"],
    }


def test_files(report, tmp_path):
    write_report(report, tmp_path / "new")
    read = json.loads((tmp_path / "new" / "report.json").read_text())
    assert read["sites"][2]["error"] == "nan" and read["whole"] == report["whole"]
    page = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "look &lt;here&gt;" in page and "dense &amp; odd" in page
    # Self-contained: nothing is fetched, every picture is well-formed SVG.
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(pictures) == 4
    for picture in pictures:
        assert ElementTree.fromstring(base64.b64decode(picture)).tag.endswith("svg")


def test_worst_first(report):
    assert [s["site"] for s in worst_first(report)] == ["c", "b", "a", "d"]
    from rich.console import Console

    console = Console(width=80, file=io.StringIO())
    console.print(summary(report, rows=2))
    text = console.file.getvalue()
    rows = [line.split()[0] for line in text.splitlines() if " p " in line]
    assert rows == ["c", "b"]
    assert "not finite" in text and "and 2 more" in text and "look <here>" in text


def test_page_is_reproducible(report):
    assert render(report) == render(report)


def test_only_the_required_keys():
    least = {"model": "m", "plan": "", "status": "exact"}
    assert "No site was rewritten" in render(least) and figures(least) == []


def test_exact_rewrite_has_zero_errors(report):
    report["sites"] = [site("a", 0.0)]
    report["state"] = {
        "before": {"fixed": 0, "per_token": 4},
        "after": {"fixed": 0, "per_token": 4},
    }
    assert "smaller at no length" in render(report)


PART = st.fixed_dictionaries(
    {
        "fixed": st.integers(0, 500),
        "per_token": st.integers(0, 20),
        "capped": st.lists(
            st.fixed_dictionaries(
                {"bytes_per_token": st.integers(1, 20), "tokens": st.integers(1, 40)}
            ),
            max_size=2,
        ),
    }
)


@given(before=PART, after=PART)
def test_pays_from_agrees_with_counting(before, after):
    smaller = [state_bytes(after, t) < state_bytes(before, t) for t in range(4000)]
    expected = None
    if smaller[-1]:
        expected = max((t + 1 for t, s in enumerate(smaller) if not s), default=0)
    assert pays_from(before, after) == expected
