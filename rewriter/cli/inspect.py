"""`rewriter inspect`: what a pass or a plan could touch."""

from __future__ import annotations

from typing import Annotated

import typer

from rewriter.cli.shared import (
    JsonOption,
    ModelArgument,
    check_model,
    command,
    console,
    print_json,
    quiet_stdout,
    read_plan,
)


@command()
def inspect(
    model: ModelArgument,
    plan: Annotated[str | None, typer.Option(help="Show what this plan would touch.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List what each pass could rewrite in a model, and why it could not; reads no weights."""
    chosen = read_plan(plan) if plan else None
    check_model(model)
    with quiet_stdout(as_json):
        from rewriter.capture import capture
        from rewriter.inspection import by_pass, by_plan

        graph = capture(model, meta=True)
        found = by_plan(graph, chosen) if chosen else by_pass(graph)
    if as_json:
        return print_json({"model": model, "passes": found})
    from rewriter.inspection import table

    console().print(table(model, found))
