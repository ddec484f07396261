"""An exported graph without states: one call, arrays in and arrays out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rewriter.errors import RewriterError
from rewriter.runtime.model import Array, _read, _session

#: What an input is if it is not given, in the shape of the main one.
DEFAULTS = {"attention_mask": 1, "token_type_ids": 0}


class OnnxEncoder:
    """A folder of `rewriter.export` of an encoder: MiniLM, DINOv2, the encoder of Whisper.

    Args: folder, providers, threads, options: as of `OnnxModel`. about: the entry of export.json
        that describes the file, if it is not export.json itself.

    Raises RewriterError: as `OnnxModel`.
    """

    def __init__(
        self,
        folder: str | Path,
        providers: list[Any] | None = None,
        threads: int | None = None,
        options: Any = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        folder = Path(folder)
        self.about = about or _read(
            folder / "export.json", "give a folder that rewriter.export has written"
        )
        if self.about.get("states"):
            raise RewriterError(f"{folder} holds a model with states", "use OnnxModel")
        self.session = _session(folder / self.about["file"], providers, threads, options)
        self.names = [i.name for i in self.session.get_inputs()]

    def __call__(self, **inputs: Any) -> dict[str, Array]:
        """Outputs by name, of inputs by name; attention_mask (all real) and token_type_ids (0)
        may be left out. Raises RewriterError: an input is missing or not known."""
        given = {n: np.asarray(v) for n, v in inputs.items() if v is not None}
        first = given.get(self.names[0])
        for name in self.names:
            if name not in given and name in DEFAULTS and first is not None:
                given[name] = np.full(first.shape[:2], DEFAULTS[name], dtype=np.int64)
        if set(given) != set(self.names):
            raise RewriterError(
                f"the model takes {', '.join(self.names)}, given were {', '.join(inputs)}",
                "give arrays by these names",
            )
        return dict(zip(self.about["outputs"], self.session.run(None, given), strict=True))
