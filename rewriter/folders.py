"""Output folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rewriter.errors import RewriterError


@contextmanager
def whole_folder(target: str | Path, replace: bool = False) -> Iterator[Path]:
    """An empty folder to write in, which becomes `target` at the end, or nothing on failure.

    It lies beside the target as `.NAME.PID.part`; what a killed run left there is removed. With
    `replace` a folder that is there already is exchanged for the new one in one step.

    Raises RewriterError: the target holds something already, or cannot be made.
    """
    target = Path(target).absolute()
    taken = target.exists() and not (target.is_dir() and (replace or _empty(target)))
    if target.is_symlink() or taken:
        raise RewriterError(f"{target} exists already", "give a new folder")
    made = [p for p in target.parents if not p.exists()]
    aside = target.parent / f".{target.name}.{os.getpid()}.part"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        aside.mkdir()
    except OSError as error:
        _remove(made)
        raise RewriterError(
            f"cannot write to {target.parent}: {error.strerror}", "name a folder elsewhere"
        ) from error
    try:
        yield aside
        _open_to_umask(aside)
        if target.exists() and not _empty(target):
            _exchange(aside, target)
            shutil.rmtree(aside, ignore_errors=True)
            return
        if target.exists():
            target.rmdir()
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        _remove(made)
        raise


def _exchange(left: Path, right: Path) -> None:
    """Swap two folders; in one step where the system can (Linux), else in three."""
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "renameat2"):
        here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if library.renameat2(here, os.fsencode(left), here, os.fsencode(right), swap) == 0:
            return
    between = right.with_name(f".{right.name}.{os.getpid()}.old")
    right.rename(between)
    left.rename(right)
    between.rename(left)


def _empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _sweep(target: Path) -> None:
    """Remove what runs that are no more left beside the target."""
    for old in target.parent.glob(f".{target.name}.*.part"):
        pid = old.name.split(".")[-2]
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            shutil.rmtree(old, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _open_to_umask(folder: Path) -> None:
    """safetensors makes files that only their owner may read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
