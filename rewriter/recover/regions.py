"""The regions that recovery trains: what a rewrite made, and the teacher's value it should make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from rewriter.errors import RewriterError
from rewriter.graph import layer_of, path_of
from rewriter.recover.graphs import needed_by


@dataclass(frozen=True)
class Region:
    """One rewritten place of the student, and the value of the teacher that it should make.

    site: module path. made_by: name of the pass. inputs: values (of teacher and student alike)
    that it reads. output: its value in the student. target: the same in the teacher.
    tensors: names of the parameters that only it uses.
    """

    site: str
    made_by: str
    inputs: tuple[str, ...]
    output: str
    target: str
    tensors: tuple[str, ...]

    @property
    def layer(self) -> int | None:
        return layer_of(self.site)


def find_regions(
    student: GraphModule,
    teacher: GraphModule,
    sites: list[dict[str, Any]],
    whole_layer: bool = False,
) -> list[Region]:
    """Regions of a lock's sites in the (stateless) student.

    Args:
        sites: entries of `lock["sites"]`: `site`, `pass` and, where the value has a new name,
            `output` and `original`.
        whole_layer: a region is the decoder layer around the site, not the site alone.

    Raises RewriterError: the teacher is not the model that the student was made from.
    """
    names = {n.name: n for n in teacher.graph.nodes}
    _check_same(student, names)
    renamed = {s["output"]: s["original"] for s in sites if s.get("output")}
    paths: dict[str, str] = {}
    for entry in sites:
        path = entry["site"]
        if whole_layer and layer_of(path) is not None:
            path = _layer_path(path)
        paths.setdefault(path, entry["pass"])
    for path in list(paths):  # a linear inside of a replaced attention belongs to it
        if any(path != other and path.startswith(other + ".") for other in paths):
            del paths[path]
    users: dict[str, set[str]] = {}
    for node in student.graph.nodes:
        if node.op == "get_attr":
            users.setdefault(str(node.target), set()).update(u.name for u in node.users)
    return [_region(student, names, renamed, p, by, users) for p, by in paths.items()]


def _layer_path(path: str) -> str:
    parts = path.split(".")
    index = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: index + 1])


def _check_same(student: GraphModule, teacher: dict[str, Node]) -> None:
    for node in student.graph.nodes:
        other = teacher.get(node.name)
        if other is not None and node.op == "call_function" and other.target != node.target:
            raise RewriterError(
                f"{node.name} is {other.target} in the original and {node.target} in this model",
                "give the model that this one was made from, and the same versions of libraries",
            )


def _region(
    student: GraphModule,
    teacher: dict[str, Node],
    renamed: dict[str, str],
    path: str,
    made_by: str,
    users: dict[str, set[str]],
) -> Region:
    def inside(node: Node) -> bool:
        return path_of(node) == path or path_of(node).startswith(path + ".")

    nodes = [n for n in student.graph.nodes if n.op == "call_function" and inside(n)]
    members = set(nodes)
    outputs = [n for n in nodes if any(u not in members for u in n.users)]
    if len(outputs) != 1:
        found = ", ".join(n.name for n in outputs) or "nothing"
        raise RewriterError(f"{path} should make one value for the rest of the model, not {found}")
    output = outputs[0]
    target = output.name if output.name in teacher else renamed.get(output.name, "")
    if target not in teacher:
        raise RewriterError(
            f"the original has no value for the output of {path}",
            "rewrite the model again with this version",
        )
    reached = needed_by([output], {n for n in student.graph.nodes if n not in members})
    inputs = [
        n for n in student.graph.nodes if n in reached and n not in members and n.op != "get_attr"
    ]
    for node in inputs:
        if node.name not in teacher:
            raise RewriterError(f"{path} reads {node.name}, which the original does not compute")
    own = [str(n.target) for n in student.graph.nodes if n in reached and n.op == "get_attr"]
    member_names = {n.name for n in members}
    tensors = [n for n in dict.fromkeys(own) if users[n] <= member_names]
    return Region(path, made_by, tuple(n.name for n in inputs), output.name, target, tuple(tensors))
