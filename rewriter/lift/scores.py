"""Walk from a softmax up to the query-key product, and down to the product with the values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from rewriter.lift.matching import (
    HIDDEN,
    NOISE,
    RESHAPES,
    NotLifted,
    argument,
    op_name,
    shape,
    through_noise,
)
from rewriter.lift.probe import constant


@dataclass(frozen=True)
class Product:
    """A product of two tensors with a letter for every dimension."""

    node: Node
    left: Node
    right: Node
    left_letters: str
    right_letters: str
    letters: str


@dataclass(frozen=True)
class Term:
    """What is added to the logits (`bias`), or which of them stay (`keep`) or go (`hide`)."""

    kind: str
    node: Node
    factor: float
    rank: int  # of the logits where it applies


@dataclass
class Scores:
    """The logits of an attention: scale * product, then the terms."""

    product: Product
    scale: float = 1.0
    softcap: float = 0.0
    terms: list[Term] = field(default_factory=list)
    heads: int | None = None  # from a reshape of [B*H, L, S] to [B, H, L, S]


def as_product(node: Node) -> Product | None:
    """matmul, bmm, baddbmm or a two-operand einsum, as letters."""
    name = op_name(node)
    if name in ("matmul", "bmm", "baddbmm"):
        left, right = node.args[-2:] if name == "baddbmm" else node.args[:2]
        rank = len(shape(left))  # type: ignore[arg-type]
        if not isinstance(right, Node) or len(shape(right)) != rank or rank < 2:
            return None
        batch = "ABCD"[: rank - 2]
        return Product(node, left, right, batch + "ld", batch + "ds", batch + "ls")  # type: ignore[arg-type]
    if name == "einsum":
        equation, operands = node.args[0], node.args[1]
        inputs, _, output = str(equation).replace(" ", "").partition("->")
        if len(operands) != 2 or "." in inputs or not output:  # type: ignore[arg-type]
            return None
        left, right = inputs.split(",")
        return Product(node, operands[0], operands[1], left, right, output)  # type: ignore[index,arg-type]
    return None


class Walker:
    """Reads scores in one graph."""

    def __init__(self, module: GraphModule, tainted: set[Node], active: set[Node]) -> None:
        self.module, self.tainted, self.active = module, tainted, active

    def constant(self, value: Any) -> float | None:
        return constant(self.module, self.tainted, value)

    # ---- up ----------------------------------------------------------------------------

    def scores(self, node: Node) -> Scores:
        """Read the logits that end at `node`. Raises NotLifted with the reason."""
        if node in self.tainted:
            raise NotLifted(f"{node.name} is changed in place through a view of it")
        name, rank = op_name(node), len(shape(node))
        if (product := as_product(node)) is not None:
            found = Scores(product)
            if name == "baddbmm":
                beta, alpha = argument(node, "beta"), argument(node, "alpha")
                found.scale = float(alpha)
                if beta != 0:
                    found.terms.append(Term("bias", node.args[0], float(beta), rank))  # type: ignore[arg-type]
            return found
        if name in NOISE:
            return self.scores(node.args[0])  # type: ignore[arg-type]
        if name in ("mul", "div"):
            return self._scaled(node, name)
        if name in ("add", "sub"):
            return self._added(node, name)
        if name in ("masked_fill", "where"):
            return self._masked(node, name)
        if name in RESHAPES or name == "unflatten":
            return self._reshaped(node)
        raise NotLifted(f"{name or node.name} lies between the product and the softmax")

    def _scaled(self, node: Node, name: str) -> Scores:
        left, right = node.args[:2]
        if name == "mul" and self.constant(left) is not None:
            left, right = right, left
        factor = self.constant(right)
        if factor is None or not isinstance(left, Node):
            raise NotLifted("the scores are scaled by a tensor, not by a constant")
        factor = factor if name == "mul" else 1 / factor
        inner = through_noise(left)
        if name == "mul" and op_name(inner) == "tanh":
            found = self.scores(inner.args[0])  # type: ignore[arg-type]
            if found.terms or found.softcap:
                raise NotLifted("a bias or mask is added before the soft cap")
            found.softcap, found.scale = factor, found.scale * factor
            return found
        found = self.scores(left)
        if found.softcap:
            raise NotLifted("the scores are scaled after the soft cap")
        if factor <= 0 and any(t.kind != "bias" for t in found.terms):
            raise NotLifted("masked scores are multiplied by a factor that is not positive")
        found.scale *= factor
        found.terms = [Term(t.kind, t.node, t.factor * factor, t.rank) for t in found.terms]
        return found

    def _added(self, node: Node, name: str) -> Scores:
        left, right = node.args[:2]
        alpha = float(node.kwargs.get("alpha", 1) or 1)  # type: ignore[arg-type]
        sign = alpha if name == "add" else -alpha
        if not isinstance(right, Node):
            return self.scores(left)  # type: ignore[arg-type]  # one number changes no softmax
        failed: NotLifted | None = None
        for main, other, factor in ((left, right, sign), (right, left, 1.0)):
            if not isinstance(main, Node) or not isinstance(other, Node):
                continue
            if main is right and sign != 1:
                break
            if shape(main) and len(shape(main)) < len(shape(node)):
                continue
            try:
                found = self.scores(main)
            except NotLifted as reason:
                failed = failed or reason
                continue
            found.terms.append(Term("bias", other, factor, len(shape(node))))
            return found
        raise failed or NotLifted("no product of queries and keys is among the added scores")

    def _masked(self, node: Node, name: str) -> Scores:
        rank = len(shape(node))
        if name == "masked_fill":
            main, mask, fill, kind = node.args[0], node.args[1], node.args[2], "hide"
        else:
            mask, main, fill, kind = node.args[0], node.args[1], node.args[2], "keep"
            if self.constant(main) is not None or self._low(main):
                main, fill, kind = fill, main, "hide"
        value = self.constant(fill)
        if (value is None or value > HIDDEN) and not self._low(fill):
            raise NotLifted(f"masked scores are set to {value}, which does not hide them")
        found = self.scores(main)  # type: ignore[arg-type]
        found.terms.append(Term(kind, mask, 1.0, rank))  # type: ignore[arg-type]
        return found

    def _low(self, value: Any) -> bool:
        """A tensor full of one hiding value: full_like(scores, -inf) and the like."""
        if op_name(value) in ("full", "full_like", "new_full"):
            number = self.constant(argument(value, "fill_value"))
            return number is not None and number <= HIDDEN
        if op_name(value) in NOISE | {"expand"}:
            return self._low(value.args[0])
        if op_name(value) == "mul":
            ones = [a for a in value.args if op_name(a) in ("ones_like", "ones")]
            rest = [self.constant(a) for a in value.args if op_name(a) not in ("ones_like", "ones")]
            return bool(ones) and len(rest) == 1 and rest[0] is not None and rest[0] <= HIDDEN
        return False

    def _reshaped(self, node: Node) -> Scores:
        source: Any = node.args[0]
        before, after = shape(source), shape(node)
        found = self.scores(source)
        if before == after:
            return found
        if len(before) == 3 and len(after) == 4 and before[-2:] == after[-2:]:
            found.heads = after[1] if isinstance(after[1], int) else None
            if found.heads is not None:
                return found
        raise NotLifted(f"the scores are reshaped from {before} to {after}")

    # ---- down --------------------------------------------------------------------------

    def value_product(self, softmax: Node) -> tuple[Node, Product, bool]:
        """(weights as they enter the product, the product, used elsewhere as well)."""
        found: list[tuple[Node, Product]] = []
        elsewhere = False
        stack = [softmax]
        while stack:
            node = stack.pop()
            for user in node.users:
                name = op_name(user)
                if name.startswith("_assert"):
                    continue
                product = as_product(user)
                if product is not None and node in (product.left, product.right):
                    found.append((node, product))
                elif name == "dropout" and user.args[1] and user.args[2]:
                    raise NotLifted("the attention weights are dropped at random")
                elif name in NOISE or name == "nan_to_num" or self._zeroes_hidden(user, softmax):
                    stack.append(user)
                elif (
                    name in RESHAPES
                    and shape(user)[-2:] == shape(node)[-2:]
                    and any(as_product(u) for u in user.users)
                ):
                    stack.append(user)
                else:
                    elsewhere = True
        if not found:
            raise NotLifted("its weights do not multiply a value")
        if len(found) > 1:
            raise NotLifted("its weights multiply more than one value")
        return (*found[0], elsewhere)

    def _zeroes_hidden(self, node: Node, softmax: Node) -> bool:
        """masked_fill(weights, mask, 0) with the mask of the scores: rows that see nothing."""
        if op_name(node) != "masked_fill" or self.constant(node.args[2]) != 0:
            return False
        source = through_noise(softmax.args[0])  # type: ignore[arg-type]
        return op_name(source) == "masked_fill" and source.args[1] is node.args[1]

    # ---- near misses -------------------------------------------------------------------

    def attention_like(self, softmax: Node) -> bool:
        """Whether a product of two activations reaches this softmax through pointwise ops."""
        stack: list[Any] = [softmax.args[0]]
        seen: set[Any] = set()
        through = NOISE | RESHAPES | {
            "transpose", "permute", "unsqueeze", "squeeze", "expand", "flatten", "unflatten",
            "slice", "select", "index", "cat", "pad", "constant_pad_nd", "slice_scatter",
        }  # fmt: skip
        while stack and len(seen) < 60:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            product = as_product(node)
            if product is not None and product.left in self.active and product.right in self.active:
                return True
            pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
            if pointwise or op_name(node) in through:
                stack.extend(node.all_input_nodes)
        return False


def default_scale(size: Any) -> float:
    """1/sqrt(D) for a static head size."""
    if not isinstance(size, int):
        raise NotLifted("the head size is not known at capture")
    return 1 / math.sqrt(size)
