"""`rewriter apply`: rewrite, check, save."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rewriter.cli.shared import (
    JsonOption,
    ModelArgument,
    PlanOption,
    check_model,
    check_output,
    command,
    console,
    print_json,
    quiet_stdout,
    read_plan,
)
from rewriter.errors import RewriterError


@command()
def apply(
    model: ModelArgument,
    plan: PlanOption,
    output: Annotated[Path, typer.Option(help="Folder to make; it must not exist.")],
    data: Annotated[
        str | None, typer.Option(help="Text to measure on, in place of the plan's.")
    ] = None,
    export: Annotated[str | None, typer.Option(help="Also export to this format: 'onnx'.")] = None,
    weights: Annotated[
        str,
        typer.Option(
            help="Of the export: fp32, int8, int4, or source (the grid of the .gguf model)."
        ),
    ] = "fp32",
    as_json: JsonOption = False,
) -> None:
    """Rewrite a model by a plan, check it against the original, and save it."""
    # Mistakes are told before anything slow starts.
    check_output(output)
    if export not in (None, "onnx"):
        raise RewriterError(f"cannot export to '{export}'", "use --export onnx")
    if weights != "fp32" and not export:
        raise RewriterError("--weights is of an export", "add --export onnx")
    if weights not in ("fp32", "int8", "int4", "source"):
        raise RewriterError(f"unknown weights '{weights}'", "use fp32, int8, int4 or source")
    if weights == "source" and not model.endswith(".gguf"):
        raise RewriterError("--weights source is for a .gguf model", "use int8, or the .gguf file")
    chosen = read_plan(plan)
    check_model(model)
    with quiet_stdout(as_json):
        from rewriter import rewrite
        from rewriter.folders import whole_folder

        made = rewrite(model, chosen, data=data)
        with whole_folder(output) as folder:
            made.save_pretrained(folder)
            if export:
                from rewriter.export import export as write_export

                write_export(made, folder / export, to=export, weights=weights)
    _show(made.report, as_json, output)


def _show(report: dict[str, Any], as_json: bool, output: Path) -> None:
    if as_json:
        return print_json({"output": str(output), "report": report})
    from rewriter.report import summary

    screen = console()
    screen.print(summary(report))
    screen.print(f"saved in {output}", markup=False, highlight=False)
