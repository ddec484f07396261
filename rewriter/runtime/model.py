"""An exported folder that generates."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rewriter.errors import RewriterError
from rewriter.runtime.sampling import Sampler
from rewriter.runtime.states import States

Array = np.ndarray[Any, Any]
INPUTS = ("input_ids", "attention_mask", "position_ids")


class OnnxModel:
    """A folder of `rewriter.export(..., to="onnx")` in ONNX Runtime; no torch is needed.

    Args:
        folder: with model.onnx and export.json.
        providers: execution providers in order of preference, by name or (name, options).
        threads: of one operator; None: as many as there are cores.
        options: an onnxruntime.SessionOptions in place of ours.

    Raises RewriterError: a file is missing, the file cannot be loaded, or a provider that was
    asked for did not load (ONNX Runtime itself would go on without it).
    """

    prefix = ""  # of the names of tokens, mask and positions

    def __init__(
        self,
        folder: str | Path,
        providers: list[Any] | None = None,
        threads: int | None = None,
        options: Any = None,
    ) -> None:
        if importlib.util.find_spec("onnxruntime") is None:
            raise RewriterError("onnxruntime is not installed", "pip install onnxruntime")
        self.folder = folder = Path(folder)
        self.about = _read(folder / "export.json", "give a folder that rewriter.export has written")
        config = _read(folder / "config.json") if (folder / "config.json").exists() else {}
        path = folder / "generation_config.json"
        self.defaults = {**config, **(_read(path) if path.exists() else {})}
        self.session = _session(folder / self.about["file"], providers, threads, options)
        self.names = [i.name for i in self.session.get_inputs()]
        held = {s["input"] for s in self.about["states"]}
        held |= {self.prefix + n for n in INPUTS}
        held |= set(self.about.get("encoder", {}).get("outputs", ()))
        unknown = [n for n in self.names if n not in held]
        if unknown:
            raise RewriterError(
                f"the model needs {', '.join(unknown)}, which is not text",
                "use rewriter.runtime.OnnxEncoder, or OnnxSeq2Seq if it has a decoder",
            )

    # ---- one sequence ------------------------------------------------------------------------

    def start(self, batch: int = 1, expected: int = 0) -> Sequence:
        """A batch of sequences that have not begun; `expected`: how long they may become."""
        return Sequence(self, batch, expected)

    def feed(self, binding: Any, *given: Array) -> None:
        """Bind tokens, mask and positions, int64, as far as the model reads them."""
        for name, value in zip(INPUTS, given, strict=True):
            if (full := self.prefix + name) in self.names:
                binding.bind_cpu_input(full, np.ascontiguousarray(value))

    def logits(self, input_ids: Any, attention_mask: Any = None) -> Array:
        """Logits [B, L, V] (or [B, 1, V]) of whole sequences [B, L]."""
        tokens = _rows(input_ids)
        return self.start(len(tokens), tokens.shape[1])(tokens, attention_mask)

    # ---- generation --------------------------------------------------------------------------

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int = 128,
        sampler: Sampler | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        chunk: int | None = None,
    ) -> Array:
        """Prompts and what follows them, int64 [B, L + new].

        Args:
            input_ids: [B, L], padded on the left. attention_mask: [B, L], 0 at padding.
            max_new_tokens: at most; fewer when every row has ended.
            sampler: greedy by default.
            eos_token_id: end of a row, one or several; the folder's own by default.
            pad_token_id: fills rows that have ended; the folder's own, or the first eos.
            chunk: tokens of the prompt in one call, to bound memory; all by default.
        """
        made = self.stream(
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            chunk=chunk,
        )
        columns = [row[:, None] for row in made]
        return np.concatenate([_rows(input_ids), *columns], axis=1)

    def stream(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int = 128,
        sampler: Sampler | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        chunk: int | None = None,
    ) -> Iterator[Array]:
        """The new token of each row, int64 [B], as soon as it is known; see `generate`."""
        tokens, sampler = _rows(input_ids), sampler or Sampler()
        if max_new_tokens < 1 or not tokens.size:
            raise RewriterError(
                f"{max_new_tokens} new tokens after a prompt of {tokens.shape[1]}",
                "give a prompt of at least one token and max_new_tokens >= 1",
            )
        ends = self.defaults.get("eos_token_id") if eos_token_id is None else eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        pad = self.defaults.get("pad_token_id") if pad_token_id is None else pad_token_id
        pad = (ends[0] if ends else 0) if pad is None else pad
        batch, length = tokens.shape
        return self._stream(
            self.start(batch, length + max_new_tokens),
            tokens,
            attention_mask,
            max_new_tokens,
            sampler,
            ends,
            pad,
            chunk or length,
        )

    def _stream(
        self,
        sequence: Sequence,
        tokens: Array,
        mask: Any,
        count: int,
        sampler: Sampler,
        ends: list[int],
        pad: int,
        chunk: int,
    ) -> Iterator[Array]:
        mask = np.ones_like(tokens) if mask is None else _rows(mask)
        for at in range(0, tokens.shape[1], chunk):
            logits = sequence(tokens[:, at : at + chunk], mask[:, at : at + chunk])
        ended = np.zeros(len(tokens), dtype=bool)
        for step in range(count):
            token = np.where(ended, pad, sampler(logits[:, -1]))
            yield token
            ended |= np.isin(token, ends)
            if ended.all() or step == count - 1:
                return
            logits = sequence(token[:, None])


class Sequence:
    """A batch of sequences: each call appends tokens and returns their logits."""

    def __init__(self, model: OnnxModel, batch: int, expected: int) -> None:
        self.model, self.expected = model, expected
        self.binding = model.session.io_binding()
        device = "cuda" if model.session.get_providers()[0].startswith("CUDA") else "cpu"
        self.states = States(self.binding, model.about["states"], batch, device)
        self.mask = np.ones((batch, max(expected, 1)), dtype=np.int64)
        self.length = 0
        self.seen = np.zeros((batch, 1), dtype=np.int64)  # real tokens of each row

    def __call__(self, tokens: Any, mask: Any = None) -> Array:
        """tokens: [B, L]; mask: [B, L], 0 at padding. Returns float logits [B, L or 1, V]."""
        tokens = _rows(tokens)
        new = np.ones_like(tokens) if mask is None else _rows(mask)
        if new.shape != tokens.shape or len(tokens) != len(self.mask):
            raise RewriterError(
                f"tokens {tokens.shape} and mask {new.shape} for a batch of {len(self.mask)}",
                "give both as [batch, new tokens]",
            )
        total = self.length + tokens.shape[1]
        if total > self.mask.shape[1]:
            more = max(total, 2 * self.mask.shape[1]) - self.mask.shape[1]
            self.mask = np.pad(self.mask, ((0, 0), (0, more)), constant_values=1)
        self.mask[:, self.length : total] = new
        ranks = self.seen + new.cumsum(1)
        positions = np.maximum(ranks - 1, 0)
        self.model.feed(self.binding, tokens, self.mask[:, :total], positions)
        self.states.prepare(total, self.expected)
        first = self.model.about["outputs"][0]
        for name in self.model.about["outputs"]:
            if not name.startswith("present_"):
                self.states.bind(name, device="cpu")
        self.model.session.run_with_iobinding(self.binding)
        logits = self.states.outputs()[first].numpy()
        self.states.advance()
        self.length, self.seen = total, ranks[:, -1:]
        return logits


def _rows(values: Any) -> Array:
    """int64 [B, L] from an array, a tensor or lists."""
    array = np.asarray(values)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.dtype.kind not in "iub":
        raise RewriterError(
            f"token ids of shape {array.shape} and type {array.dtype}", "give integers [batch, L]"
        )
    return np.ascontiguousarray(array, dtype=np.int64)


def _read(path: Path, fix: str = "export it again") -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RewriterError(f"cannot read {path}: {error}", fix) from error


def _session(file: Path, providers: list[Any] | None, threads: int | None, options: Any) -> Any:
    import onnxruntime

    if options is None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
    asked = providers or ["CPUExecutionProvider"]
    names = [p if isinstance(p, str) else p[0] for p in asked]
    known = onnxruntime.get_available_providers()
    if missing := [n for n in names if n not in known]:
        raise RewriterError(
            f"this onnxruntime has no {', '.join(missing)}",
            f"it has {', '.join(known)}; onnxruntime-gpu has CUDA",
        )
    if not file.is_file():
        raise RewriterError(f"{file} is missing", "export it again")
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=asked)
    except Exception as error:  # its exception types are not public
        raise RewriterError(f"ONNX Runtime cannot load {file}: {error}") from error
    if missing := [n for n in names if n not in session.get_providers()]:
        raise RewriterError(
            f"{', '.join(missing)} did not load", "see ONNX Runtime's message above for a library"
        )
    return session
