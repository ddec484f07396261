"""Operators of the `rewriter::` dialect, one folder each.

`op.py` registers schema, shapes and autograd; `reference.py` is the meaning in a few lines of
float64-able torch; `cpu.py` is the fast torch form; `triton.py` is the kernel for a GPU, with
`forward` and `backward` of the op's own arguments. Importing this package registers every op.
"""

import importlib as _importlib
import pkgutil as _pkgutil

for _found in _pkgutil.iter_modules(__path__):
    if _found.ispkg:
        _importlib.import_module(f"{__name__}.{_found.name}")
