"""Listening: one process, one event loop, one thread for the model."""

from __future__ import annotations

import ipaddress
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from rewriter.errors import RewriterError
from rewriter.runtime import OnnxModel
from rewriter.serve.app import Service, application
from rewriter.serve.engine import Engine
from rewriter.serve.text import Text

#: Connections at most, idle ones too; a further one is answered 503.
CONNECTIONS = 512
#: Seconds for the head of a request, and for the next one on a connection that stays open.
HEAD_SECONDS = 10.0
IDLE_SECONDS = 30.0


class Protocol(H11Protocol):
    """uvicorn's, which by itself waits for ever for the head of a request."""

    timer: Any = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait(HEAD_SECONDS)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._wait(None)

    def on_response_complete(self) -> None:
        self._wait(IDLE_SECONDS + HEAD_SECONDS)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait(None)
        super().connection_lost(exc)

    def _wait(self, seconds: float | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.timer = None
        if seconds is not None:
            self.timer = self.loop.call_later(seconds, self.timeout_keep_alive_handler)


def serve(
    folder: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    name: str | None = None,
    threads: int | None = None,
    concurrency: int = 64,
    queue: int = 64,
    length: int | None = None,
    held: int = 65536,
    chunk: int = 256,
    max_body: int = 1 << 20,
    grace: float = 300.0,
) -> None:
    """Serve an exported folder until SIGTERM or SIGINT; what was accepted before is finished.

    Args:
        folder: of `rewriter.export(..., to="onnx")`, or of `rewriter apply --export onnx`.
        host, port: where to listen; port 0: any free one.
        name: of the model, for clients; the folder's by default.
        threads: of one operator; None: as many as there are cores.
        concurrency: answers that are written at the same time. queue: answers that wait.
        length: tokens of prompt and answer at most; by default, and at most, what the model knows.
        held: tokens of all answers that are being written, which bounds their caches.
        chunk: tokens of prompts between two tokens of the answers.
        max_body: bytes of a request. grace: seconds to finish in, after SIGTERM.

    Raises RewriterError: not such a folder, or the address cannot be had.
    """
    folder = exported(folder)
    listening = listen(host, port)
    try:
        model = OnnxModel(folder, threads=threads)
        text = Text(folder)
    except BaseException:
        listening.close()
        raise
    length = min(n for n in (length, _length(model.defaults), held) if n)
    ends = model.defaults.get("eos_token_id")
    engine = Engine(model, concurrency, queue, held, chunk)
    service = Service(
        engine,
        text,
        name or _name(folder),
        length,
        frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends),
        max_body=max_body,
    )
    loopback = _loopback(host)
    hosts = ["localhost", "127.0.0.1", "::1", "[::1]", host] if loopback else None
    app = application(service, hosts)
    where = listening.getsockname()
    shown = f"[{where[0]}]" if ":" in where[0] else where[0]
    _announce(app, f"serving {service.name} on http://{shown}:{where[1]}/v1")
    if not loopback:
        print(f"anyone who reaches {shown} can use this server", file=sys.stderr, flush=True)
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=max(CONNECTIONS, 2 * (concurrency + queue)),
        timeout_keep_alive=int(IDLE_SECONDS),
        timeout_graceful_shutdown=int(grace),
    )
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it anew when all is done
    uvicorn.Server(config).run(sockets=[listening])


def exported(folder: Path) -> Path:
    """The folder with export.json: the given one, or `onnx` in it. Raises RewriterError."""
    for found in (folder, folder / "onnx"):
        if (found / "export.json").is_file():
            return found
    raise RewriterError(
        f"'{folder}' is not an exported model",
        "give a folder that rewriter.export(..., to='onnx') or 'rewriter apply --export onnx' made",
    )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises RewriterError: the address is taken, or is none."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(2048)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise RewriterError(
            f"cannot listen on {host} port {port}: {why}", "give another --host or --port"
        ) from error
    return made


def _announce(app: Starlette, line: str) -> None:
    """Print a line once the server answers."""
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[Any]:
        async with inner(app) as state:
            print(line, flush=True)
            yield state

    app.router.lifespan_context = lifespan


def _length(config: dict[str, Any]) -> int | None:
    """Positions that the model knows."""
    original = config.get("original", config)
    text = {**config, **original, **(original.get("text_config") or {})}
    return text.get("max_position_embeddings") or text.get("n_positions")


def _name(folder: Path) -> str:
    folder = folder.resolve()
    return folder.parent.name if folder.name == "onnx" else folder.name


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
