"""The configuration of a rewritten model."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig


class RewriterConfig(PretrainedConfig):
    """Configuration of a rewritten model: the original's inside, and the recovery state.

    autocast: type that matrices were made narrower to after the capture, if they were.
    """

    model_type = "rewriter"

    def __init__(
        self,
        original: dict[str, Any] | None = None,
        recovery: str = "exact",
        autocast: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.autocast = autocast
        self.original = original or {}
        self.recovery = recovery
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")
        for key in (*sizes, "max_source_positions", "max_target_positions"):  # the last: Whisper
            if key in self.original:
                kwargs.setdefault(key, self.original[key])
        if self.original.get("is_encoder_decoder"):
            kwargs.setdefault("is_encoder_decoder", True)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            if self.original.get(key) is not None:
                kwargs.setdefault(key, self.original[key])
        super().__init__(**kwargs)


AutoConfig.register("rewriter", RewriterConfig)
