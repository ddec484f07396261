"""Tells transformers of our model type as soon as its Auto classes exist, and not before.

`import rewriter` must make `AutoModelForCausalLM.from_pretrained(folder)` work, but must not
import torch; so registration waits for the import of the Auto classes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

#: Our module to import once a module of transformers has been imported.
AFTER = {
    "transformers.models.auto.configuration_auto": "rewriter.configuration",
    "transformers.models.auto.modeling_auto": "rewriter.model",
}


class _Then(Loader):
    """Loads a module as its own loader would, then imports ours."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(AFTER[module.__name__])


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in AFTER:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


def install() -> None:
    """Register now what transformers has imported already, and the rest when it comes."""
    sys.meta_path.insert(0, _Finder())
    for theirs, ours in AFTER.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
