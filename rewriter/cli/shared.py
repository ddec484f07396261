"""What the commands share: arguments, early checks, printing."""

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

#: The one application; a command registers itself with `@command()`.
app = typer.Typer(
    help="Rewrite the sequence mixers of pretrained transformers.\n\n" + EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelArgument = Annotated[str, typer.Argument(help="Hub id, local folder or .gguf file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
PlanOption = Annotated[str, typer.Option("--plan", help="YAML file of the plan.")]


def command(name: str | None = None) -> Any:
    """Decorator that adds a function to the command line."""
    return app.command(name, epilog=EXIT_CODES)


def read_plan(path: str) -> Plan:
    from rewriter.plan import Plan

    return Plan.from_yaml(Path(path))


def check_output(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise RewriterError(f"'{output}' exists already", "name a new folder, or remove this one")
    parent = next(p for p in output.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RewriterError(f"cannot write in '{parent}'", "name a folder elsewhere")


def check_model(model: str) -> None:
    """A model that is neither here nor can be a Hub id; the rest is found on loading."""
    hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model)
    if not model or not (hub_id or Path(model).expanduser().exists()):
        raise RewriterError(
            f"there is no model '{model}'", "give a local folder, a .gguf file or a Hub id"
        )


def check_folder(folder: Path) -> None:
    if not (folder / "lock.json").is_file():
        raise RewriterError(
            f"'{folder}' is not a rewritten model", "give a folder that 'rewriter apply' made"
        )


@contextlib.contextmanager
def quiet_stdout(quiet: bool) -> Iterator[None]:
    """Send what libraries print to stderr, so that stdout holds the result alone."""
    with contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext():
        yield


def console() -> Any:
    from rich.console import Console

    return Console()


def print_json(value: Any) -> None:
    from rewriter.report import plain

    print(json.dumps(plain(value), indent=2, ensure_ascii=False))
