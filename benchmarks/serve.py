"""`rewriter serve` under load: `python -m benchmarks.serve [FOLDER] [--clients 64] [--seconds 60]`.

Many clients on loopback stream greedy answers for a minute while others send broken, oversized
and slow requests; then more come at once than the queue takes; then SIGTERM falls in the middle of
as many answers. Every token is compared with what the model says when it runs alone. Without
FOLDER, SmolLM2-135M is exported first. Writes benchmarks/results/serve.json.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewriter.runtime import OnnxModel

ASSETS = Path.home() / ".cache/rewriter/assets"
RESULT = Path(__file__).parent / "results" / "serve.json"
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
VERSIONS = ("onnxruntime", "starlette", "uvicorn", "h11", "tokenizers", "numpy")


def prompts(count: int = 16) -> list[str]:
    """Beginnings of sentences, of many lengths."""
    text = (ASSETS / "austen/pride_and_prejudice.txt").read_text()[20000:].split()
    return [" ".join(text[100 * i : 100 * i + 4 + 3 * i]) for i in range(count)]


@dataclass
class Load:
    """What the clients saw."""

    port: int
    want: list[tuple[str, list[int]]]
    done: Counter[int] = field(default_factory=Counter)  # answers of each client
    tokens: int = 0
    first: list[float] = field(default_factory=list)  # seconds to the first token
    failures: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)

    async def send(self, body: bytes, head: str = "") -> tuple[int, Any, Any, Any]:
        """Status, headers' text, reader and writer after the head of the answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = head or f"{HEAD}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        about = (await reader.readuntil(b"\r\n\r\n")).decode()
        return int(about.split()[1]), about, reader, writer

    async def ask(self, index: int) -> tuple[int, list[int]]:
        """Stream one answer; its status and tokens. Raises if it ends without [DONE]."""
        text, want = self.want[index]
        body = {"model": "model", "prompt": text, "max_tokens": len(want), "temperature": 0}
        body |= {"stream": True, "return_token_ids": True}
        start = time.perf_counter()
        status, about, reader, writer = await self.send(json.dumps(body).encode())
        tokens: list[int] = []
        ended = False
        async for line in reader:
            if line.startswith(b"data: {"):
                new = json.loads(line[6:])["choices"][0].get("token_ids", [])
                if new and not tokens:
                    self.first.append(time.perf_counter() - start)
                tokens += new
            ended |= line.strip() == b"data: [DONE]"
        writer.close()
        if status == 429:
            assert "retry-after" in about.lower()
        elif status != 200 or not ended:
            raise RuntimeError(f"status {status}, ended {ended}, {len(tokens)} tokens")
        return status, tokens

    async def client(self, number: int, until: float) -> None:
        turn = number
        while time.monotonic() < until:
            index = turn % len(self.want)
            turn += 1
            try:
                _, tokens = await self.ask(index)
                if tokens != self.want[index][1]:
                    self.failures.append(f"prompt {index}: other tokens")
                self.tokens += len(tokens)
                self.done[number] += 1
            except (OSError, RuntimeError, asyncio.IncompleteReadError) as error:
                self.failures.append(f"client {number}: {error!r}")

    async def abuse(self, until: float) -> None:
        """Broken, oversized and slow requests, over and over; each must be refused."""
        bodies = {"malformed": b'{"model": ', "oversized": b"x" * (3 << 20), "wrong": b"{}"}
        while time.monotonic() < until:
            for name, body in bodies.items():
                status, _, _, writer = await self.send(body)
                writer.close()
                self.refused[f"{name}: {status}"] += 1
            await asyncio.sleep(0.5)

    async def slow(self, until: float) -> None:
        """A head, and a body, of which one byte comes in a second."""
        heads = {"slow head": HEAD, "slow body": HEAD + "Content-Length: 99\r\n\r\n"}
        while time.monotonic() < until:
            for name, head in heads.items():
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.write(head.encode())
                ending = asyncio.create_task(reader.read(1000))
                while not ending.done():
                    writer.write(b"a" if name == "slow head" else b" ")
                    await asyncio.sleep(1)
                got = ending.result()
                self.refused[f"{name}: {got.split()[1].decode() if got else 'closed'}"] += 1
                writer.close()


async def under_load(load: Load, pid: int, clients: int, seconds: float) -> dict[str, Any]:
    """The minute, and the answers that it ends in; memory is sampled every second."""
    memory: list[float] = []
    over = asyncio.Event()
    until = time.monotonic() + seconds

    async def watch() -> None:
        while not over.is_set():
            memory.append(resident(pid))
            await asyncio.sleep(1)

    async def all_clients() -> float:
        await asyncio.gather(*(load.client(i, until) for i in range(clients)))
        over.set()
        return time.perf_counter() - start

    start = time.perf_counter()
    took, *_ = await asyncio.gather(
        all_clients(), load.abuse(until), load.slow(until), watch()
    )  # the slow ones may end later
    return {
        "clients": clients,
        "seconds": round(took, 1),
        "answers": sum(load.done.values()),
        "answers_of_a_client": [min(load.done[i] for i in range(clients)), max(load.done.values())],
        "failed": len(load.failures),
        "failures": load.failures[:5],
        "tokens_per_second": round(load.tokens / took, 1),
        "first_token_s": [round(q, 2) for q in quantiles(load.first)],
        "refused": dict(sorted(load.refused.items())),
        "memory_mb": [round(m) for m in memory[:: max(1, len(memory) // 12)]],
    }


async def burst(load: Load, count: int) -> dict[str, int]:
    """More at once than are taken: each gets its tokens, or 429 at once."""
    made = await asyncio.gather(*(load.ask(i % len(load.want)) for i in range(count)))
    right = [t == load.want[i % len(load.want)][1] for i, (s, t) in enumerate(made) if s == 200]
    return {"sent": count, "answered": sum(right), "429": sum(s == 429 for s, _ in made)}


async def stopping(load: Load, process: subprocess.Popen[str], count: int) -> dict[str, Any]:
    """SIGTERM while `count` answers are being written."""
    asked = [asyncio.create_task(load.ask(i % len(load.want))) for i in range(count)]
    before = len(load.first)
    while len(load.first) < before + 1:
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    process.terminate()
    start = time.perf_counter()
    made = await asyncio.gather(*asked)
    right = sum(t == load.want[i % len(load.want)][1] for i, (_, t) in enumerate(made))
    code = await asyncio.to_thread(process.wait, 60)
    took = round(time.perf_counter() - start, 2)
    return {"in_flight": count, "finished": right, "exit_code": code, "seconds": took}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def resident(pid: int) -> float:
    """MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def quantiles(values: list[float]) -> tuple[float, float]:
    """Median and 99th percentile."""
    return statistics.median(values), sorted(values)[int(0.99 * (len(values) - 1))]


def expected(folder: Path, new: int) -> list[tuple[str, list[int]]]:
    """Each prompt, and its tokens when the model runs alone."""
    from rewriter.serve.text import Text

    model, text = OnnxModel(folder), Text(folder)
    want = []
    for prompt in prompts():
        ids = text.encode(prompt)
        made = model.generate([ids], max_new_tokens=new)[0, len(ids) :]
        want.append((prompt, made.tolist()))
    return want


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--new", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder
        if folder is None:
            import rewriter

            made = rewriter.rewrite(str(ASSETS / "smollm2"), {"steps": []})
            folder = Path(temporary) / "out"
            rewriter.export(made, folder, to="onnx", logits="last")
        want = expected(folder, given.new)
        command = [sys.executable, "-c", "from rewriter.cli import main; main()", "serve"]
        command += [str(folder), "--port", "0", "--name", "model"]
        command += ["--threads", str(given.threads)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            line = process.stdout.readline()  # type: ignore[union-attr]
            load = Load(int(line.rsplit(":", 1)[1].split("/")[0]), want)
            found: dict[str, Any] = {"model": given.folder and given.folder.name or "SmolLM2-135M"}
            found["load"] = asyncio.run(under_load(load, process.pid, given.clients, given.seconds))
            print(json.dumps(found, indent=2), flush=True)
            found["burst"] = asyncio.run(burst(load, 4 * given.clients))
            found["memory_after_burst_mb"] = round(resident(process.pid))
            found["sigterm"] = asyncio.run(stopping(load, process, given.clients))
        finally:
            process.kill()
    found["machine"] = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": given.threads,
        "python": platform.python_version(),
    }
    found["versions"] = {name: importlib.metadata.version(name) for name in VERSIONS}
    print(json.dumps({k: found[k] for k in ("burst", "sigterm", "machine")}, indent=2))
    RESULT.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
