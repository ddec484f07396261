"""Lift attention that is written by hand to `rewriter::attention` nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

import rewriter.kernels.attention  # noqa: F401  registers rewriter::attention
from rewriter.lift.layout import Layout, merged_heads, without_repeat
from rewriter.lift.matching import (
    NOISE,
    Editor,
    NotLifted,
    active_nodes,
    argument,
    aten,
    erase,
    module_path,
    op_name,
    shape,
    tainted_nodes,
    through_noise,
)
from rewriter.lift.probe import Meaning, meaning
from rewriter.lift.scores import Product, Scores, Term, Walker, default_scale

__all__ = ["lift"]


def lift(module: GraphModule) -> list[tuple[str, str]]:
    """Replace attention by one `rewriter::attention` node each, in place.

    The graph is one of `torch.export.export(strict=False)` before any decomposition.
    Causal masks, windows and masks of real tokens become literals and a [B, S] mask where
    the mask's own subgraph proves it; otherwise the mask stays a dense input. A row that
    sees no key becomes zero (with a large finite mask value it was the mean of all values).

    Returns:
        (module path, reason) of every softmax that looks like attention and stays. A reason
        that starts with "lifted" says that the softmax stays for another use of its weights.
    """
    module.graph.eliminate_dead_code()
    lifter = _Lifter(module)
    near: list[tuple[str, str]] = []
    for node in list(module.graph.nodes):
        if node._erased:
            continue
        name = op_name(node)
        if name not in ("softmax", "_softmax", "special_softmax", "scaled_dot_product_attention"):
            continue
        fused = name == "scaled_dot_product_attention"
        path = module_path(node)
        try:
            note = lifter.fused(node) if fused else lifter.softmax(node)
        except NotLifted as reason:
            if fused or lifter.walk.attention_like(node):
                near.append((path, str(reason)))
            continue
        if note:
            near.append((path, note))
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return near


@dataclass
class _Logits:
    """What is known of the masks and biases of one attention."""

    causal: bool = False
    window: int = 0
    padding: list[Node] = field(default_factory=list)
    keep: list[Node] = field(default_factory=list)
    bias: list[Node] = field(default_factory=list)


class _Lifter:
    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.tainted = tainted_nodes(module)
        self.active = active_nodes(module)
        self.walk = Walker(module, self.tainted, self.active)
        self.meanings: dict[Any, Meaning | None] = {}

    # ---- the two anchors ---------------------------------------------------------------

    def fused(self, node: Node) -> str:
        """scaled_dot_product_attention: the op says itself what is what."""
        query, key, value = node.args[:3]
        mask, scale = argument(node, "attn_mask"), argument(node, "scale")
        causal = bool(argument(node, "is_causal"))
        if argument(node, "dropout_p"):
            raise NotLifted("the attention weights are dropped at random")
        rank = len(shape(query))  # type: ignore[arg-type]
        if rank not in (3, 4) or any(len(shape(n)) != rank for n in (key, value)):  # type: ignore[arg-type]
            raise NotLifted("queries, keys and values are neither all 3-D nor all 4-D")
        scale = default_scale(shape(query)[-1]) if scale is None else float(scale)  # type: ignore[arg-type]
        batch = "ABCD"[: rank - 2]
        product = Product(node, query, key, batch + "ld", batch + "sd", batch + "ls")  # type: ignore[arg-type]
        scores = Scores(product, scale)
        if mask is not None:
            kind = "keep" if mask.meta["val"].dtype == torch.bool else "bias"
            scores.terms.append(Term(kind, mask, 1.0, rank))
        letters = (product.left_letters, product.right_letters)
        operands = (query, key, value)
        self._replace(node, node, scores, operands, letters, batch + "sv", batch + "lv", causal)
        return ""

    def softmax(self, node: Node) -> str:
        """softmax(scores) @ value, in any of the layouts."""
        scores = self.walk.scores(node.args[0])  # type: ignore[arg-type]
        product = scores.product
        rank = len(shape(node))
        dim = int(node.args[1]) % rank  # type: ignore[arg-type]
        if rank != len(product.letters) and dim != rank - 1:
            raise NotLifted("the softmax is not over the keys")
        to_end = dim if rank == len(product.letters) else len(product.letters) - 1
        over = product.letters[to_end]
        left = over in product.left_letters
        key, query = (product.left, product.right) if left else (product.right, product.left)
        kl, ql = product.left_letters, product.right_letters
        if not left:
            kl, ql = ql, kl
        contracted = [c for c in ql if c in kl and c not in product.letters]
        rows = [c for c in ql if c not in kl and c in product.letters]
        # A letter that the keys lack is the query position or a group of heads.
        at_product = next((c for c in reversed(product.letters) if c in rows), None)
        if over in ql or len(contracted) != 1 or at_product is None:
            raise NotLifted("the scores are no product of one query and one key dimension")
        names = {over: "s", contracted[0]: "d"}
        weights, values, elsewhere = self.walk.value_product(node)
        on_left = values.left is weights
        value = values.right if on_left else values.left
        wl, vl = values.left_letters, values.right_letters
        if not on_left:
            wl, vl = vl, wl
        if key not in self.active or value not in self.active:
            raise NotLifted("its keys or values are weights, not activations")
        if len(shape(weights)) == len(product.letters) == len(wl):
            # The query position is the row letter that the output keeps and the values lack.
            matched = dict(zip(product.letters, wl, strict=True))
            rows = [c for c in rows if matched[c] not in vl and matched[c] in values.letters]
            at_product = rows[0] if len(rows) == 1 else at_product
            if len(rows) == 2:
                at_product = self._position(rows, product.letters)
        names[at_product] = "l"
        batch = [c for c in product.letters if c not in names]
        fresh = dict(zip(batch, "ABCD", strict=False))
        names |= fresh
        if any(c not in names for c in ql + kl + product.letters):
            raise NotLifted("the scores sum over a dimension of one operand only")
        rename = lambda text, table: "".join(table.get(c, "?") for c in text)  # noqa: E731
        letters = rename(product.letters, names)
        if len(wl) == len(letters) and len(shape(weights)) == rank == len(letters):
            table = dict(zip(wl, letters, strict=True))
        elif letters[-2:] == "ls" and as_standard(wl):
            table = dict(zip(wl, "AB"[: len(wl) - 2] + "ls", strict=True))
        else:
            raise NotLifted("the weights are reshaped between the softmax and the values")
        inner = [c for c in vl if c in wl and c not in values.letters]
        if [table.get(c) for c in inner] != ["s"]:
            raise NotLifted("the values are not summed over the keys")
        extra = [c for c in vl if c not in wl]
        if len(extra) != 1:
            raise NotLifted("the values have more than one feature dimension")
        table[extra[0]] = "v"
        d, s = (shape(key)[kl.index(c)] for c in (contracted[0], over))
        if isinstance(s, int) and not isinstance(d, int):
            raise NotLifted("it attends over channels: the product sums over the sequence")
        scores.product = Product(product.node, query, key, "", "", letters)
        self._replace(
            node,
            values.node,
            scores,
            (query, key, value),
            (rename(ql, names), rename(kl, names)),
            rename(vl, table),
            rename(values.letters, table),
            False,
        )
        return "lifted, but its weights are also used elsewhere: the softmax stays" * elsewhere

    @staticmethod
    def _position(rows: list[str], letters: str) -> str:
        return max(rows, key=letters.index)

    # ---- rewriting ---------------------------------------------------------------------

    def _replace(
        self,
        anchor: Node,
        last: Node,
        scores: Scores,
        operands: tuple[Any, Any, Any],
        letters: tuple[str, str],
        value_letters: str,
        output_letters: str,
        causal: bool,
    ) -> None:
        """Put one attention node in place of `last`, the product with the values."""
        score_letters = scores.product.letters
        batch = "".join(c for c in score_letters if c not in "ls")
        if len(batch) > 3:
            raise NotLifted("it has more than three batch dimensions")
        edit = Editor(self.module, last, anchor)
        heads = None
        if len(batch) == 1:
            first = operands[0]
            if op_name(first) == "transpose" and letters[0] != "Ald":
                first = first.args[0]
            heads = scores.heads or (merged_heads(first) if letters[0][0] == "A" else None)
        layout = Layout(batch, heads)
        query = layout.to_standard(edit, operands[0], letters[0], "ld")
        key = layout.to_standard(edit, operands[1], letters[1], "sd")
        values_batch = layout
        if len(value_letters) == 4 and len(batch) == 1:  # weights were split, scores were not
            values_batch = Layout("AB")
        elif len(value_letters) == 3 and len(batch) == 2:
            values_batch = Layout("A", shape(query)[1])
        value = values_batch.to_standard(edit, operands[2], value_letters, "sv")
        key, value = self._without_repeat(edit, query, key, value)
        self._check(query, key, value)
        dtype = value.meta["val"].dtype
        query, key = (
            n if n.meta["val"].dtype == dtype else edit.call(aten.to.dtype, n, dtype)
            for n in (query, key)
        )
        logits = _Logits(causal=causal)
        for term in scores.terms:
            node = layout.term(edit, term.node, term.rank, score_letters)
            self._add_term(edit, logits, term.kind, node, term.factor, query, key)
        if causal and shape(query)[2] != shape(key)[2]:
            raise NotLifted("is_causal with other keys than queries aligns to the first key")
        mask = self._mask(edit, logits)
        bias = logits.bias[0] if logits.bias else None
        for more in logits.bias[1:]:
            bias = edit.call(aten.add.Tensor, bias, more)
        attention = edit.call(
            torch.ops.rewriter.attention.default,
            query, key, value, mask, bias, None, None,
            scores.scale, logits.causal, logits.window, 0, 0, scores.softcap,
        )  # fmt: skip
        groups = shape(scores.product.node)
        split = [groups[score_letters.index(c)] for c in batch[1:]] if len(batch) == 3 else []
        output = values_batch.from_standard(edit, attention, output_letters, split)
        if output.meta["val"].dtype != last.meta["val"].dtype:
            output = edit.call(aten.to.dtype, output, last.meta["val"].dtype)
        last.replace_all_uses_with(output)
        self.active.update((attention, output))
        erase(last)

    @staticmethod
    def _without_repeat(edit: Editor, query: Node, key: Node, value: Node) -> tuple[Node, Node]:
        narrow_key, times = without_repeat(edit, key)
        narrow_value, value_times = without_repeat(edit, value)
        return (narrow_key, narrow_value) if times == value_times > 1 else (key, value)

    @staticmethod
    def _check(query: Node, key: Node, value: Node) -> None:
        q, k, v = shape(query), shape(key), shape(value)
        for a, b, what in (
            (q[0], k[0], "batch"),
            (q[0], v[0], "batch"),
            (k[1], v[1], "head"),
            (q[3], k[3], "head size"),
            (k[2], v[2], "key"),
        ):
            if isinstance(a, int) and isinstance(b, int) and a != b or (a != 1) != (b != 1):
                raise NotLifted(f"its operands differ in {what} dimension: {a} and {b}")
        if isinstance(q[1], int) and isinstance(k[1], int) and q[1] % k[1]:
            raise NotLifted(f"{k[1]} key heads do not divide {q[1]} query heads")

    def _add_term(
        self,
        edit: Editor,
        logits: _Logits,
        kind: str,
        node: Node,
        factor: float,
        query: Node,
        key: Node,
    ) -> None:
        """Read one mask or bias as literals if possible, else split it, else keep it dense."""
        found = self._meaning(node, query, key, kind == "hide") if factor > 0 else None
        if found is not None:
            logits.causal |= found.causal
            if found.window:
                logits.window = min(logits.window or found.window, found.window)
            if found.padding is not None:
                real = found.padding
                if found.inverted:
                    real = edit.call(aten.logical_not.default, real)
                if all(_same_call(real, p) is False for p in logits.padding):
                    logits.padding.append(real)
            return
        if kind == "bias" and node.meta["val"].dtype != torch.bool:
            source = through_noise(node)
            name, whole = op_name(source), shape(source)
            again = lambda k, n, f: self._add_term(  # noqa: E731
                edit, logits, k, self._as4(edit, n), f, query, key
            )
            if len(whole) == 4 and source not in self.tainted:
                if name == "add" and all(isinstance(a, Node) for a in source.args[:2]):
                    if not source.kwargs:
                        again("bias", source.args[0], factor)
                        again("bias", source.args[1], factor)
                        return
                if name == "masked_fill" and self._hides(source.args[2]):
                    again("hide", source.args[1], 1.0)
                    again("bias", source.args[0], factor)
                    return
                if name == "where" and self._hides(source.args[2]):
                    again("keep", source.args[0], 1.0)
                    if isinstance(source.args[1], Node):
                        again("bias", source.args[1], factor)
                    return
        if kind == "bias":
            if factor != 1:
                node = edit.call(aten.mul.Tensor, node, factor)
            logits.bias.append(node)
            return
        if node.meta["val"].dtype != torch.bool:
            node = edit.call(aten.ne.Scalar, node, 0)
        logits.keep.append(edit.call(aten.logical_not.default, node) if kind == "hide" else node)

    def _hides(self, fill: Any) -> bool:
        value = self.walk.constant(fill)
        return value is not None and value <= -1e4

    @staticmethod
    def _as4(edit: Editor, node: Node) -> Node:
        while len(shape(node)) < 4:
            node = edit.call(aten.unsqueeze.default, node, 0)
        return node

    def _meaning(self, node: Node, query: Node, key: Node, hides: bool) -> Meaning | None:
        """Meaning of a mask; remembered for the source that its local reshapes come from."""
        source, steps = node, []
        while op_name(source) in ("unsqueeze", "unflatten") or op_name(source) in NOISE:
            steps.append((op_name(source), str(source.args[1:])))
            source = source.args[0]  # type: ignore[assignment]
        length, keys = shape(query)[2], shape(key)[2]
        place = (source, tuple(steps), str(length), str(keys), hides)
        if place not in self.meanings:
            self.meanings[place] = meaning(self.module, self.tainted, node, query, key, hides)
        return self.meanings[place]

    @staticmethod
    def _mask(edit: Editor, logits: _Logits) -> Node | None:
        """One mask input: [B, S] where only padding is left, else dense."""
        real = logits.padding[0] if logits.padding else None
        for more in logits.padding[1:]:
            real = edit.call(aten.logical_and.default, real, more)
        if not logits.keep:
            return real
        keep = logits.keep[0]
        for more in logits.keep[1:]:
            keep = edit.call(aten.logical_and.default, keep, more)
        if real is not None:
            wide = edit.call(aten.unsqueeze.default, real, 1)
            wide = edit.call(aten.unsqueeze.default, wide, 2)
            keep = edit.call(aten.logical_and.default, keep, wide)
        return keep


def as_standard(letters: str) -> bool:
    """Letters of a plain matmul operand [.., l, d]."""
    return letters[-2:] == "ld" and 3 <= len(letters) <= 4


def _same_call(one: Node, other: Node) -> bool:
    return one is other or (
        one.op == other.op == "call_function"
        and one.target is other.target
        and one.args == other.args
    )
