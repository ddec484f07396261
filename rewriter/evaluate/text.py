"""Which text is trained on and which is held out, and windows of tokens from it.

`python tools/assets.py austen brown wikipedia` installs the texts. Held out are *Pride and
Prejudice*, Brown cr01 ... cr09 and every tenth Wikipedia article; the rest is for training.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewriter.calibration import SAMPLE, read_text
from rewriter.errors import RewriterError
from rewriter.evaluate.prompts import prefix

BOOK = "pride_and_prejudice"

#: Where reading starts, as a fraction of the characters: models know famous openings by heart.
SKIP = 1 / 3


@dataclass(frozen=True)
class Split:
    """Files to train on, and held-out files by the name of their text; empty if not installed."""

    train: list[Path]
    held_out: dict[str, list[Path]]


def split(folder: str | Path | None = None) -> Split:
    """The installed texts, divided; `folder` is where tools/assets.py puts its assets."""
    root = Path(
        folder or os.environ.get("REWRITER_ASSETS") or Path.home() / ".cache/rewriter/assets"
    )
    austen = sorted((root / "austen").glob("*.txt"))
    brown = sorted((root / "brown").glob("*.txt"))
    wikipedia = sorted((root / "wikipedia").glob("*.txt"))
    held_out = {
        BOOK: [p for p in austen if p.stem == BOOK],
        "brown": [p for p in brown if p.stem.startswith("cr")],
        "wikipedia": wikipedia[::10],
    }
    kept = {p for paths in held_out.values() for p in paths}
    train = [p for p in (*austen, *brown, *wikipedia) if p not in kept]
    return Split(train, {name: paths for name, paths in held_out.items() if paths})


def held_out_texts(data: Any = None) -> dict[str, str]:
    """Texts to evaluate on, by name: the user's (`data`: a path, or texts), else the held-out.

    Where nothing is installed it is the sample that ships with rewriter, named "sample".

    Raises RewriterError: the data cannot be read.
    """
    if data is not None:
        texts, about = read_text(data)
        name = Path(about).stem if isinstance(data, (str, Path)) else "data"
        return {name: "\n\n".join(text for source in texts for text in source)}
    found = split().held_out
    if not found:
        return {"sample": SAMPLE.read_text(encoding="utf-8")}
    return {
        name: "\n\n".join(path.read_text(encoding="utf-8") for path in paths)
        for name, paths in found.items()
    }


def start_of(name: str) -> float:
    """Fraction of a text to skip: a third of a book, nothing of a collection."""
    return 0.0 if name in ("brown", "wikipedia") else SKIP


def windows(tokenizer: Any, text: str, length: int, count: int, skip: float = 0.0) -> Tensor:
    """At most `count` windows of tokens, one after the other: [N, length].

    Each begins with the special tokens that the tokenizer puts before a text. A text that is
    too short after the skipped fraction is read from its beginning.

    Raises RewriterError: the text does not fill one window.
    """
    before = prefix(tokenizer)
    room = length - len(before)
    for start in dict.fromkeys((int(len(text) * skip), 0)):
        ids = _tokens(tokenizer, text[start:], room * count)
        full = min(count, len(ids) // room)
        if full:
            rows = torch.tensor(ids[: full * room]).view(full, room)
            return torch.cat([torch.tensor(before, dtype=torch.long).expand(full, -1), rows], 1)
    raise RewriterError(
        f"the text has only {len(ids)} tokens, and a window needs {room}", "give more text"
    )


def _tokens(tokenizer: Any, text: str, wanted: int) -> list[int]:
    """The first `wanted` tokens of a text, or all it has; reads no more than it must."""
    size = 8 * wanted
    while True:
        part = text[:size]
        ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        # The cut may have changed the last tokens.
        if len(part) == len(text) or len(ids) >= wanted + 16:
            return ids[:wanted]
        size *= 2
