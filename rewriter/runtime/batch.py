"""Sequences of different lengths that take each step together, while rows come and go."""

from __future__ import annotations

from typing import Any

import numpy as np

from rewriter.errors import RewriterError
from rewriter.runtime.model import Array, OnnxModel, Sequence


class Batch:
    """Decoding of many answers at once: one call of the model gives every row its next logits.

    A row joins with the states of a sequence of its own (its prompt, read alone) and leaves when
    it has ended; the last row then takes its place. Buffers hold up to twice the rows that are in.
    Logits are those of the sequence alone, up to the rounding of products of other sizes.

    Args:
        model: one for which `refuses` is None. columns: tokens that a row may come to hold.

    Raises RewriterError: the model's states cannot be put together.
    """

    def __init__(self, model: OnnxModel, columns: int) -> None:
        if reason := self.refuses(model):
            raise RewriterError(reason, "decode each sequence by itself")
        self.model, self.columns, self.rows = model, columns, 0
        self.lengths: list[int] = []
        self.specs = model.about["states"]
        self.now = {s["input"]: self._buffer(s, 0) for s in self.specs}
        self.spare = {s["input"]: self._buffer(s, 0) for s in self.specs if not s["shared"]}
        self.binding: Any = None

    @staticmethod
    def refuses(model: OnnxModel) -> str | None:
        """Why rows of this model cannot be put together, or None."""
        if "encoder" in model.about:
            return "every row of an encoder-decoder reads a memory of its own"
        if not model.session.get_providers()[0].startswith("CPU"):
            return "rows are put together in the memory of the CPU"
        for spec in model.about["states"]:
            if spec["grows"] is not None and not spec["shared"]:
                return f"{spec['input']} keeps a column for padding"
            if spec["aligned"]:
                return f"where {spec['input']} keeps a token depends on the padding before it"
        return None

    def __len__(self) -> int:
        return len(self.lengths)

    def join(self, sequence: Sequence) -> None:
        """Copy a sequence of one row in, as the last one.

        Raises RewriterError: it has several rows, or holds more than `columns`.
        """
        length = int(sequence.seen[0, 0])
        if len(sequence.seen) != 1 or length > self.columns:
            raise RewriterError(
                f"{len(sequence.seen)} rows of {length} tokens", f"at most one of {self.columns}"
            )
        if len(self) == self.rows:
            self._resize(max(1, 2 * self.rows))
        row = len(self)
        self.lengths.append(length)
        for spec in self.specs:
            state = sequence.states.values[spec["input"]].numpy()
            self._part(spec, self.now[spec["input"]], row, length)[...] = self._part(
                spec, state, 0, length
            )
        self.binding = None

    def leave(self, row: int) -> None:
        """Forget a row; the last one is then `row`."""
        last, length = len(self) - 1, self.lengths[-1]
        if row != last:
            for spec in self.specs:
                held = self.now[spec["input"]]
                self._part(spec, held, row, length)[...] = self._part(spec, held, last, length)
            self.lengths[row] = length
        self.lengths.pop()
        if 4 * len(self) <= self.rows:
            self._resize(self.rows // 2)
        self.binding = None

    def __call__(self, tokens: Any) -> Array:
        """The next token of each row, [rows]. Returns the logits after it, [rows, V].

        Raises RewriterError: not one token a row, or a row is full.
        """
        tokens = np.asarray(tokens, dtype=np.int64)
        if tokens.shape != (len(self),) or max(self.lengths, default=0) >= self.columns:
            raise RewriterError(
                f"tokens {tokens.shape} for rows of {self.lengths} tokens",
                f"give one token a row, of at most {self.columns} in all",
            )
        lengths = np.array(self.lengths)
        total = int(lengths.max()) + 1
        mask = (np.arange(total) >= total - 1 - lengths[:, None]).astype(np.int64)
        if self.binding is None:
            self._bind()
        self.model.feed(self.binding, tokens[:, None], mask, lengths[:, None])
        self.model.session.run_with_iobinding(self.binding)
        logits = self.binding.get_outputs()[0].numpy()
        self.lengths = [n + 1 for n in self.lengths]
        for name, spare in self.spare.items():
            self.now[name], self.spare[name] = spare, self.now[name]
        if self.spare:
            self.binding = None
        return logits[:, -1]

    # ---- buffers -----------------------------------------------------------------------------

    def _bind(self) -> None:
        import onnxruntime

        value = onnxruntime.OrtValue.ortvalue_from_numpy  # of an array's own memory
        self.binding = self.model.session.io_binding()
        first, *others = (n for n in self.model.about["outputs"] if not n.startswith("present_"))
        for name in (first, *others):
            self.binding.bind_output(name, "cpu")
        for spec in self.specs:
            name = spec["input"]
            past = value(self.now[name][: len(self)])
            new = past if spec["shared"] else value(self.spare[name][: len(self)])
            self.binding.bind_ortvalue_input(name, past)
            self.binding.bind_ortvalue_output(spec["output"], new)

    def _buffer(self, spec: dict[str, Any], rows: int) -> Array:
        shape = [rows, *spec["shape"]]
        if spec["grows"] is not None:
            shape[spec["grows"]] = self.columns
        return np.zeros(shape, dtype=spec["dtype"])

    @staticmethod
    def _part(spec: dict[str, Any], held: Array, row: int, length: int) -> Array:
        """What is in use of a row's state, a view [1, …]."""
        part: tuple[slice, ...] = (slice(row, row + 1),)
        if spec["grows"] is not None:
            part += (slice(None),) * (spec["grows"] - 1) + (slice(length),)
        return held[part]

    def _resize(self, rows: int) -> None:
        for spec in self.specs:
            name = spec["input"]
            old, self.now[name] = self.now[name], self._buffer(spec, rows)
            for row, length in enumerate(self.lengths):
                kept = self._part(spec, old, row, length)
                self._part(spec, self.now[name], row, length)[...] = kept
            if name in self.spare:
                self.spare[name] = self._buffer(spec, rows)
        self.rows = rows
