"""Bring operands of any attention layout to [B, H, L, D] and the result back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg

from rewriter.lift.matching import (
    NOISE,
    RESHAPES,
    Editor,
    NotLifted,
    argument,
    aten,
    op_name,
    shape,
    through_noise,
)


@dataclass(frozen=True)
class Layout:
    """How the batch dimensions of a product become B and H.

    Attributes:
        batch: letters of the batch dimensions, in the order of the scores.
        heads: with one batch letter: how many heads it holds (None: it is the batch alone).
    """

    batch: str
    heads: int | None = None

    def to_standard(self, edit: Editor, node: Node, letters: str, tail: str) -> Node:
        """`node` with dimensions named by `letters` as [B, H, *tail]."""
        missing = [b for b in self.batch if b not in letters]
        order = [letters.index(b) for b in self.batch if b in letters]
        node = edit.permute(node, order + [letters.index(t) for t in tail])
        if len(self.batch) == 3:  # [B, Hk, G, ...]: keys and values lack G
            if self.batch[2] in missing and len(missing) == 1:
                return node
            if not missing and shape(node)[2] == 1:
                return edit.call(aten.squeeze.dim, node, 2)
            if missing:
                raise NotLifted("an operand lacks a batch dimension")
            return edit.call(aten.flatten.using_ints, node, 1, 2)
        for letter in missing:
            node = edit.call(aten.unsqueeze.default, node, self.batch.index(letter))
        if len(self.batch) == 2:
            return node
        if not self.batch:
            return edit.call(aten.unsqueeze.default, self._unsqueeze(edit, node), 0)
        if self.heads is None:
            return edit.call(aten.unsqueeze.default, node, 1)
        source = through_noise(node)
        if op_name(source) in RESHAPES:  # [B, H, L, D] was merged just before
            inner: Any = source.args[0]
            before = shape(inner)
            if len(before) == 4 and before[1] == self.heads and before[2:] == shape(source)[1:]:
                return inner
        return edit.call(aten.unflatten.int, node, 0, [-1, self.heads])

    @staticmethod
    def _unsqueeze(edit: Editor, node: Node) -> Node:
        return edit.call(aten.unsqueeze.default, node, 0)

    def term(self, edit: Editor, node: Node, rank: int, letters: str) -> Node:
        """A tensor that broadcasts over logits of this rank, as 4-D over [B, H, L, S]."""
        while len(shape(node)) < min(rank, 4) or (rank == 5 and len(shape(node)) < 5):
            node = edit.call(aten.unsqueeze.default, node, 0)
        if rank == len(letters):
            order = [letters.index(c) for c in self.batch + "ls"]
            node = edit.permute(node, order)
        if rank == 4:
            return node
        if rank == 5:
            if shape(node)[2] == 1 and shape(node)[1] == 1:
                return edit.call(aten.squeeze.dim, node, 2)
            raise NotLifted("a bias differs between the heads of a group")
        if rank == 3:
            if self.heads is None:
                return edit.call(aten.unsqueeze.default, node, 1)
            if shape(node)[0] == 1:
                return edit.call(aten.unsqueeze.default, node, 0)
            source = through_noise(node)
            if op_name(source) in RESHAPES and shape(source.args[0])[1:2] == [self.heads]:  # type: ignore[arg-type]
                before = shape(source.args[0])  # type: ignore[arg-type]
                if len(before) == 4 and before[2:] == shape(source)[1:]:
                    return source.args[0]  # type: ignore[return-value]
            return edit.call(aten.unflatten.int, node, 0, [-1, self.heads])
        return edit.call(aten.unsqueeze.default, self._unsqueeze(edit, node), 0)

    def from_standard(self, edit: Editor, node: Node, letters: str, groups: Any) -> Node:
        """[B, L, H, V], what the op returns, as the dimensions named by `letters` (l, v)."""
        if len(self.batch) == 2 and letters == self.batch[0] + "l" + self.batch[1] + "v":
            return node
        node = edit.call(aten.transpose.int, node, 1, 2)
        have = self.batch + "lv"
        if len(self.batch) == 3:
            node = edit.call(aten.unflatten.int, node, 1, list(groups))
        elif not self.batch:
            node = edit.call(aten.squeeze.dim, edit.call(aten.squeeze.dim, node, 0), 0)
        elif len(self.batch) == 1 and self.heads is None:
            node = edit.call(aten.squeeze.dim, node, 1)
        elif len(self.batch) == 1:
            node = edit.call(aten.flatten.using_ints, node, 0, 1)
        return edit.permute(node, [have.index(c) for c in letters])


def merged_heads(query: Node) -> int | None:
    """How many heads the first dimension of a 3-D query [B*H, L, D] holds, from its making."""
    total, size = shape(query)[0], shape(query)[-1]
    node, steps = query, 0
    while steps < 12:
        steps += 1
        name = op_name(node)
        if name in RESHAPES or name == "unflatten" or name == "flatten":
            before = shape(node.args[0])  # type: ignore[arg-type]
            after = shape(node)
            if total in after and total not in before:
                for first, second in zip(before, before[1:], strict=False):
                    if isinstance(second, int) and first * second == total:
                        return second
                wide = before[-1]
                if isinstance(wide, int) and isinstance(size, int) and wide % size == 0:
                    heads = wide // size
                    if any(d * heads == total for d in before[:-1]):
                        return heads
                return None
        if name in NOISE | RESHAPES | {"mul", "div", "transpose", "permute"}:
            node = next((a for a in node.args if isinstance(a, Node)), None)  # type: ignore[assignment]
            if node is None:
                return None
            continue
        return None
    return None


def without_repeat(edit: Editor, node: Any, dim: int = 1) -> tuple[Node, int]:
    """Keys or values before their heads were repeated for the query groups: (node, times)."""
    name = op_name(node)
    if name in ("clone", "contiguous"):
        inner, times = without_repeat(edit, node.args[0], dim)
        return (inner, times) if times > 1 else (node, 1)
    if name == "transpose":
        rank = len(shape(node))
        pair = [d % rank for d in node.args[1:3]]
        place = pair[1 - pair.index(dim)] if dim in pair else dim
        inner, times = without_repeat(edit, node.args[0], place)
        return (edit.call(aten.transpose.int, inner, *pair), times) if times > 1 else (node, 1)
    after = shape(node)
    if not after or not isinstance(after[dim], int):
        return node, 1
    if name in RESHAPES and shape(node.args[0]) == after:
        inner, times = without_repeat(edit, node.args[0], dim)
        return (inner, times) if times > 1 else (node, 1)
    if name in ("mul", "add", "neg", "cat", "slice"):  # rotary, after the repeat
        return _commuted(edit, node, dim)
    if name == "repeat_interleave" and isinstance(node.args[1], int):
        source, at = node.args[0], node.args[2] if len(node.args) > 2 else None
        if isinstance(at, int) and at % len(after) == dim:
            return source, node.args[1]
    if name in ("expand", "broadcast_to", "repeat"):
        source = node.args[0]
        before = shape(source)
        if len(before) == 4 and before[dim] == 1 and after[dim] > 1:
            if [d for i, d in enumerate(before) if i != dim] == after[:dim] + after[dim + 1 :]:
                return source, after[dim]
    if name in RESHAPES or name == "flatten":
        wide = through_noise(node.args[0])
        if op_name(wide) not in ("expand", "broadcast_to", "repeat") or len(shape(wide)) != 5:
            return node, 1
        narrow: Any = wide.args[0]
        full = shape(wide)
        times, source = full[dim + 1], _without_slices(narrow)
        if len(shape(source)) != 5 or shape(source)[dim + 1] != 1 or not isinstance(times, int):
            return node, 1
        before = shape(source)[: dim + 1] + shape(source)[dim + 2 :]
        same = full[: dim + 1] + full[dim + 2 :] == before
        merged = after == before[:dim] + [before[dim] * times] + before[dim + 1 :]
        if same and merged:
            if op_name(source) == "unsqueeze" and int(source.args[1]) % 5 == dim + 1:
                return _without_slices(source.args[0]), times
            return edit.call(aten.squeeze.dim, source, dim + 1), times
    return node, 1


def _without_slices(node: Any) -> Any:
    """Look through `[:]`."""
    while op_name(node) == "slice" and shape(node) == shape(node.args[0]):
        node = node.args[0]
    return node


def _commuted(edit: Editor, node: Node, dim: int) -> tuple[Node, int]:
    """The same elementwise op on the heads before their repeat."""
    heads, rank = shape(node)[dim], len(shape(node))
    along = op_name(node) in ("cat", "slice") and argument(node, "dim") % rank == dim
    if along or node.kwargs:
        return node, 1
    inputs: dict[Node, Node] = {}
    many: set[int] = set()
    for parent in node.all_input_nodes:
        size = shape(parent)
        if len(size) == rank and size[dim] == heads:
            inputs[parent], times = without_repeat(edit, parent, dim)
            many.add(times)
        elif size and len(size) >= rank - dim and (len(size) != rank or size[dim] != 1):
            return node, 1  # it may differ between the repeated heads
    if len(many) != 1 or 1 in many:
        return node, 1
    args = map_arg(node.args, lambda n: inputs.get(n, n))
    return edit.call(node.target, *args), many.pop()
