"""Tokens that the loss is measured on, and the GGUF file that a model came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewriter.backends.onnx.quantize.grids import Array
from rewriter.backends.onnx.quantize.loss import LENGTH
from rewriter.errors import RewriterError


def text(model: Any, data: Any) -> Callable[[], tuple[Array, str]] | None:
    """Makes ids [1, up to LENGTH] and says what they are; None if the model predicts no text.

    data: as for `rewrite`; None: the sample that ships with rewriter.
    """
    if not model.can_generate() or "input_ids" not in model.graph.inputs:
        return None

    def tokens() -> tuple[Array, str]:
        from rewriter.calibration import token_batches
        from rewriter.rewrite import _tokenizer

        graph = model.graph
        places = [str(model.companions[0].parent)] if model.companions else []
        places.append(_origin(model))
        tokenizer = next(filter(None, map(_tokenizer, places)), None)
        limit = getattr(graph.config.get_text_config(), "max_position_embeddings", None) or LENGTH
        batches, about = token_batches(graph, tokenizer, data, 1, min(LENGTH, limit), 0)
        ids = batches[0][graph.inputs.index("input_ids")]
        return ids[:, :limit].numpy(), about["source"]

    return tokens


def gguf_source(model: Any, source: str | Path | None) -> Path:
    """The file of `weights="source"`: the one named, or the one the model was read from.

    Raises RewriterError: there is none.
    """
    path = Path(source if source is not None else _origin(model))
    if path.suffix != ".gguf" or not path.is_file():
        raise RewriterError(
            f"weights='source' needs the GGUF file of the model; '{path}' is none",
            "name it: source='model.gguf', or use weights='int8'",
        )
    return path


def _origin(model: Any) -> str:
    return str(model.lock.get("original", {}).get("source", ""))
