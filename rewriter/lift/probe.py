"""Read the meaning of a mask by evaluating the subgraph that builds it.

A mask that depends on sizes, constants and at most one [B, S] tensor of real tokens is
computed for a few small sizes and compared with what the attention op can say in literals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from rewriter.lift.matching import HIDDEN, NOISE, expression, is_mutation, op_name, shape

_LIKE = {
    "zeros_like", "ones_like", "full_like", "empty_like",
    "new_ones", "new_zeros", "new_full", "new_empty",
}  # fmt: skip
_BATCH = 3
#: Longest side that a probe may have; a constant beyond it leaves the mask dense.
_LONGEST = 4200
#: More nodes than this behind a mask is a computation, not a mask.
_MOST_NODES = 400


class Unknown(Exception):
    """The value depends on something that is not known before run time."""


@dataclass(frozen=True)
class Meaning:
    """What a mask says: literals of the attention op and the tensor of real tokens."""

    causal: bool
    window: int
    padding: Node | None = None
    inverted: bool = False  # true in `padding` means hidden


class Evaluator:
    """Values of nodes under chosen sizes; `given` replaces nodes by tensors."""

    def __init__(
        self,
        module: GraphModule,
        tainted: set[Node],
        sizes: dict[Any, int],
        given: dict[Node, Tensor] | None = None,
    ) -> None:
        self.module, self.tainted, self.sizes = module, tainted, sizes
        self.known: dict[Node, Any] = dict(given or {})

    def size(self, value: Any) -> int:
        value = expression(value)
        if isinstance(value, int):
            return value
        # An unbound symbol is another name of the batch: nothing else is left to vary.
        return int(value.xreplace({s: self.sizes.get(s, _BATCH) for s in value.free_symbols}))

    def __call__(self, node: Node) -> Any:
        if node not in self.known:
            self.known[node] = self._compute(node)
        return self.known[node]

    def _compute(self, node: Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, int | float | torch.SymInt) and not isinstance(value, bool):
            return self.size(value) if isinstance(value, torch.SymInt) else value
        if node in self.tainted or node.op in ("placeholder", "call_module", "output"):
            raise Unknown
        if node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            tensor = getattr(self.module.get_submodule(owner), leaf)
            if isinstance(tensor, nn.Parameter):
                raise Unknown
            return tensor.detach().clone()
        target: Any = node.target
        name = op_name(node)
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()) and name not in NOISE:
            raise Unknown
        if name == "dropout":
            return self(node.args[0])  # type: ignore[arg-type]
        first = node.args[:1]
        if name in _LIKE:  # only shape and dtype of the first input matter
            like = node.args[0].meta["val"]  # type: ignore[union-attr]
            first = (torch.empty([self.size(d) for d in like.shape], dtype=like.dtype),)
        args: Any = map_arg((*first, *node.args[1:]), self)
        if is_mutation(node):
            args = (args[0].clone(), *args[1:])
        return target(*args, **map_arg(node.kwargs, self))


def constant(module: GraphModule, tainted: set[Node], value: Any) -> float | None:
    """A scalar that is the same for every input, or None."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, Node):
        return None
    if (
        isinstance(value.meta.get("val"), torch.SymInt)
        or math.prod(d if isinstance(d, int) else 2 for d in shape(value) or [2]) != 1
        and shape(value) != []
    ):
        return None
    try:
        found = Evaluator(module, tainted, {})(value)
        return float(found) if not isinstance(found, Tensor) or found.numel() == 1 else None
    except Exception:
        return None


@dataclass(frozen=True)
class _Question:
    """A mask to read: `mask` [B, H, length, keys], whose true means hidden when `hides`."""

    module: GraphModule
    tainted: set[Node]
    mask: Node
    length: Any
    keys: Any
    hides: bool


@dataclass(frozen=True)
class _Padding:
    """A guess: `node` [B, keys] marks the real tokens (`inverted`: the padding; `binary`: by 1)."""

    node: Node | None = None
    inverted: bool = False
    binary: bool = False


def meaning(
    module: GraphModule, tainted: set[Node], mask: Node, query: Node, key: Node, hides: bool
) -> Meaning | None:
    """Literals that say what `mask` says, or None when only the tensor itself can.

    Args:
        mask: 4-D, broadcastable to [B, H, L, S]; bool, or float with 0 and -inf.
        query: [B, H, L, D], key: [B, Hk, S, D].
        hides: true in a bool mask means hidden.
    """
    ancestors = _ancestors(mask)
    if len(ancestors) > _MOST_NODES:
        return None
    length, keys = shape(query)[2], shape(key)[2]
    candidates: list[Node | None] = [None]
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if node in ancestors and isinstance(value, Tensor) and value.dim() == 2:
            if shape(node)[1] == keys and not value.dtype.is_floating_point:
                candidates.append(node)
    question = _Question(module, tainted, mask, length, keys, hides)
    for padding in _guesses(candidates):
        found = _try(question, padding)
        if found is not None:
            return found
    return None


def _guesses(candidates: list[Node | None]) -> Iterator[_Padding]:
    for node in candidates:
        if node is None:
            yield _Padding()
            continue
        # Only an input that is named a mask may be assumed to hold just 0 and 1.
        named = node.op == "placeholder" and "mask" in node.name
        for inverted in (False, True):
            for binary in (False, True) if named else (False,):
                yield _Padding(node, inverted, binary)


def _try(question: _Question, padding: _Padding) -> Meaning | None:
    result: tuple[bool, int] | None = None
    seen: list[tuple[Tensor, int, int]] = []
    long = _long_sizes(question.module, question.mask, padding.node)
    if long is None:
        return None
    reached = False
    for number in [*long, 13, 8]:
        if number > 13 and reached:
            continue  # the longest that the buffers allow is enough
        try:
            pattern, rows, columns = _evaluate(question, padding, number)
        except Exception:  # longer than a buffer, or not a value we can know
            if number > 13:
                continue
            return None
        if pattern is None:
            return None
        reached = True
        seen.append((pattern, rows, columns))
    for pattern, rows, columns in seen:
        if result is None:
            result = _literals(pattern, rows, columns)
            if result is None:
                return None
        if not torch.equal(pattern, _draw(rows, columns, *result)):
            return None
    if result is None:
        return None
    return Meaning(result[0], result[1], padding.node, padding.inverted)


def _evaluate(
    question: _Question, padding: _Padding, number: int
) -> tuple[Tensor | None, int, int]:
    """Which key each query sees at one size, [L, S], if every row of the batch agrees."""
    sizes: dict[Any, int] = {}
    if isinstance(question.keys, sympy.Expr):
        sizes.update(dict.fromkeys(question.keys.free_symbols, number))
    if isinstance(question.length, sympy.Expr):
        for symbol in question.length.free_symbols:
            sizes.setdefault(symbol, max(number - 3, 1))
    run = Evaluator(question.module, question.tainted, sizes)
    rows, columns = run.size(question.length), run.size(question.keys)
    real = torch.ones(_BATCH, columns, dtype=torch.bool)
    if padding.node is not None:
        value = padding.node.meta["val"]
        if run.size(value.shape[0]) != _BATCH and not isinstance(value.shape[0], int):
            raise Unknown
        generator = torch.Generator().manual_seed(0)
        real = torch.rand(run.size(value.shape[0]), columns, generator=generator) > 0.4
        real[0] = True
        content = real != padding.inverted
        if value.dtype != torch.bool:
            pick = [1] if padding.binary else [1, 2, 5, 9]
            chosen = torch.randint(len(pick), content.shape, generator=generator)
            content = torch.tensor(pick)[chosen] * content
        run.known[padding.node] = content.to(value.dtype)
    seen = run(question.mask)
    if seen.dtype == torch.bool:
        seen = ~seen if question.hides else seen
    else:
        hidden = seen <= HIDDEN
        if not bool((hidden | (seen == 0)).all()):
            return None, rows, columns
        seen = ~hidden
    seen = seen.expand(real.shape[0] if padding.node is not None else -1, -1, rows, columns)
    pattern = seen[0, 0]
    if not torch.equal(seen, (pattern & real[: seen.shape[0], None, None, :]).expand_as(seen)):
        return None, rows, columns
    return pattern, rows, columns


def _draw(rows: int, columns: int, causal: bool, window: int) -> Tensor:
    distance = torch.arange(columns - rows, columns)[:, None] - torch.arange(columns)[None, :]
    keep = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return keep & (distance.abs() < window) if window else keep


def _literals(pattern: Tensor, rows: int, columns: int) -> tuple[bool, int] | None:
    """(causal, window) that draws this pattern, the plainest first."""
    last = int(pattern[-1].sum())
    for causal, window in ((False, 0), (True, 0), (True, last), (False, last)):
        if torch.equal(pattern, _draw(rows, columns, causal, window)):
            return causal, window
    return None


def _long_sizes(module: GraphModule, mask: Node, stop: Node | None) -> list[int] | None:
    """Lengths, longest first, at which a window hidden in the mask's constants would show."""
    found: set[int] = set()
    for node in _ancestors(mask, stop):
        if node.op == "get_attr":
            tensor = node.meta.get("val")
            sides = shape(node) if isinstance(tensor, Tensor) else []
            found.update(d for d in sides if isinstance(d, int))
            if not sides or math.prod(d for d in sides if isinstance(d, int)) == 1:
                owner, _, leaf = str(node.target).rpartition(".")
                held = getattr(module.get_submodule(owner), leaf)
                found.update([abs(int(held)) + 9] if held.abs() < 2**31 else [])
        elif node.op == "call_function" and op_name(node) not in ("slice", "full"):
            numbers = [a for a in node.args if isinstance(a, int) and not isinstance(a, bool)]
            found.update(abs(a) + 9 for a in numbers if abs(a) < 2**31)
        elif node.op == "call_function" and op_name(node) == "slice":
            ends = [a for a in node.args[2:4] if isinstance(a, int)]
            found.update(abs(a) + 9 for a in ends if abs(a) < 2**31)
    longest = sorted((s for s in found if s > 13), reverse=True)
    return None if longest and longest[0] > _LONGEST else longest


def _ancestors(node: Node, stop: Node | None = None) -> set[Node]:
    found, stack = set(), [node]
    while stack:
        node = stack.pop()
        if node in found or isinstance(node.meta.get("val"), torch.SymInt):
            continue
        found.add(node)
        if node is stop or len(found) > _MOST_NODES:
            continue
        stack.extend(node.all_input_nodes)
    return found
