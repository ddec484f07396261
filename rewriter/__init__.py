"""A compiler for pretrained transformers: capture, rewrite, check, save, serve.

    model = rewriter.rewrite("folder-or-hub-id", rewriter.Plan.from_yaml("plan.yaml"))
    model.save_pretrained("out")
    rewriter.export(model, "out-onnx", to="onnx")

Importing it makes `AutoModelForCausalLM.from_pretrained("out")` work, without importing torch
or transformers: the command line's `--help` and `rewriter.runtime` need neither.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rewriter import registration
from rewriter.errors import RewriterError

if TYPE_CHECKING:
    from rewriter.capture import capture
    from rewriter.export import export
    from rewriter.model import RewrittenModel, load
    from rewriter.plan import Plan
    from rewriter.recover import recover, scan
    from rewriter.rewrite import rewrite

__version__ = "0.1.0"
__all__ = [
    "Plan",
    "RewriterError",
    "RewrittenModel",
    "capture",
    "export",
    "load",
    "recover",
    "rewrite",
    "scan",
]

#: Public names and the modules that they are imported from when first asked for.
_LAZY = {
    "Plan": "plan",
    "RewrittenModel": "model",
    "capture": "capture",
    "export": "export",
    "load": "model",
    "recover": "recover",
    "rewrite": "rewrite",
    "scan": "recover",
}


class _Package(ModuleType):
    """A submodule does not hide the function of the same name (`rewriter.rewrite`)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'rewriter' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"rewriter.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


sys.modules[__name__].__class__ = _Package
registration.install()
