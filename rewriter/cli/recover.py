"""`rewriter recover`: train a rewritten model against its original."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from rewriter.cli.shared import (
    JsonOption,
    check_folder,
    command,
    console,
    print_json,
    quiet_stdout,
)
from rewriter.errors import RewriterError


@command()
def recover(
    output: Annotated[Path, typer.Argument(help="Folder that 'apply' made; it is replaced.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Training text: file, folder, token file or data set; may be repeated."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of all stages.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Minutes of training.")] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(help="fit, transfer, distil or lora; repeat it. Default: the plan's."),
    ] = None,
    original: Annotated[
        str | None, typer.Option(help="The model it was made from, if it has moved.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a run that was stopped.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Order of the text.")] = 0,
    precision: Annotated[
        str, typer.Option(help="bfloat16 linears: auto, half or full (float32).")
    ] = "auto",
    baselines: Annotated[bool, typer.Option(help="Measure the four baselines too.")] = True,
    evaluations: Annotated[
        int, typer.Option(min=0, help="How often a stage measures perplexity.")
    ] = 5,
    report_to: Annotated[str, typer.Option(help="Tracker, as transformers' Trainer names it.")] = (
        "none"
    ),
    checkpoint_steps: Annotated[
        int | None, typer.Option(min=1, help="Save every so many steps, besides the minutes.")
    ] = None,
    fsdp: Annotated[
        str | None, typer.Option(help="Sharding under torchrun, as Trainer's --fsdp.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train the new mixers against the original model, and say what it brought.

    Checkpoints lie in OUT.recovery until the run has ended. Under `torchrun` the same command
    trains on several processes.
    """
    check_folder(output)
    if precision not in ("auto", "half", "full"):
        raise RewriterError(f"unknown precision '{precision}'", "use auto, half or full")
    work = output.with_name(output.name + ".recovery")
    if resume and not (work / "run.json").exists():
        raise RewriterError(f"there is no run to resume in '{work}'", "leave --resume out")
    given: dict[str, Any] = {"fsdp": fsdp} if fsdp else {}
    with quiet_stdout(as_json):
        from rewriter.folders import whole_folder
        from rewriter.recover import recover as run
        from rewriter.recover.session import main_process

        made = run(
            output,
            original,
            list(stage) if stage else None,
            list(data) if data else None,
            tokens=tokens,
            minutes=minutes,
            seed=seed,
            work=work,
            resume=resume,
            precision=precision,
            with_baselines=baselines,
            evaluations=evaluations,
            report_to=report_to,
            checkpoint_steps=checkpoint_steps,
            arguments=given,
        )
        if not main_process():
            return
        with whole_folder(output, replace=True) as folder:
            made.save_pretrained(folder)
        shutil.rmtree(work, ignore_errors=True)
    if as_json:
        return print_json({"output": str(output), "recovery": made.report["recovery"]})
    from rewriter.report import summary

    screen = console()
    screen.print(summary(made.report))
    screen.print(f"saved in {output}", markup=False, highlight=False)
