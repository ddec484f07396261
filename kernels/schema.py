"""A dataclass of arguments as the schema of an op, so that they are listed once."""

from __future__ import annotations

from dataclasses import fields

TYPES = {"Tensor | None": "Tensor?"}


def inputs(arguments: type) -> str:
    """`Tensor query, Tensor? mask, float scale, ...` of a dataclass with annotations as text."""
    return ", ".join(f"{TYPES.get(str(f.type), f.type)} {f.name}" for f in fields(arguments))


def names(arguments: type) -> tuple[str, ...]:
    return tuple(f.name for f in fields(arguments))
