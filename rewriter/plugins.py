"""Passes and backends register themselves; here is where they are looked for."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points


def discover(package: str) -> None:
    """Import every module of a package of ours, and what other packages declare for it.

    package: `rewriter.passes` or `rewriter.backends`; also the name of the entry point group.
    """
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
    for entry in entry_points(group=package):
        entry.load()
