"""The model in one thread: every answer has states of its own, and they take turns.

A turn is one chunk of a prompt or one new token, so that a long prompt holds nobody up and
all answers go on at the same pace. Results are those of an answer that runs alone.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rewriter.runtime import OnnxModel, Sampler
from rewriter.serve.text import Writer

#: Columns that an answer's caches have room for at first, beyond the prompt; they grow.
ROOM = 512


class QueueFull(Exception):
    """As many answers wait already as may."""


class Stopping(Exception):
    """The engine takes nothing new."""


@dataclass
class Piece:
    """What a turn made: text (it may be '') and tokens, and how the answer ended, if it did.

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
        """Nobody waits for it any more; it leaves at its next turn."""
        self.cancelled = True

    def turn(self, model: OnnxModel, chunk: int) -> Piece | None:
        """Run the model once; None while there is prompt left."""
        if self.sequence is None:
            self.sequence = model.start(1, len(self.prompt) + min(self.max_tokens, ROOM))
        if self.read < len(self.prompt):
            tokens = self.prompt[self.read : self.read + chunk]
            self.read += len(tokens)
        else:
            tokens = self.made[-1:]
        logits = self.sequence([tokens])
        if self.read < len(self.prompt):
            return None
        token = int(self.sampler(logits[:, -1])[0])
        self.made.append(token)
        ended = token in self.ends
        text = "" if ended else self.writer.push(token)
        finish = "stop" if ended or self.writer.stopped else None
        if finish is None and len(self.made) == self.max_tokens:
            finish = "length"
        return Piece(text + (self.writer.finish() if finish else ""), [token], finish)


class Engine:
    """Runs jobs until `stop`.

    Args:
        model: of the runtime.
        concurrency: answers that take turns at most. queue: answers that may wait for a place.
        held: tokens of all running answers at most, which bounds the memory of their caches.
        chunk: tokens of a prompt in one turn.
    """

    def __init__(
        self, model: OnnxModel, concurrency: int, queue: int, held: int, chunk: int
    ) -> None:
        self.model, self.concurrency, self.queue = model, concurrency, queue
        self.held, self.chunk = held, chunk
        self.waiting: deque[Job] = deque()
        self.turns: deque[Job] = deque()
        self.running: list[Job] = []
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

    def _admit(self) -> None:
        held = sum(job.size for job in self.running)
        while self.waiting and len(self.running) < self.concurrency:
            held += self.waiting[0].size
            if held > self.held and self.running:
                return
            job = self.waiting.popleft()
            self.running.append(job)
            self.turns.append(job)

    def _next(self) -> Job | None:
        with self.changed:
            while not self.turns:
                self._admit()
                if not self.turns:
                    if self.stopping:
                        return None
                    self.changed.wait()
            return self.turns.popleft()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            piece = Piece(finish="gone") if job.cancelled else self._turn(job)
            with self.changed:
                if piece is None or piece.finish is None:
                    self.turns.append(job)
                else:
                    job.sequence = None
                    self.running.remove(job)
                    self._admit()
            if piece is not None:
                job.tell(piece)

    def _turn(self, job: Job) -> Piece | None:
        try:
            return job.turn(self.model, self.chunk)
        except Exception:  # one answer's trouble is not the others'
            print(traceback.format_exc(), file=sys.stderr, end="", flush=True)
            return Piece(finish="error")
