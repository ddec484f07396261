"""What the Trainer trains: one module a stage, whose parameters are the trained tensors alone."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from rewriter.calibration import text_inputs
from rewriter.graph import LINEAR, as_linear, aten, place
from rewriter.recover.graphs import Frozen, Piece, extract, segments
from rewriter.recover.losses import (
    in_chunks,
    known_gradients,
    logits_loss,
    positions_at_once,
    relative_error,
)
from rewriter.recover.regions import Region
from rewriter.recover.stages import Distil

#: Ops that act on one element at a time and may stand between the head and the logits.
POINTWISE = {
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.tanh.default,
    aten.to.dtype,
    aten._to_copy.default,
    operator.mul,
}


def inputs_of(module: GraphModule) -> list[str]:
    """Names of a (stateless) graph's inputs."""
    return [n.name for n in module.graph.nodes if n.op == "placeholder"]


def input_values(module: GraphModule, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Values of the graph's inputs for tokens [B, L] and a padding mask [B, L], by node name."""
    known = text_inputs(ids, mask)
    return {n.name: known[str(n.target)] for n in module.graph.nodes if n.op == "placeholder"}


class LanguageModel:
    """A graph that gives logits, as a body and a head, so that few logits exist at once.

    taps: names of more values that the body returns. given: names of values that it takes
    instead of computing them.
    """

    def __init__(
        self,
        module: GraphModule,
        frozen: Frozen,
        trained: set[str] | None = None,
        taps: tuple[str, ...] = (),
        given: tuple[str, ...] = (),
        checkpointing: bool = False,
    ) -> None:
        trained = trained or set()
        logits: Any = module.graph.output_node().args[0][0]  # type: ignore[index]
        start = _head_input(logits)
        self.module, self.taps = module, taps
        names, outputs = [*inputs_of(module), *given], [start.name, *taps]
        options: dict[str, Any] = {"trained": trained, "frozen": frozen}
        self.body = extract(module, names, outputs, **options)
        self.chain = segments(module, names, outputs, **options) if checkpointing else None
        self.start = start.name
        self.head = extract(module, [start.name], [logits.name], **options)

    def hidden(
        self, values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the head reads, [B, L, D], and the taps by name."""
        if self.chain is not None and torch.is_grad_enabled():
            return self._checkpointed(values, tensors)
        made = self.body(values, tensors)
        return made[0], dict(zip(self.taps, made[1:], strict=True))

    def _checkpointed(
        self, values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.chain is not None
        known: dict[str, Any] = dict(values)
        for piece in self.chain:
            given = [known[n] for n in piece.inputs] + [tensors[n] for n in piece.trained]
            made = checkpoint(piece.module, *given, use_reentrant=False)
            known |= dict(zip(piece.outputs, made, strict=True))
        return known[self.start], {n: known[n] for n in self.taps}

    def logits(self, hidden: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.head({self.start: hidden}, tensors)[0]


def _head_input(logits: Node) -> Node:
    """What the head's linear reads, when only pointwise ops follow it; else the logits."""
    node = logits
    while node.target in POINTWISE and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    linear = as_linear(node)
    return linear.input if linear is not None and node.target is LINEAR else logits


class Stage(nn.Module, ABC):
    """Parameters of a stage under their own names, the teacher, and the regions.

    Calling it gives `loss` and, by region, `errors`. With `score=True` it gives the loss of
    every token instead, `nll` [B, L - 1], of the student as it is.
    """

    regions: list[Region]
    pieces: list[Piece]
    taps: tuple[str, ...]
    teacher: Any  # a LanguageModel, or a Piece when no logits are asked for
    teacher_graph: GraphModule
    student: LanguageModel
    rest: LanguageModel

    def __init__(
        self,
        student: GraphModule,
        teacher: GraphModule,
        regions: list[Region],
        trained: dict[str, Tensor],
        frozen: Frozen,
        teacher_head: bool,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.names = list(trained)
        self.shapes = {n: t.shape for n, t in trained.items()}
        for name, tensor in trained.items():
            value = tensor.detach().to(frozen.device, copy=True)
            place(self, name, nn.Parameter(value))
        wanted = set(trained)
        taps = tuple(dict.fromkeys(n for r in regions for n in (*r.inputs, r.target)))
        # Frozen parts are no submodules: neither saved, nor sharded, nor sent anywhere.
        hold = object.__setattr__
        hold(self, "regions", regions)
        hold(
            self,
            "pieces",
            [extract(student, r.inputs, [r.output], wanted, frozen) for r in regions],
        )
        inside = set(inputs_of(teacher))
        shared = shared_values(student, teacher, wanted) if teacher_head else ()
        taps = tuple(t for t in dict.fromkeys((*taps, *shared)) if t not in inside)
        if teacher_head:
            hold(self, "teacher", LanguageModel(teacher, frozen, taps=taps))
        else:
            hold(self, "teacher", extract(teacher, inputs_of(teacher), taps, (), frozen))
        hold(self, "teacher_graph", teacher)
        hold(self, "taps", taps)
        hold(self, "student", LanguageModel(student, frozen, wanted))
        if teacher_head:  # what teacher and student have in common is computed once
            given = tuple(t for t in shared if t not in inside)
            options: dict[str, Any] = {"given": given, "checkpointing": checkpointing}
            hold(self, "rest", LanguageModel(student, frozen, wanted, **options))

    def tensors(self) -> dict[str, Tensor]:
        return {n: self.get_parameter(n) for n in self.names}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, score: bool = False
    ) -> dict[str, Tensor]:
        if score:
            return {"nll": self._score(input_ids)}
        return self.losses(input_ids, attention_mask)

    @abstractmethod
    def losses(self, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """The stage's `loss` [] and `errors` [regions] on tokens [B, L]."""

    def _score(self, ids: Tensor) -> Tensor:
        tensors = self.tensors()
        with torch.no_grad():
            return token_losses(self.student, ids, tensors)

    def region_losses(
        self, values: Mapping[str, Tensor], tensors: dict[str, Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Sum of the regions' relative errors, and each of them; every graph is freed at once."""
        total = torch.zeros((), device=next(iter(values.values())).device)
        errors = []
        for region, piece in zip(self.regions, self.pieces, strict=True):
            error = region_error(region, piece, values, tensors, mask)
            errors.append(error.detach())
            total = total + error
        return total, torch.stack(errors)


def shared_values(student: GraphModule, teacher: GraphModule, trained: set[str]) -> tuple[str, ...]:
    """Values that no trained or rewritten node has touched, at the border to those that one has."""
    theirs = {n.name: n for n in teacher.graph.nodes}
    touched: set[Node] = set()
    for node in student.graph.nodes:
        if node.op == "get_attr":
            own = str(node.target) in trained
        else:
            other = theirs.get(node.name)
            own = node.op == "call_function" and (other is None or _differs(node, other))
        if own or any(n in touched for n in node.all_input_nodes):
            touched.add(node)
    return tuple(
        n.name
        for n in student.graph.nodes
        if n not in touched and n.op == "call_function" and any(u in touched for u in n.users)
    )


def _differs(node: Node, other: Node) -> bool:
    """Other arguments than in the teacher (a window, say), apart from where its inputs lie."""
    return repr((node.args, node.kwargs)) != repr((other.args, other.kwargs))


def region_error(
    region: Region,
    piece: Piece,
    values: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    mask: Tensor | None,
) -> Tensor:
    """Relative squared error of one region on the teacher's inputs."""
    used = [tensors[n] for n in piece.trained]
    made = piece(values, tensors)[0]
    error = relative_error(made, values[region.target], mask)
    if not (torch.is_grad_enabled() and used):
        return error
    found = torch.autograd.grad(error, used, allow_unused=True)
    gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(used, found, strict=True)]
    return known_gradients(error, used, gradients)


class TransferStage(Stage):
    """Every region alone, on the teacher's own inputs; loss: mean relative error of them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, teacher_head=False)  # type: ignore[misc]

    def losses(self, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        values: dict[str, Tensor] = input_values(self.teacher_graph, ids, mask)
        with torch.no_grad():
            made = self.teacher(values, {})
        values |= dict(zip(self.taps, made, strict=True))
        total, errors = self.region_losses(values, self.tensors(), mask)
        return {"loss": total / len(errors), "errors": errors}


class DistilStage(Stage):
    """The whole student against the teacher's logits, and the regions as in transfer."""

    def __init__(self, options: Distil, *args: Any) -> None:
        super().__init__(*args, teacher_head=True, checkpointing=options.checkpointing)  # type: ignore[misc]
        self.options = options

    def losses(self, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        o, tensors = self.options, self.tensors()
        values: dict[str, Tensor] = input_values(self.teacher_graph, ids, mask)
        teacher, student = self.teacher, self.rest
        with torch.no_grad():
            truth, taps = teacher.hidden(values, {})
        values |= taps
        hidden, _ = student.hidden(values | input_values(student.module, ids, mask), tensors)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        following = torch.roll(ids, -1, 1)
        scored = real & torch.roll(real, -1, 1)
        scored[:, -1] = False
        rows = real.flatten()
        mine, true = hidden.flatten(0, 1), truth.flatten(0, 1)
        weights = real.flatten().float() / rows.sum()
        hard = scored.flatten().float() / scored.sum().clamp_min(1)
        labels = following.flatten()
        used = [tensors[n] for n in student.head.trained]

        def part(chunk: Tensor, where: slice) -> Tensor:
            ours = student.logits(chunk, tensors)
            value = torch.zeros((), device=chunk.device)
            if o.logits_weight:
                with torch.no_grad():
                    theirs = teacher.logits(true[where], {})
                each = logits_loss(o.logits, ours, theirs, o.temperature)
                value = value + o.logits_weight * (each * weights[where]).sum()
            if o.ce_weight:
                each = cross_entropy(ours.float(), labels[where], reduction="none")
                value = value + o.ce_weight * (each * hard[where]).sum()
            return value

        training = torch.is_grad_enabled() and hidden.requires_grad
        loss = in_chunks(part, mine, used, training)
        result = {"logits_loss": loss.detach()}
        if o.layer_weight and self.regions:
            total, errors = self.region_losses(values, tensors, mask)
            loss = loss + o.layer_weight * total / len(errors)
            result["errors"] = errors
        return result | {"loss": loss}


@torch.no_grad()
def token_losses(model: LanguageModel, ids: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Negative log-likelihood of every token but the first, [B, L - 1]."""
    hidden, _ = model.hidden(input_values(model.module, ids), tensors)
    rows, labels = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    found = []
    chunk = positions_at_once(rows)
    for start in range(0, len(rows), chunk):
        logits = model.logits(rows[start : start + chunk], tensors).float()
        found.append(cross_entropy(logits, labels[start : start + chunk], reduction="none"))
    return torch.cat(found).view(ids.shape[0], -1)
