"""The model in one thread: prompts take turns in chunks, answers are written together.

A round is a chunk of prompts, and then one token of every answer that is being written: those
with caches of about one size are rows of one batch, which reads the weights once for all. So a
long prompt holds nobody up, and all answers go on at the same pace. Models whose states cannot be
put together are run answer by answer.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rewriter.runtime import Batch, OnnxModel, Sampler
from rewriter.serve.text import Writer

#: Columns of the smallest batch; the others have twice as many each.
COLUMNS = 256


class QueueFull(Exception):
    """As many answers wait already as may."""


class Stopping(Exception):
    """The engine takes nothing new."""


@dataclass
class Piece:
    """What a round made: text (it may be '') and tokens, and how the answer ended, if it did.

    finish: "stop" (the model's end of text, or a stop string), "length", "error" or "gone".
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None


@dataclass
class Job:
    """One answer.

    prompt: token ids, at least one. max_tokens: at most so many new ones. tell: is called in the
    engine's thread with each piece.
    """

    prompt: list[int]
    max_tokens: int
    sampler: Sampler
    writer: Writer
    ends: frozenset[int]
    tell: Callable[[Piece], None]
    cancelled: bool = False
    sequence: Any = None
    read: int = 0  # tokens of the prompt that the model has seen
    made: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Tokens that its caches may come to hold."""
        return len(self.prompt) + self.max_tokens

    def cancel(self) -> None:
        """Nobody waits for it any more; it leaves in the next round."""
        self.cancelled = True

    def prefill(self, model: OnnxModel, chunk: int) -> Piece | None:
        """Read `chunk` tokens of the prompt; the first new one after the last of it, else None."""
        if self.sequence is None:
            self.sequence = model.start(1, len(self.prompt))
        tokens = self.prompt[self.read : self.read + chunk]
        self.read += len(tokens)
        logits = self.sequence([tokens])
        return self.take(logits[:, -1]) if self.read == len(self.prompt) else None

    def take(self, logits: Any) -> Piece:
        """The next token, of logits [1, V]."""
        token = int(self.sampler(logits)[0])
        self.made.append(token)
        ended = token in self.ends
        text = "" if ended else self.writer.push(token)
        finish = "stop" if ended or self.writer.stopped else None
        if finish is None and len(self.made) == self.max_tokens:
            finish = "length"
        return Piece(text + (self.writer.finish() if finish else ""), [token], finish)


class _Alone:
    """A batch of one answer, for models whose rows cannot be put together."""

    def __init__(self) -> None:
        self.sequence: Any = None

    def join(self, sequence: Any) -> None:
        self.sequence = sequence

    def leave(self, row: int) -> None:
        self.sequence = None

    def __call__(self, tokens: list[int]) -> Any:
        return self.sequence([tokens])[:, -1]


class Engine:
    """Runs jobs until `stop`.

    Args:
        model: of the runtime.
        concurrency: answers that are written at the same time. queue: answers that may wait.
        held: tokens of all running answers at most, which bounds the memory of their caches (an
            answer counts as the columns of its batch; buffers are up to twice as large).
        chunk: tokens of prompts in one round.
    """

    def __init__(
        self, model: OnnxModel, concurrency: int, queue: int, held: int, chunk: int
    ) -> None:
        self.model, self.concurrency, self.queue = model, concurrency, queue
        self.held, self.chunk = held, chunk
        self.together = Batch.refuses(model) is None
        self.waiting: deque[Job] = deque()
        self.reading: deque[Job] = deque()  # their prompts
        self.running: list[Job] = []  # admitted: reading or writing
        #: Answers being written, in the order of their batch's rows, by columns (or by answer).
        self.writing: dict[int, tuple[Batch | _Alone, list[Job]]] = {}
        self.stopping = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="model", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Raises QueueFull or Stopping."""
        with self.changed:
            if self.stopping:
                raise Stopping
            self.waiting = deque(j for j in self.waiting if not j.cancelled)
            self.waiting.append(job)
            self._admit()
            if len(self.waiting) > self.queue:
                self.waiting.pop()
                raise QueueFull
            self.changed.notify()

    def stop(self) -> None:
        """Finish what runs and waits, then end the thread."""
        with self.changed:
            self.stopping = True
            self.changed.notify()
        self.thread.join()

    def columns(self, job: Job) -> int:
        """Tokens that its row has room for."""
        if not self.together:
            return job.size
        columns = COLUMNS
        while columns < job.size:
            columns *= 2
        return max(job.size, min(columns, self.held))

    def _admit(self) -> None:
        held = sum(self.columns(job) for job in self.running)
        while self.waiting and len(self.running) < self.concurrency:
            held += self.columns(self.waiting[0])
            if held > self.held and self.running:
                return
            job = self.waiting.popleft()
            self.running.append(job)
            self.reading.append(job)

    def _wait(self) -> bool:
        """Until there is something to do; False when there will be nothing any more."""
        with self.changed:
            while True:
                self._admit()
                if self.running:
                    return True
                if self.stopping:
                    return False
                self.changed.wait()

    def _work(self) -> None:
        while self._wait():
            self._read()
            for key in list(self.writing):
                self._write(key)

    def _read(self) -> None:
        """`chunk` tokens of prompts: of several short ones, or of the next of those in turn."""
        room = self.chunk
        while room > 0:
            with self.changed:
                if not self.reading:
                    return
                job = self.reading.popleft()
            before = job.read
            self._prefill(job, room)
            room -= max(1, job.read - before)

    def _prefill(self, job: Job, room: int) -> None:
        try:
            piece = None if job.cancelled else job.prefill(self.model, room)
            if job.cancelled:
                piece = Piece(finish="gone")
            elif piece is not None and piece.finish is None:
                self._join(job)
        except Exception:  # one answer's trouble is not the others'
            piece = _failed()
        if piece is None:
            with self.changed:
                self.reading.append(job)
        else:
            self._tell(job, piece)

    def _join(self, job: Job) -> None:
        columns = self.columns(job)
        key = columns if self.together else id(job)
        if key not in self.writing:
            self.writing[key] = (Batch(self.model, columns) if self.together else _Alone(), [])
        batch, jobs = self.writing[key]
        batch.join(job.sequence)
        jobs.append(job)
        if self.together:
            job.sequence = None

    def _write(self, key: int) -> None:
        """One token of every answer of a batch; a batch that fails ends its answers alone."""
        jobs = self.writing[key][1]
        try:
            self._step(key)
        except Exception:
            piece = _failed()
            self.writing.pop(key, None)
            for job in jobs:
                self._tell(job, piece)

    def _step(self, key: int) -> None:
        batch, jobs = self.writing[key]
        for row in reversed(range(len(jobs))):
            if jobs[row].cancelled:
                self._tell(self._leave(key, row), Piece(finish="gone"))
        if not jobs:
            return
        logits = batch([job.made[-1] for job in jobs])
        ended = []
        for row, job in enumerate(jobs):
            try:
                piece = job.take(logits[row : row + 1])
            except Exception:  # a sampler's or a writer's: the other rows go on
                piece = _failed()
            if piece.finish is not None:
                ended.append((row, piece))
            else:
                job.tell(piece)
        for row, piece in reversed(ended):
            self._tell(self._leave(key, row), piece)

    def _leave(self, key: int, row: int) -> Job:
        """Take an answer out of its batch, and forget a batch without answers."""
        batch, jobs = self.writing[key]
        batch.leave(row)
        job, last = jobs[row], jobs.pop()
        if job is not last:
            jobs[row] = last
        if not jobs:
            del self.writing[key]
        return job

    def _tell(self, job: Job, piece: Piece) -> None:
        """A piece, and if it is the last one make room for another answer."""
        if piece.finish is not None:
            job.sequence = None
            with self.changed:
                self.running.remove(job)
                self._admit()
        job.tell(piece)


def _failed() -> Piece:
    print(traceback.format_exc(), file=sys.stderr, end="", flush=True)
    return Piece(finish="error")
