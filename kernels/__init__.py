"""Operators of the `rewriter::` dialect, one folder each.

`op.py` registers schema, shapes and autograd; `reference.py` is the meaning in
a few lines of float64-able torch; `cpu.py` is the fast torch form.
"""
