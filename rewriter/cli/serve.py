"""`rewriter serve`: an OpenAI-compatible server over an exported folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from rewriter.cli.shared import command
from rewriter.errors import RewriterError


@command()
def serve(
    folder: Annotated[Path, typer.Argument(help="Folder that an export to ONNX made.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Of the model [the folder's].")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the model [all cores].")] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Answers that are written at the same time.")
    ] = 64,
    queue: Annotated[
        int, typer.Option(min=0, help="Answers that may wait; a further one gets status 429.")
    ] = 64,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer [the model's].")
    ] = None,
    held: Annotated[
        int, typer.Option(min=2, help="Tokens of all answers being written: bounds the memory.")
    ] = 65536,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 1 << 20,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds to finish in after SIGTERM.")
    ] = 300.0,
) -> None:
    """Serve an exported model over HTTP, as OpenAI's API: chat and text completions, streaming.

    It needs no torch. SIGTERM finishes the answers that were asked for, then ends the process.
    """
    for module in ("starlette", "uvicorn", "onnxruntime"):
        if importlib.util.find_spec(module) is None:
            raise RewriterError(f"{module} is not installed", "pip install 'rewriter[serve]'")
    from rewriter.serve.server import serve as run

    run(
        folder,
        host,
        port,
        name=name,
        threads=threads,
        concurrency=concurrency,
        queue=queue,
        length=length,
        held=held,
        max_body=max_body,
        grace=grace,
    )
