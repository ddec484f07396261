"""`rewriter schema`: the JSON schema of plans."""

from __future__ import annotations

from rewriter.cli.shared import command, print_json


@command()
def schema() -> None:
    """Print the JSON schema of plans, with the options of every known pass."""
    from rewriter.plan import Plan

    print_json(Plan.json_schema())
