"""`rewriter serve`: right tokens, refusals, limits, stopping."""

from __future__ import annotations

import json
import queue
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import SLOW, Server, Tiny, server, tiny

from rewriter.cli import run
from rewriter.runtime import Batch, OnnxModel, Sampler
from rewriter.serve.engine import Engine, Job
from rewriter.serve.text import Text, Writer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SAY = [{"role": "user", "content": "Over the hills and far away"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Attention in one layer, a recurrent mixer in the other."""
    return tiny(tmp_path_factory.mktemp("serve"), [{"pass": "mamba2", "layers": [1]}])


@pytest.fixture(scope="module")
def served(model: Tiny) -> Any:
    with server(model.folder, "--max-body", "5000") as made:
        yield made


@pytest.fixture(scope="module")
def slow(model: Tiny) -> Any:
    """A slow model, one place and one in the queue, and little patience."""
    patience = (
        "from rewriter.serve import app, server; app.BODY_SECONDS = server.HEAD_SECONDS = 0.5"
    )
    with server(model.folder, "--concurrency", "1", "--queue", "1", before=SLOW + patience) as made:
        yield made


def ask(**options: Any) -> dict[str, Any]:
    return {"model": "tiny", "temperature": 0, "return_token_ids": True, **options}


# ---- answers ---------------------------------------------------------------------------------


def test_tokens_are_those_of_the_torch_model(model: Tiny, served: Server) -> None:
    """Chats of several lengths, all at the same time; streamed and not; longer than a
    chunk of the prompt too."""
    words = "The quick brown fox jumps over the lazy dog again and again ".split()
    chats = [[{"role": "user", "content": " ".join(words[:n])}] for n in range(1, 10)]
    prompts = [
        model.tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"]
        for c in chats
    ]
    want = [model.greedy(prompt, 40) for prompt in prompts]

    def whole(chat: Any) -> Any:
        return served.post(CHAT, ask(messages=chat, max_tokens=40))[2]

    def streamed(chat: Any) -> Any:
        options = {"stream_options": {"include_usage": True}}
        return list(served.stream(CHAT, ask(messages=chat, max_completion_tokens=40, **options)))

    with ThreadPoolExecutor(18) as pool:
        answers, streams = pool.map(whole, chats), pool.map(streamed, chats)
        for prompt, tokens, answer, events in zip(prompts, want, answers, streams, strict=True):
            choice = answer["choices"][0]
            text = model.tokenizer.decode(tokens, skip_special_tokens=True)
            assert choice["token_ids"] == tokens
            assert choice["message"] == {"role": "assistant", "content": text}
            assert choice["finish_reason"] == ("stop" if tokens[-1] == 2 else "length")
            usage = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)}
            assert answer["usage"] == usage | {"total_tokens": len(prompt) + len(tokens)}
            deltas = [e["choices"][0] for e in events[:-1]]
            assert [t for d in deltas for t in d.get("token_ids", [])] == tokens
            assert "".join(d["delta"].get("content", "") for d in deltas) == text
            assert deltas[-1]["finish_reason"] == choice["finish_reason"]
            assert events[-1]["choices"] == [] and events[-1]["usage"] == answer["usage"]


@pytest.mark.parametrize("together", [True, False], ids=["one_batch", "one_by_one"])
def test_answers_are_written_together(
    model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """Prompts and answers of many lengths, two that are given up, and one that fails. A window
    with sinks keeps tokens by columns of padding: its answers are run one by one."""
    if not together:
        window = {"pass": "sliding_window", "window": 8, "sinks": 2, "policy": "warn"}
        model = tiny(tmp_path, [window])
    runtime = OnnxModel(model.folder, threads=1)
    text, calls = Text(model.folder), []
    step = Batch.__call__
    monkeypatch.setattr(Batch, "__call__", lambda b, t: (calls.append(len(t)), step(b, t))[1])
    random = torch.Generator().manual_seed(0)
    asked = [(3, 40), (70, 12), (9, 25), (40, 30), (2, 1), (30, 60), (5, 60), (6, 60), (7, 60)]
    jobs, told = [], []
    for length, count in asked:
        prompt = torch.randint(5, 320, (length,), generator=random).tolist()
        pieces: Any = queue.Queue()
        writer = Writer(text, [])
        job = Job(prompt, count, Sampler(), writer, frozenset([2]), pieces.put)
        jobs.append(job)
        told.append(pieces)
    jobs[6].sampler = jobs[7].sampler = lambda logits: (time.sleep(0.005), Sampler()(logits))[1]
    jobs[8].sampler = lambda logits: Sampler()(logits) if len(jobs[8].made) < 5 else 1 / 0
    engine = Engine(runtime, 8, 8, 4096, 16)
    assert engine.together == together
    for job in jobs:
        engine.submit(job)
    told[6].get(timeout=60)  # it is being written
    jobs[6].cancel(), jobs[7].cancel()
    engine.stop()
    for row, (job, pieces) in enumerate(zip(jobs, told, strict=True)):
        got = [pieces.get_nowait() for _ in range(pieces.qsize())]
        if row >= 6:
            assert got[-1].finish == ("error" if row == 8 else "gone")
            continue
        want = model.greedy(job.prompt, job.max_tokens)
        assert [t for piece in got for t in piece.tokens] == want
        assert [piece.finish for piece in got if piece.finish] == [
            "stop" if want[-1] == 2 else "length"
        ]
    assert not engine.running and not engine.writing
    assert (max(calls, default=0) > 3) == together


def test_a_batch_that_fails_ends_its_answers_and_no_others(
    model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, text = OnnxModel(model.folder, threads=1), Text(model.folder)
    step = Batch.__call__

    def broken(batch: Batch, tokens: Any) -> Any:
        if batch.columns > 256 and max(batch.lengths) > 12:
            raise MemoryError("no room")
        return step(batch, tokens)

    monkeypatch.setattr(Batch, "__call__", broken)
    engine = Engine(runtime, 8, 8, 4096, 16)
    told = []
    for count in (20, 400, 25, 500):  # two of 256 columns, two of 512
        pieces: Any = queue.Queue()
        job = Job([5, 6, 7], count, Sampler(), Writer(text, []), frozenset(), pieces.put)
        engine.submit(job)
        told.append(pieces)
    engine.stop()
    got = [[pieces.get_nowait() for _ in range(pieces.qsize())] for pieces in told]
    assert [pieces[-1].finish for pieces in got] == ["length", "error", "length", "error"]
    assert sum(len(piece.tokens) for piece in got[0]) == 20
    assert not engine.running and not engine.writing and not engine.thread.is_alive()


def test_completions_take_text_or_tokens(model: Tiny, served: Server) -> None:
    text = "Once upon a time " * 8
    tokens = model.tokenizer(text)["input_ids"]
    want = model.greedy(tokens, 12)
    for prompt in (text, [text], tokens, [tokens]):
        made = served.post(TEXT, ask(prompt=prompt, max_tokens=12))[2]["choices"][0]
        assert made["token_ids"] == want
    events = [e["choices"][0] for e in served.stream(TEXT, ask(prompt=text, max_tokens=12))]
    assert "".join(e["text"] for e in events) == made["text"]


def test_sampling_and_stop_strings(model: Tiny, served: Server) -> None:
    body = ask(messages=SAY, max_tokens=40, temperature=1.5, seed=7)
    first, again, other = (
        served.post(CHAT, body | {"seed": seed})[2]["choices"][0]["token_ids"]
        for seed in (7, 7, -8)
    )
    assert first == again != other
    nearly = served.post(CHAT, body | {"top_p": 1e-6})[2]["choices"][0]["token_ids"]
    text = served.post(CHAT, ask(messages=SAY, max_tokens=40))[2]["choices"][0]
    assert nearly == text["token_ids"]
    whole = text["message"]["content"]
    stop = whole[10:13]
    cut = whole[: whole.index(stop)]
    made = served.post(CHAT, ask(messages=SAY, max_tokens=40, stop=["never", stop]))[2]
    assert made["choices"][0]["message"]["content"] == cut
    assert made["choices"][0]["finish_reason"] == "stop"
    events = served.stream(CHAT, ask(messages=SAY, max_tokens=40, stop=stop))
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == cut


def test_text_is_written_when_it_is_whole(model: Tiny) -> None:
    """No half characters, no beginning of a stop string, and nothing lost at the end."""
    text = Text(model.folder)
    said = "naïve 日本 🙂 end of all"
    tokens = text.encode(said)
    writer = Writer(text, ["all of it", "🙂 ends"])
    pieces = [writer.push(t) for t in tokens]
    assert "\ufffd" not in "".join(pieces) and "all" not in "".join(pieces)
    assert "".join(pieces) + writer.finish() == said
    half = Writer(text, [])
    assert (
        "".join(map(half.push, tokens[: tokens.index(text.encode("🙂")[0]) + 1])) == "naïve 日本 "
    )
    assert half.finish() == "\ufffd"


# ---- refusals --------------------------------------------------------------------------------

REFUSED: dict[str, tuple[int, str, Any, dict[str, str], str]] = {
    "no JSON": (400, CHAT, b'{"model": ', {}, "no JSON"),
    "nested": (400, CHAT, b"[" * 4000, {}, "no JSON"),
    "a list": (400, CHAT, [], {}, "JSON object"),
    "no messages": (400, CHAT, ask(), {}, "messages"),
    "role": (400, CHAT, ask(messages=[{"role": "robot", "content": "x"}]), {}, "no such role"),
    "picture": (
        *(400, CHAT, ask(messages=[{"role": "user", "content": [{"type": "image_url"}]}])),
        *({}, "image_url"),
    ),
    "model": (404, CHAT, ask(messages=SAY) | {"model": "gpt"}, {}, "this server has 'tiny'"),
    "temperature": (400, CHAT, ask(messages=SAY) | {"temperature": 3}, {}, "temperature"),
    "not a number": (400, CHAT, b'{"model":"tiny","prompt":"x","temperature":NaN}', {}, "number"),
    "no tokens": (400, CHAT, ask(messages=SAY, max_tokens=0), {}, "max_tokens"),
    "n": (400, CHAT, ask(messages=SAY, n=2), {}, "n is not supported"),
    "tools": (400, CHAT, ask(messages=SAY, tools=[{}]), {}, "tools"),
    "empty": (400, TEXT, ask(prompt=""), {}, "empty"),
    "token ids": (400, TEXT, ask(prompt=[5, 320]), {}, "token ids"),
    "surrogate": (400, TEXT, b'{"model":"tiny","prompt":"\\ud800"}', {}, "Unicode"),
    "too long": (400, TEXT, ask(prompt=[5] * 250, max_tokens=7), {}, "256"),
    "oversized": (413, TEXT, ask(prompt="x" * 5000), {}, "5000 bytes"),
    "form": (415, TEXT, b"{}", {"Content-Type": "text/plain"}, "application/json"),
    "method": (405, TEXT, None, {}, "Method Not Allowed"),
    "path": (404, "/v1/embeddings", {}, {}, "Not Found"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(served: Server, name: str) -> None:
    """OpenAI's error object, and the server goes on."""
    status, path, body, headers, message = REFUSED[name]
    sent = served.send("GET", path) if body is None else served.post(path, body, **headers)
    assert sent[0] == status, sent
    assert set(sent[2]["error"]) == {"message", "type", "param", "code"}
    assert message in sent[2]["error"]["message"]


def test_other_hosts_and_broken_http(served: Server) -> None:
    """A name that was made to point here is refused; so is what is no HTTP, or has no end."""
    with socket.create_connection(("127.0.0.1", served.port)) as raw:
        raw.sendall(b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n")
        assert raw.recv(1000).startswith(b"HTTP/1.1 400")
    for junk in (b"\x16\x03\x01\x00 hello\r\n\r\n", b"GET / HTTP/1.1\r\nA: " + b"x" * 100_000):
        with socket.create_connection(("127.0.0.1", served.port)) as raw:
            raw.sendall(junk)
            assert raw.recv(1000).startswith(b"HTTP/1.1 400")
    assert served.get("/v1/models")["data"][0]["id"] == "tiny"
    assert served.get("/v1/models/tiny")["object"] == "model"


def test_slow_requests_are_ended_and_others_go_on(slow: Server) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    body = head + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    started = time.monotonic()
    with (
        socket.create_connection(("127.0.0.1", slow.port), 10) as half_head,
        socket.create_connection(("127.0.0.1", slow.port), 10) as half_body,
    ):
        half_head.sendall(head)
        half_body.sendall(body)
        made = slow.post(TEXT, ask(prompt="x", max_tokens=3))
        assert made[0] == 200
        assert half_head.recv(1000) == b""
        assert half_body.recv(1000).startswith(b"HTTP/1.1 408")
    assert time.monotonic() - started < 5


def test_a_full_queue_answers_429_and_a_client_that_leaves_makes_room(slow: Server) -> None:
    long = ask(prompt="x", max_tokens=200, temperature=2, stop=["\x00"])
    first = slow.stream(TEXT, long)
    next(first)
    second = slow.connect()
    slow_json = {"Content-Type": "application/json"}
    second.request("POST", TEXT, json.dumps(long).encode(), slow_json)
    for _ in range(100):
        if slow.get("/health")["waiting"]:
            break
        time.sleep(0.02)
    status, headers, body = slow.post(TEXT, ask(prompt="x", max_tokens=3))
    assert status == 429 and int(headers["Retry-After"]) >= 1
    assert body["error"]["code"] == "queue_full"
    second.close()
    first.close()
    slow.until(running=0)
    assert slow.post(TEXT, ask(prompt="x", max_tokens=3))[0] == 200


# ---- start and stop --------------------------------------------------------------------------


def test_sigterm_finishes_what_runs(model: Tiny) -> None:
    """A running and a waiting answer come whole; nobody else gets in; torch was never loaded."""
    with server(model.folder, "--concurrency", "1", before=SLOW) as one:
        free = ask(prompt=[5, 6, 7], max_tokens=30)
        want = model.greedy([5, 6, 7], 30)
        with ThreadPoolExecutor(2) as pool:
            running = one.stream(TEXT, free)
            events = [next(running)]
            waiting = pool.submit(one.post, TEXT, free)
            for _ in range(100):
                if one.get("/health")["waiting"]:
                    break
                time.sleep(0.01)
            ended = pool.submit(one.end)
            time.sleep(0.2)
            with pytest.raises(ConnectionRefusedError):
                one.get("/health")
            events += running
        assert [t for e in events for t in e["choices"][0].get("token_ids", [])] == want
        assert waiting.result()[2]["choices"][0]["token_ids"] == want
        assert ended.result() == ["ended 0 []"]
        assert one.process.returncode == 0


def test_mistakes_at_the_start(model: Tiny, tmp_path: Path, capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = {
            "is not an exported model": ["serve", str(tmp_path)],
            f"cannot listen on 127.0.0.1 port {port}: Address already in use": [
                *("serve", str(model.folder), "--port", port)
            ],
            "has no tokenizer.json": ["serve", str(tmp_path / "bare"), "--port", "0"],
        }
        (tmp_path / "bare").mkdir()
        for file in model.folder.glob("*"):
            if "tokenizer" not in file.name:
                (tmp_path / "bare" / file.name).symlink_to(file)
        for message, arguments in cases.items():
            assert run(arguments) == 2
            assert message in capsys.readouterr().err
