"""The ASGI application: /v1/models, /v1/chat/completions, /v1/completions, /health."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rewriter.errors import RewriterError
from rewriter.runtime import Sampler
from rewriter.serve.engine import Engine, Job, Piece, QueueFull, Stopping
from rewriter.serve.protocol import Asked, ChatRequest, CompletionRequest, RequestError, parse
from rewriter.serve.text import Text, Writer

#: Bytes of an oversized body that are read and thrown away, so that the client sees the answer.
LINGER = 64 << 20
#: Seconds for a whole body to come, and for a client to take what it is sent.
BODY_SECONDS = 30.0
WRITE_SECONDS = 60.0


@dataclass
class Service:
    """What the endpoints share.

    name: of the model, for clients. length: tokens of prompt and answer at most. default_tokens:
    of an answer whose request says nothing. max_body: bytes.
    """

    engine: Engine
    text: Text
    name: str
    length: int
    ends: frozenset[int]
    default_tokens: int = 512
    max_body: int = 1 << 20


def application(service: Service, hosts: list[str] | None = None) -> Starlette:
    """hosts: names under which alone it answers (against rebinding of DNS); None: any."""
    started = int(time.time())

    async def models(request: Request) -> Response:
        one = {"id": service.name, "object": "model", "created": started, "owned_by": "rewriter"}
        return JSONResponse({"object": "list", "data": [one]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != service.name:
            raise RequestError(404, "there is no such model", param="model", code="model_not_found")
        one = {"id": service.name, "object": "model", "created": started, "owned_by": "rewriter"}
        return JSONResponse(one)

    async def health(request: Request) -> Response:
        engine = service.engine
        ok = engine.thread.is_alive()
        state = {"status": "ok" if ok else "the model's thread has ended"}
        counts = {"running": len(engine.running), "waiting": len(engine.waiting)}
        return JSONResponse(state | counts, 200 if ok else 503)

    async def chat(request: Request) -> Response:
        asked = parse(ChatRequest, await read_json(request, service), service.name)
        messages = [m.plain() for m in asked.messages]
        tokens = await encode(service.text.chat, messages, param="messages")
        return await Answer(service, asked, tokens, chat=True).response(request)

    async def completion(request: Request) -> Response:
        asked = parse(CompletionRequest, await read_json(request, service), service.name)
        prompt = asked.one()
        if isinstance(prompt, str):
            tokens = await encode(service.text.encode, prompt, param="prompt")
        else:
            tokens = prompt
            size = service.text.tokenizer.get_vocab_size()
            if any(not 0 <= t < size for t in tokens):
                raise RequestError(400, f"token ids are 0 to {size - 1}", param="prompt")
        return await Answer(service, asked, tokens, chat=False).response(request)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.engine.stop)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completion, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)] if hosts else [],
        exception_handlers={
            RequestError: _told,
            HTTPException: _told_by_starlette,
            ClientDisconnect: lambda request, error: Response(status_code=499),
            Exception: _broken,
        },
        lifespan=lifespan,
    )


# ---- requests --------------------------------------------------------------------------------


async def read_json(request: Request, service: Service) -> Any:
    """The body. Raises RequestError: 408, 413, 415, or 400 where it is no JSON."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # a web page cannot send this one without asking first
        raise RequestError(415, "send Content-Type: application/json")
    limit, seen, parts = service.max_body, 0, []
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                seen += len(part)
                if seen <= limit:
                    parts.append(part)
                elif seen > limit + LINGER:
                    break
    except TimeoutError:
        raise RequestError(
            408,
            f"the body did not come within {BODY_SECONDS:g} s",
            headers={"Connection": "close"},
        ) from None
    if seen > limit:
        raise RequestError(
            413,
            f"the body is larger than {limit} bytes",
            code="request_too_large",
            headers={"Connection": "close"},
        )
    try:
        return json.loads(b"".join(parts))
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is no JSON: {error}") from None


async def encode(function: Any, given: Any, param: str) -> list[int]:
    """Tokens, made in a thread of their own: a long text takes a while."""
    try:
        return await run_in_threadpool(function, given)
    except RewriterError as error:
        raise RequestError(400, error.cause, param=param) from None
    except (UnicodeEncodeError, TypeError):
        raise RequestError(400, "the text is no valid Unicode", param=param) from None


# ---- answers ---------------------------------------------------------------------------------


class Answer:
    """One request on its way through the engine."""

    def __init__(self, service: Service, asked: Asked, prompt: list[int], chat: bool) -> None:
        self.service, self.asked, self.prompt, self.chat = service, asked, prompt, chat
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        room = service.length - len(prompt)
        if not prompt:
            raise RequestError(400, "the prompt is empty", param="prompt")
        if room < max(1, asked.limit or 1):
            raise RequestError(
                400,
                f"{len(prompt)} tokens of prompt and {asked.limit or 1} of answer are more than "
                f"the {service.length} that this server takes",
                param="messages" if chat else "prompt",
                code="context_length_exceeded",
            )
        self.max_tokens = asked.limit or min(room, service.default_tokens)

    async def response(self, request: Request) -> Response:
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(piece: Piece) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        asked = self.asked
        job = Job(
            self.prompt,
            self.max_tokens,
            Sampler(
                1.0 if asked.temperature is None else asked.temperature,
                top_p=1.0 if asked.top_p is None else asked.top_p,
                seed=None if asked.seed is None else asked.seed % 2**63,
            ),
            Writer(self.service.text, asked.stops),
            self.service.ends,
            tell,
        )
        try:
            self.service.engine.submit(job)
        except QueueFull:
            raise RequestError(
                429,
                "the server has as many requests as it takes; try again",
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": "1"},
            ) from None
        except Stopping:
            raise RequestError(503, "the server is stopping", kind="server_error") from None
        made = _until_end(job, pieces, request)
        if asked.stream:
            return _Events(self._events(made))
        return JSONResponse(await self._whole(made))

    async def _whole(self, made: AsyncIterator[Piece]) -> dict[str, Any]:
        text, tokens, finish = [], [], ""
        async for piece in made:
            text.append(piece.text)
            tokens += piece.tokens
            finish = piece.finish or finish
        if finish == "error":
            raise RequestError(500, "the model failed", kind="server_error")
        written: dict[str, Any] = (
            {"message": {"role": "assistant", "content": "".join(text)}}
            if self.chat
            else {"text": "".join(text)}
        )
        choice = {"index": 0, **written, "logprobs": None, "finish_reason": finish}
        if self.asked.return_token_ids:
            choice["token_ids"] = tokens
        kind = "chat.completion" if self.chat else "text_completion"
        return self._object(kind, [choice]) | {"usage": self._usage(len(tokens))}

    async def _events(self, made: AsyncGenerator[Piece]) -> AsyncGenerator[str]:
        count = 0
        async with aclosing(made):
            if self.chat:
                yield self._event({"delta": {"role": "assistant", "content": ""}}, None)
            async for piece in made:
                count += len(piece.tokens)
                if piece.finish == "error":
                    error = RequestError(500, "the model failed", kind="server_error").error
                    yield f"data: {json.dumps({'error': error})}\n\n"
                    return
                more = {"token_ids": piece.tokens} if self.asked.return_token_ids else {}
                if piece.text or more:
                    text = piece.text
                    written = {"delta": {"content": text}} if self.chat else {"text": text}
                    yield self._event({**written, **more}, None)
                if piece.finish:
                    yield self._event({"delta": {}} if self.chat else {"text": ""}, piece.finish)
        options = self.asked.stream_options
        if options and options.include_usage:
            last = self._object(self._chunk, []) | {"usage": self._usage(count)}
            yield f"data: {json.dumps(last)}\n\n"
        yield "data: [DONE]\n\n"

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _event(self, written: dict[str, Any], finish: str | None) -> str:
        choice = {"index": 0, **written, "logprobs": None, "finish_reason": finish}
        return f"data: {json.dumps(self._object(self._chunk, [choice]))}\n\n"

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        about = {"id": self.id, "object": kind, "created": self.created}
        return {**about, "model": self.service.name, "choices": choices}

    def _usage(self, made: int) -> dict[str, int]:
        read = len(self.prompt)
        return {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
        }


async def _until_end(
    job: Job, pieces: asyncio.Queue[Piece], request: Request
) -> AsyncGenerator[Piece]:
    """Pieces up to the last one. Raises ClientDisconnect; the job is cancelled if it is left."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        pieces.put_nowait(Piece(finish="gone"))

    watching = asyncio.create_task(watch())
    try:
        while True:
            piece = await pieces.get()
            if piece.finish == "gone":
                raise ClientDisconnect
            yield piece
            if piece.finish:
                return
    finally:
        watching.cancel()
        job.cancel()


class _Events(Response):
    """Server-sent events, each sent at once."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncGenerator[str]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.lines = lines

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        with suppress(ClientDisconnect, TimeoutError):
            async with aclosing(self.lines) as lines:
                await send(start)
                async for line in lines:
                    part = {"type": "http.response.body", "body": line.encode(), "more_body": True}
                    async with asyncio.timeout(WRITE_SECONDS):
                        await send(part)
            await send({"type": "http.response.body", "body": b""})


# ---- errors ----------------------------------------------------------------------------------


def _told(request: Request, error: Any) -> Response:
    return JSONResponse({"error": error.error}, error.status, headers=error.headers)


def _told_by_starlette(request: Request, error: Any) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = RequestError(error.status_code, message).error
    return JSONResponse({"error": body}, error.status_code, headers=error.headers)


def _broken(request: Request, error: Exception) -> Response:
    body = RequestError(500, "internal error", kind="server_error").error
    return JSONResponse({"error": body}, 500)
