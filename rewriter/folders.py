"""Output folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rewriter.errors import RewriterError


@contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """An empty folder to write in, which becomes `target` at the end, or nothing on failure.

    It lies beside the target as `.NAME.PID.part`; what a killed run left there is removed.

    Raises RewriterError: the target holds something already, or cannot be made.
    """
    target = Path(target).absolute()
    if target.is_symlink() or target.exists() and not (target.is_dir() and _empty(target)):
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
        if target.exists():
            target.rmdir()
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        _remove(made)
        raise


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
