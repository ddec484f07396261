"""`rewriter scan`: which layers can be replaced at the least cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rewriter.cli.shared import (
    JsonOption,
    ModelArgument,
    check_model,
    check_output,
    command,
    console,
    print_json,
    quiet_stdout,
)
from rewriter.errors import RewriterError


@command()
def scan(
    model: ModelArgument,
    name: Annotated[str, typer.Option("--pass", help="Pass to try on every layer.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Text to measure on; may be repeated.")
    ] = None,
    options: Annotated[str, typer.Option(help="Options of the pass, as JSON.")] = "{}",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens that KL is measured on.")] = 2048,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence of that text.")] = 512,
    passkey_tokens: Annotated[
        int, typer.Option(min=64, help="Tokens of the passkey prompts.")
    ] = 430,
    prompts: Annotated[int, typer.Option(min=1, help="Passkey prompts.")] = 2,
    count: Annotated[int | None, typer.Option(min=1, help="Layers to choose.")] = None,
    ratio: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of the layers to choose.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Write a plan with the chosen layers here.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Replace one layer at a time, measure what it costs, and choose the cheapest layers."""
    check_model(model)
    if plan is not None:
        check_output(plan)
    try:
        given = json.loads(options)
    except json.JSONDecodeError as error:
        raise RewriterError(
            f"--options is no JSON: {error}", "--options '{\"window\": 64}'"
        ) from None
    with quiet_stdout(as_json):
        from rewriter.recover import scan as run

        found = run(
            model,
            name,
            list(data) if data else None,
            options=given,
            tokens=tokens,
            length=length,
            count=count,
            ratio=ratio,
            passkey_tokens=passkey_tokens,
            prompts=prompts,
        )
        if plan is not None:
            plan.write_text(found.plan.to_yaml())
    if as_json:
        return print_json({"layers": found.layers, "scores": found.rows})
    _show(found, plan)


def _show(found: Any, plan: Path | None) -> None:
    from rich.table import Table

    columns = ("layer", "score", "KL", "KL without it", "error", "passkey cost")
    table = Table(*columns, box=None, header_style="dim")
    for row in found.rows:
        chosen = row["layer"] in found.layers
        values = [row[k] for k in ("score", "kl", "kl_deleted", "error", "passkey")]
        text = ["–" if v is None else f"{v:.4f}" for v in values]
        table.add_row(str(row["layer"]), *text, style="green" if chosen else "")
    screen = console()
    screen.print(table)
    screen.print(f"chosen: {found.layers}" + (f", plan in {plan}" if plan else ""))
