"""`rewriter verify`: is a folder what its lock says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewriter.cli.shared import JsonOption, check_folder, command, print_json, quiet_stdout


@command()
def verify(
    output: Annotated[Path, typer.Argument(help="Folder that 'apply' made.")],
    as_json: JsonOption = False,
) -> None:
    """Check the files of a rewritten model against its lock, load it, and run it once."""
    check_folder(output)
    with quiet_stdout(as_json):
        from rewriter.inspection import check_files, check_forward

        files = check_files(output)
        logits = check_forward(output)
    result = {"folder": str(output), "files": files, "forward": logits, "ok": True}
    if as_json:
        return print_json(result)
    ran = f"forward finite, shape {logits['shape']}" if logits else "not run: it takes no tokens"
    print(f"{output}: {len(files)} files as locked, {ran}")
