"""The command line: apply, inspect, passes, verify, generate, schema.

Everything heavy is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewriter.errors import RewriterError

if TYPE_CHECKING:
    from rewriter.plan import Plan

EXIT_CODES = """Exit codes: 0 done; 1 internal error; 2 bad input; 3 the gate found a wrong rewrite;
4 a pass broke the graph; 130 interrupted. A run that fails leaves no output folder."""

app = typer.Typer(
    help="Rewrite the sequence mixers of pretrained transformers.\n\n" + EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelArgument = Annotated[str, typer.Argument(help="Hub id, local folder or .gguf file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
PlanOption = Annotated[str, typer.Option("--plan", help="YAML file of the plan.")]


def main() -> None:
    """Entry point of the `rewriter` command."""
    sys.exit(run())


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; a user's mistake prints one message."""
    try:
        app(arguments, prog_name="rewriter")
    except SystemExit as done:  # typer always leaves this way
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except RewriterError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # disk full, no permission, the hub out of reach
        what = error.strerror or str(error).strip() or type(error).__name__
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {what}{where}", file=sys.stderr)
        return 2
    except Exception:
        import traceback

        traceback.print_exc()
        print("internal error: this is a bug in rewriter", file=sys.stderr)
        return 1
    return 0


@app.command(epilog=EXIT_CODES)
def apply(
    model: ModelArgument,
    plan: PlanOption,
    output: Annotated[Path, typer.Option(help="Folder to make; it must not exist.")],
    data: Annotated[
        str | None, typer.Option(help="Text to measure on, in place of the plan's.")
    ] = None,
    export: Annotated[str | None, typer.Option(help="Also export to this format: 'onnx'.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Rewrite a model by a plan, check it against the original, and save it."""
    # Mistakes are told before anything slow starts.
    _check_output(output)
    if export not in (None, "onnx"):
        raise RewriterError(f"cannot export to '{export}'", "use --export onnx")
    chosen = _read_plan(plan)
    _check_model(model)
    with _quiet_stdout(as_json):
        from rewriter import rewrite
        from rewriter.folders import whole_folder

        made = rewrite(model, chosen, data=data)
        with whole_folder(output) as folder:
            made.save_pretrained(folder)
            if export:
                from rewriter.export import export as write_export

                write_export(made, folder / export, to=export)
    _show(made.report, as_json, output)


@app.command(epilog=EXIT_CODES)
def inspect(
    model: ModelArgument,
    plan: Annotated[str | None, typer.Option(help="Show what this plan would touch.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List what each pass could rewrite in a model, and why it could not; reads no weights."""
    chosen = _read_plan(plan) if plan else None
    _check_model(model)
    with _quiet_stdout(as_json):
        from rewriter.capture import capture
        from rewriter.inspection import by_pass, by_plan

        graph = capture(model, meta=True)
        found = by_plan(graph, chosen) if chosen else by_pass(graph)
    if as_json:
        return _print_json({"model": model, "passes": found})
    from rewriter.inspection import table

    _console().print(table(model, found))


@app.command("passes", epilog=EXIT_CODES)
def list_passes(as_json: JsonOption = False) -> None:
    """List the passes: name, contract, first line of the description."""
    from rewriter.plan import first_line
    from rewriter.protocol import passes

    rows = [
        {"name": name, "contract": str(known.contract), "about": first_line(known)}
        for name, known in passes().items()
    ]
    if as_json:
        return _print_json({"passes": rows})
    from rich.table import Table

    table = Table("pass", "contract", "what", box=None, header_style="dim")
    for row in rows:
        table.add_row(*row.values())
    _console().print(table)


@app.command(epilog=EXIT_CODES)
def verify(
    output: Annotated[Path, typer.Argument(help="Folder that 'apply' made.")],
    as_json: JsonOption = False,
) -> None:
    """Check the files of a rewritten model against its lock, load it, and run it once."""
    _check_folder(output)
    with _quiet_stdout(as_json):
        from rewriter.inspection import check_files, check_forward

        files = check_files(output)
        logits = check_forward(output)
    result = {"folder": str(output), "files": files, "forward": logits, "ok": True}
    if as_json:
        return _print_json(result)
    ran = f"forward finite, shape {logits['shape']}" if logits else "not run: it takes no tokens"
    print(f"{output}: {len(files)} files as locked, {ran}")


@app.command(epilog=EXIT_CODES)
def generate(
    output: Annotated[Path, typer.Argument(help="Folder that 'apply' made.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 64,
) -> None:
    """Go on from a prompt with a rewritten model, greedily."""
    _check_folder(output)
    if not prompt.strip():
        raise RewriterError("the prompt is empty", "give some text")
    with _quiet_stdout(True):
        import torch
        from transformers import AutoTokenizer

        from rewriter import load

        model: Any = load(output)
        tokenizer = AutoTokenizer.from_pretrained(output)
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


@app.command(epilog=EXIT_CODES)
def schema() -> None:
    """Print the JSON schema of plans, with the options of every known pass."""
    from rewriter.plan import Plan

    _print_json(Plan.json_schema())


def _read_plan(path: str) -> Plan:
    from rewriter.plan import Plan

    return Plan.from_yaml(Path(path))


def _check_output(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise RewriterError(f"'{output}' exists already", "name a new folder, or remove this one")
    parent = next(p for p in output.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RewriterError(f"cannot write in '{parent}'", "name a folder elsewhere")


def _check_model(model: str) -> None:
    """A model that is neither here nor can be a Hub id; the rest is found on loading."""
    hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model)
    if not model or not (hub_id or Path(model).expanduser().exists()):
        raise RewriterError(
            f"there is no model '{model}'", "give a local folder, a .gguf file or a Hub id"
        )


def _check_folder(folder: Path) -> None:
    if not (folder / "lock.json").is_file():
        raise RewriterError(
            f"'{folder}' is not a rewritten model", "give a folder that 'rewriter apply' made"
        )


@contextlib.contextmanager
def _quiet_stdout(quiet: bool) -> Iterator[None]:
    """Send what libraries print to stderr, so that stdout holds the result alone."""
    with contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext():
        yield


def _console() -> Any:
    from rich.console import Console

    return Console()


def _print_json(value: Any) -> None:
    from rewriter.report import plain

    print(json.dumps(plain(value), indent=2, ensure_ascii=False))


def _show(report: dict[str, Any], as_json: bool, output: Path) -> None:
    if as_json:
        return _print_json({"output": str(output), "report": report})
    from rewriter.report import summary

    console = _console()
    console.print(summary(report))
    console.print(f"saved in {output}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
