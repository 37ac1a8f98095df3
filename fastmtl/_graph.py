"""What T losses reach in the autograd graph: their own leaves, common ones, and where their ways meet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

__all__ = ["SEVERAL", "Edge", "Leaves", "edge_of", "leaves_of", "nothing_behind", "trunk_of"]

# A graph node and the number of one of its outputs: what a tensor with a history stands for.
Edge: TypeAlias = "tuple[Any, int]"
SEVERAL = -1  # the owner of a node that several losses reach


class Leaves(NamedTuple):
    """The leaf tensors that T losses reach.

    Attributes:
        private: those that one loss alone reaches, for each loss.
        common: those that several reach.
        overlap: whether some losses share a part of the graph that a backward pass frees.
        owner: for every node that a loss reaches, which loss, or `SEVERAL`.
    """

    private: list[list[Tensor]]
    common: list[Tensor]
    overlap: bool
    owner: dict[Any, int]

    def all(self) -> list[Tensor]:
        """Every leaf."""
        return [*self.common, *(leaf for leaves in self.private for leaf in leaves)]

    def meet(self, tensors: Iterable[Tensor]) -> bool:
        """Whether one of the tensors is among them."""
        ids = {id(leaf) for leaf in self.all()}
        return any(id(x) in ids for x in tensors)

    def without(self, tensors: Iterable[Tensor]) -> Leaves:
        """The leaves that are none of these tensors."""
        ids = {id(x) for x in tensors}
        private = [[leaf for leaf in leaves if id(leaf) not in ids] for leaves in self.private]
        return Leaves(private, [leaf for leaf in self.common if id(leaf) not in ids], self.overlap, self.owner)


def leaves_of(losses: Sequence[Tensor], cut: list[Tensor]) -> Leaves:
    """The leaves that losses reach by ways that do not lead through the tensors of `cut`.

    Each graph node is visited at most twice: when the first loss finds it, and when a second loss shows it is common.
    """
    closed = {edge_of(x) for x in cut}
    owner: dict[Any, int] = {}
    leaves: dict[Any, Tensor] = {}

    overlap = False
    for t, loss in enumerate(losses):
        stack = [edge for edge in (edge_of(loss),) if edge not in closed]  # also where the loss itself is a parameter
        while stack:
            node, _ = stack.pop()
            known = owner.get(node)
            if known in (t, SEVERAL):
                continue
            owner[node] = t if known is None else SEVERAL
            successors = node.next_functions
            if successors:
                overlap |= known is not None
                stack.extend(edge for edge in successors if edge[0] is not None and edge not in closed)
            elif known is None and (variable := getattr(node, "variable", None)) is not None:
                leaves[node] = variable
    private: list[list[Tensor]] = [[] for _ in losses]
    common: list[Tensor] = []
    for node, variable in leaves.items():
        (common if owner[node] == SEVERAL else private[owner[node]]).append(variable)
    return Leaves(private, common, overlap, owner)


def trunk_of(cut: list[Tensor]) -> tuple[list[Tensor], bool]:
    """The leaves behind the tensors (themselves, where they are leaves), and whether one tensor lies behind another."""
    inside = {edge_of(x) for x in cut}
    leaves: list[Tensor] = []
    nested = False
    seen: set[Any] = set()
    stack = [node for node, _ in inside]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for edge in node.next_functions:
            nested |= edge in inside
            if edge[0] is not None:
                stack.append(edge[0])
        if not node.next_functions and (variable := getattr(node, "variable", None)) is not None:
            leaves.append(variable)
    return leaves, nested


def edge_of(x: Tensor) -> tuple[Any, int]:
    edge = get_gradient_edge(x)
    return edge.node, edge.output_nr


@contextmanager
def nothing_behind(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within, no gradient passes behind these tensors."""
    outputs: dict[Any, set[int]] = {}
    for x in tensors:
        node, output = edge_of(x)
        outputs.setdefault(node, set()).add(output)

    def close(node: Any) -> Any:
        stopped = outputs[node]
        return node.register_prehook(lambda grads: tuple(None if i in stopped else g for i, g in enumerate(grads)))

    handles = [close(node) for node in outputs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
