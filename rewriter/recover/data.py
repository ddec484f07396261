"""Text to training items: files, folders, token files and data sets, tokenised and packed.

An item is `{"input_ids": [rows, length]}`. Which items are long is a fixed pattern, and the item
of an index depends on nothing but the seed: a resumed run and every process see the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from rewriter.calibration import read_text
from rewriter.errors import RewriterError

#: Files that `datasets` reads, by suffix.
TABLES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
ENDLESS = 2**31 - 1


@dataclass(frozen=True)
class Pattern:
    """Sizes of the items of a run: short ones, and long ones for a share of the tokens."""

    length: int
    rows: int = 1
    long: int = 0
    long_share: float = 0.0

    @property
    def long_rows(self) -> int:
        return max(1, self.rows * self.length // self.long) if self.long else 0

    @property
    def long_items(self) -> float:
        """Share of the items that are long, for `long_share` of the tokens."""
        if not self.long or not self.long_share or self.long <= self.length:
            return 0.0
        short, long = self.rows * self.length, self.long_rows * self.long
        return self.long_share * short / (long - self.long_share * (long - short))

    def long_before(self, items: int) -> int:
        return int(items * self.long_items + 1e-9)

    def is_long(self, index: int) -> bool:
        return self.long_before(index + 1) > self.long_before(index)

    def tokens(self, items: int) -> int:
        """Tokens in the first `items` items."""
        long = self.long_before(items)
        return (items - long) * self.rows * self.length + long * self.long_rows * self.long


class Windows(Dataset):
    """Every window of a token array once an epoch, in random order, at new offsets each time."""

    def __init__(self, tokens: np.ndarray, pattern: Pattern, seed: int = 0) -> None:
        self.all, self.pattern, self.seed = tokens, pattern, seed
        need = pattern.rows * pattern.length
        if pattern.long_items:
            need = max(need, pattern.long_rows * pattern.long)
        if len(tokens) <= need:
            raise RewriterError(
                f"the text has {len(tokens):,} tokens, less than one step of {need:,}",
                "give more text, or a shorter length",
            )
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        p, long = self.pattern, self.pattern.is_long(index)
        before = p.long_before(index)
        length, rows = (p.long, p.long_rows) if long else (p.length, p.rows)
        first = (before if long else index - before) * rows
        starts = [self._start(length, first + r) for r in range(rows)]
        ids = np.stack([self.all[s : s + length] for s in starts])
        return {"input_ids": torch.from_numpy(ids.astype(np.int64))}

    def _start(self, length: int, number: int) -> int:
        """Where the `number`-th window of this length starts."""
        windows = max(1, (len(self.all) - length) // length)
        epoch, place = divmod(number, windows)
        key = (length, epoch)
        if key not in self._orders:
            random = np.random.default_rng([self.seed, length, epoch])
            shift = int(random.integers(0, min(length, len(self.all) - windows * length) + 1))
            self._orders = {k: v for k, v in self._orders.items() if k[0] != length}
            self._orders[key] = random.permutation(windows) * length + shift
        return int(self._orders[key][place])


class Stream(IterableDataset):
    """Items from an endless (repeated) stream of documents, packed without padding."""

    def __init__(self, documents: Any, tokenizer: Any, pattern: Pattern, column: str) -> None:
        self.documents, self.tokenizer = documents, tokenizer
        self.pattern, self.column = pattern, column

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        buffer: list[int] = []
        index = 0
        while True:
            found = False
            for row in self.documents:
                found = True
                buffer += _encode(self.tokenizer, [row[self.column]])[0]
                while True:
                    long = self.pattern.is_long(index)
                    p = self.pattern
                    rows, length = (p.long_rows, p.long) if long else (p.rows, p.length)
                    if len(buffer) < rows * length:
                        break
                    taken, buffer = buffer[: rows * length], buffer[rows * length :]
                    index += 1
                    yield {"input_ids": torch.tensor(taken).view(rows, length)}
            if not found:
                raise RewriterError("the data set is empty", "give text")


@dataclass
class Text:
    """Where training text comes from: one token array, or a stream of documents.

    held_out: [N, length] windows that no item contains.
    """

    source: str
    tokens: np.ndarray | None
    stream: Any
    held_out: Tensor
    tokenizer: Any
    column: str = "text"

    def items(self, pattern: Pattern, seed: int) -> Dataset:
        if self.tokens is not None:
            return Windows(self.tokens, pattern, seed)
        return Stream(self.stream, self.tokenizer, pattern, self.column)

    def sample(self, tokens: int, length: int, seed: int) -> Tensor:
        """[N, length] training windows of about `tokens` tokens, for closed-form fits."""
        rows = max(1, tokens // length)
        items = iter(self.items(Pattern(length), seed)) if self.tokens is None else None
        if items is not None:
            return torch.cat([next(items)["input_ids"] for _ in range(rows)])
        windows = Windows(self.tokens, Pattern(length), seed)  # type: ignore[arg-type]
        return torch.cat([windows[i]["input_ids"] for i in range(rows)])


def training_text(
    data: Any, tokenizer: Any, held_out: int, length: int, column: str = "text"
) -> Text:
    """Read `data` and set about `held_out` tokens aside, in windows of `length`.

    data: text files, folders, `.npy` token files, `.jsonl`/`.parquet`/`.csv` with a column
    `text`, the Hub name or object of a data set (streamed), texts, or token ids.

    Raises RewriterError: nothing there, too short, or text without a tokenizer.
    """
    windows = max(1, held_out // length)
    if isinstance(data, Tensor):
        return _split(data.flatten().numpy(), "tokens given by the caller", windows, length)
    paths = [Path(p).expanduser() for p in _listed(data)]
    if paths and all(p.suffix == ".npy" for p in paths):
        arrays = [_load_tokens(p) for p in paths]
        return _split(np.concatenate(arrays), _short(paths), windows, length)
    if tokenizer is None:
        raise RewriterError(
            "there is text but no tokenizer", "give token ids, or a model with its tokenizer"
        )
    stream, source = _stream(data, paths)
    if stream is not None:
        stream = stream.shuffle(seed=0, buffer_size=1000)
        kept = Stream(stream, tokenizer, Pattern(length), column)
        rows = iter(kept)
        held = torch.cat([next(rows)["input_ids"] for _ in range(windows)])
        rest = stream.skip(_documents_for(stream, tokenizer, column, windows * length))
        return Text(source, None, rest, held, tokenizer, column)
    sources, source = read_text(data)
    source = _short(paths) if len(paths) > 1 else source
    texts = [text for documents in sources for text in documents]
    from datasets import Dataset as Table

    table = Table.from_dict({"text": texts})
    table = table.map(
        lambda rows: {"ids": _encode(tokenizer, rows["text"])},
        batched=True,
        batch_size=16,
        remove_columns=["text"],
        keep_in_memory=True,
        desc="tokens",
    )
    ids = np.concatenate([np.asarray(r, dtype=np.int32) for r in table["ids"] if len(r)])
    return _split(ids, source, windows, length)


def _documents_for(stream: Any, tokenizer: Any, column: str, tokens: int) -> int:
    count = seen = 0
    for row in stream:
        count += 1
        seen += len(_encode(tokenizer, [row[column]])[0])
        if seen >= tokens:
            break
    return count


def _listed(data: Any) -> list[Any]:
    if isinstance(data, (str, Path)):
        return [data]
    if isinstance(data, (list, tuple)) and all(isinstance(d, (str, Path)) for d in data):
        return [d for d in data if len(str(d)) < 4096 and "\n" not in str(d)]
    return []


def _short(paths: list[Path]) -> str:
    """A few names, and how many more."""
    names = [str(p) for p in paths]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _load_tokens(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RewriterError(f"cannot read {path}: {error}", "give a 1-D array of ids") from None
    if array.dtype.kind not in "iu":
        raise RewriterError(f"{path} holds {array.dtype}, not token ids", "save integers")
    return array.reshape(-1)


def _stream(data: Any, paths: list[Path]) -> tuple[Any, str]:
    """An iterable data set of documents and its name, or None for plain text."""
    import datasets

    if isinstance(data, datasets.IterableDataset):
        return data, "a data set given by the caller"
    if isinstance(data, datasets.Dataset):
        return data.to_iterable_dataset(), "a data set given by the caller"
    kinds = {TABLES.get(p.suffix) for p in paths}
    if paths and len(kinds) == 1 and (kind := kinds.pop()) is not None:
        files = [str(p) for p in paths]
        rows = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
        return rows, _short(paths)
    one = str(data) if isinstance(data, str) else ""
    hub = one.count("/") == 1 and not one.startswith((".", "/", "~")) and not Path(one).exists()
    if hub:
        try:
            return datasets.load_dataset(one, split="train", streaming=True), one
        except Exception as error:
            raise RewriterError(f"cannot read the data set {one}: {error}", "give a path") from None
    return None, ""


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    end = getattr(tokenizer, "eos_token_id", None)
    found = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [[*ids, end] if end is not None else list(ids) for ids in found]


def _split(tokens: np.ndarray, source: str, windows: int, length: int) -> Text:
    """Cut `windows` evenly spread windows out of the tokens."""
    if len(tokens) < 4 * length:
        raise RewriterError(
            f"{source} has {len(tokens):,} tokens, too few for windows of {length}",
            "give more text",
        )
    windows = min(windows, len(tokens) // (4 * length))
    starts = np.linspace(0, len(tokens) - length, windows + 2).astype(int)[1:-1]
    held = np.stack([tokens[s : s + length] for s in starts]).astype(np.int64)
    keep = np.ones(len(tokens), dtype=bool)
    for s in starts:
        keep[s : s + length] = False
    return Text(source, np.asarray(tokens[keep]), None, torch.from_numpy(held), None)
