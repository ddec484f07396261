"""An exported encoder-decoder: encode once, then decode token by token."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np

from rewriter.errors import RewriterError
from rewriter.runtime.encoder import OnnxEncoder
from rewriter.runtime.model import Array, OnnxModel, Sequence
from rewriter.runtime.sampling import Sampler

HIDDEN = "encoder_last_hidden_state"


class OnnxSeq2Seq(OnnxModel):
    """A folder of `rewriter.export` of an encoder-decoder (Whisper, T5, BART).

    Args: as of `OnnxModel`. Raises RewriterError: as it, or the folder holds no encoder.
    """

    prefix = "decoder_"

    def __init__(
        self,
        folder: str | Path,
        providers: list[Any] | None = None,
        threads: int | None = None,
        options: Any = None,
    ) -> None:
        super().__init__(folder, providers, threads, options)
        self.encoder = OnnxEncoder(folder, providers, threads, options, self.about["encoder"])
        self.memory: dict[str, Array] = {}

    def encode(self, **inputs: Any) -> dict[str, Array]:
        """What the decoder reads of the inputs: cross-attention keys, values and their mask."""
        made = self.encoder(**inputs)
        made.pop(HIDDEN)
        return made

    def start(self, batch: int = 1, expected: int = 0) -> Sequence:
        """As of `OnnxModel`, over the memory of this model (`with_memory`)."""
        if not self.memory:
            raise RewriterError("nothing has been encoded", "call generate or with_memory first")
        sequence = super().start(batch, expected)
        for name, value in self.memory.items():
            if name in self.names:
                sequence.binding.bind_cpu_input(name, np.ascontiguousarray(value))
        return sequence

    def with_memory(self, memory: dict[str, Array]) -> OnnxSeq2Seq:
        """The same model that decodes from what `encode` returned; sessions are shared."""
        made = copy.copy(self)
        made.memory = memory
        return made

    def generate(  # type: ignore[override]
        self,
        inputs: dict[str, Any],
        decoder_input_ids: Any = None,
        *,
        max_new_tokens: int = 128,
        sampler: Any = None,
        **options: Any,
    ) -> Array:
        """Tokens with the prompt before them, int64 [B, L + new].

        Args:
            inputs: of the encoder, by name: {"input_features": [B, 80, 3000]}.
            decoder_input_ids: [B, L], the prompt; the start token by default.
            max_new_tokens, options: as of `OnnxModel.generate`.
            sampler: greedy by default. Tokens that generation_config.json suppresses, always or
                at the beginning, are not drawn.
        """
        memory = self.encode(**inputs)
        batch = len(next(iter(memory.values())))
        if decoder_input_ids is None:
            start = self.defaults.get("decoder_start_token_id")
            if start is None:
                raise RewriterError("the folder names no start token", "give decoder_input_ids")
            decoder_input_ids = np.full((batch, 1), start, dtype=np.int64)
        draw: Any = Suppress(sampler or Sampler(), self.defaults)
        return super(OnnxSeq2Seq, self.with_memory(memory)).generate(
            decoder_input_ids, max_new_tokens=max_new_tokens, sampler=draw, **options
        )


class Suppress:
    """A sampler that never draws `suppress_tokens`, nor `begin_suppress_tokens` first."""

    def __init__(self, sampler: Any, defaults: dict[str, Any]) -> None:
        self.sampler = sampler
        self.always = list(defaults.get("suppress_tokens") or [])
        self.now = self.always + list(defaults.get("begin_suppress_tokens") or [])

    def __call__(self, logits: Array) -> Array:
        if self.now:
            logits = logits.copy()
            logits[:, self.now] = -np.inf
        self.now = self.always
        return self.sampler(logits)
