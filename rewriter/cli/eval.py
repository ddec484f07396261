"""`rewriter eval`: measure a rewritten model beside its original."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from rewriter.cli.shared import (
    JsonOption,
    check_model,
    command,
    console,
    print_json,
    quiet_stdout,
)
from rewriter.errors import RewriterError


@command("eval")
def evaluate(
    output: Annotated[Path, typer.Argument(help="Folder that 'apply' made, or any saved model.")],
    against: Annotated[
        str | None, typer.Option(help="The original; by default what the folder was made from.")
    ] = None,
    suite: Annotated[str, typer.Option(help="'quick' (minutes) or 'full'.")] = "quick",
    data: Annotated[str | None, typer.Option(help="Text in place of the held-out texts.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all prompts.")] = 0,
    result: Annotated[
        Path | None,
        typer.Option(
            "--output", help="JSON file to write, with a .png beside it [OUTPUT-eval-SUITE.json]."
        ),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="JSON file of an earlier run, to show in one table; may be repeated."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Perplexity, retrieval and agreement of a rewritten model beside its original."""
    source = against or original_of(output)
    check_model(source)
    path = result or output.absolute().with_name(f"{output.absolute().name}-eval-{suite}.json")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise RewriterError(f"cannot write '{path}'", "name a file in a folder that exists")
    earlier = {file.stem: _read_result(file) for file in beside or []}
    with quiet_stdout(as_json):
        from rewriter.evaluate.show import compared, save_figure, table
        from rewriter.evaluate.suite import SUITES, evaluate
        from rewriter.evaluate.text import held_out_texts
        from rewriter.report import plain

        if suite not in SUITES:
            raise RewriterError(f"there is no suite '{suite}'", f"one of {', '.join(SUITES)}")
        held_out_texts(data)  # a mistake is told before anything slow starts
        tokenizer = _tokenizer(str(output), source)
        model, original = _load(str(output)), _load(source)
        with _progress() as progress:
            found = evaluate(
                model, original, tokenizer, suite=suite, data=data, seed=seed, progress=progress
            )
        made = {"model": str(output), "original": source, **found.to_dict()}
        text = json.dumps(plain(made), indent=2, ensure_ascii=False, allow_nan=False)
        part = path.with_name(f".{path.name}.part")
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)
        picture = path.with_suffix(".png")
        drawn = save_figure(found, picture)
    if as_json:
        return print_json(made)
    console().print(table(found))
    if earlier:
        console().print("", compared({**earlier, path.stem: made}))
    for written in (path, *([picture] if drawn else [])):
        console().print(f"wrote {written}", markup=False, highlight=False)


def original_of(folder: Path) -> str:
    """What a rewritten folder was made from, as its lock says."""
    lock = folder / "lock.json"
    if not folder.is_dir():
        raise RewriterError(f"there is no folder '{folder}'", "give a folder that 'apply' made")
    if not lock.is_file():
        raise RewriterError(f"'{folder}' does not say what it was made from", "give --against")
    try:
        source = json.loads(lock.read_text(encoding="utf-8")).get("original", {}).get("source")
    except (ValueError, AttributeError) as error:
        raise RewriterError(f"'{lock}' is damaged: {error}", "give --against") from None
    local = str(source).startswith(("/", ".", "~"))
    if not source or (local and not Path(source).expanduser().exists()):
        raise RewriterError(f"the original '{source}' is not here any more", "give --against")
    return str(source)


def _read_result(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"rows": found["rows"], "worst": found["worst"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RewriterError(
            f"cannot read '{path}': {error}", "give a file that 'rewriter eval' wrote"
        ) from None


def _load(source: str) -> Any:
    """A rewritten folder, or any causal language model that transformers loads."""
    if (Path(source) / "graph.json").is_file():
        from rewriter import load

        return load(source)
    from rewriter.loading import load_model

    return load_model(source)


def _tokenizer(*sources: str) -> Any:
    """The tokenizer of the first source that has one."""
    from transformers import AutoTokenizer

    for source in sources:
        try:
            return AutoTokenizer.from_pretrained(source)
        except Exception:  # many kinds, for many kinds of missing files
            continue
    raise RewriterError(
        f"neither {' nor '.join(sources)} has a tokenizer", "save one beside the model"
    )


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr with what runs now and the time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:28}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("loading", total=None)

        def show(what: str, done: int, total: int) -> None:
            bars.update(bar, description=what, completed=done, total=total)

        yield show
