"""Finds where each loss's own part of the graph ends, and how parameters are used beyond it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastmtl.gramian.saved import Saved, is_builtin
from fastmtl.gramian.views import View
from fastmtl.graph import SEVERAL, Edge, edge_of, signed

__all__ = ["SPLITS", "Consumer", "Part", "Survey", "parts_of", "survey"]

# Operations on activations that cost next to nothing.
_FREE = frozenset({"TBackward0", "TransposeBackward0", "ToCopyBackward0"})
# Operations that pass a parameter on in disjoint blocks.
SPLITS = {
    "SplitBackward0": Saved("dim", "split_size", "self_sym_sizes"),
    "SplitWithSizesBackward0": Saved("dim", "split_sizes", "self_sym_sizes"),
}


class Consumer(NamedTuple):
    """An operation that reads a parameter.

    Attributes:
        node: its graph node.
        operand: which of its inputs the parameter is.
        flipped: whether it reads the transpose.
        way: the outputs of the operations that passed the parameter on.
        order: identifies the order in which the parameter is read; None for its own, or the transpose's.
        views: the operations that rearranged it, the last one first, if there is an order.
    """

    node: Any
    operand: int
    flipped: bool
    way: tuple[Edge, ...]
    order: Hashable = None
    views: tuple[Any, ...] = ()


class Part(NamedTuple):
    """A parameter, or one of the blocks that it is split into.

    Attributes:
        consumers: the operations that read it.
        block: dimension, start and length of the block.
    """

    consumers: list[Consumer]
    block: tuple[int, int, int] | None


class Survey(NamedTuple):
    """The graph of T losses, cut where each loss's own part of it ends.

    Attributes:
        frontier: the edges that lead out of some loss's own part.
        open_ends: the same edges as a set.
        boundary: the nodes of those parts with such edges: which of a node's inputs, and which edge of `frontier`.
        whole: losses that another loss depends on, or that were passed twice: which loss, which edge of `frontier`.
        nested: whether an edge of the frontier lies behind another.
        nodes: the shared nodes that compute.
        opaque: whether some of them are not autograd's own: functions in Python, and what runs hooks of modules.
        users: for every shared node, the shared nodes that read its outputs: the node, its input, the output.
    """

    frontier: list[Edge]
    open_ends: frozenset[Edge]
    boundary: dict[Any, list[tuple[int, int]]]
    whole: list[tuple[int, int]]
    nested: bool
    nodes: list[Any]
    opaque: bool
    users: dict[Any, list[tuple[Any, int, int]]]


def survey(losses: Sequence[Tensor | None], owner: dict[Any, int]) -> Survey:
    """The survey of a graph whose nodes belong to one loss or to several; None is an absent loss.

    Raises:
        NotImplementedError: autograd takes no cotangents at the end of a loss's own part of the graph.
    """
    frontier: dict[Edge, int] = {}
    boundary: dict[Any, list[tuple[int, int]]] = {}
    users: dict[Any, list[tuple[Any, int, int]]] = {}
    whole = [
        (t, frontier.setdefault(edge, len(frontier)))
        for t, loss in enumerate(losses)
        if loss is not None and owner[(edge := edge_of(loss))[0]] == SEVERAL
    ]
    for node, t in owner.items():
        for i, edge in enumerate(node.next_functions):
            if owner.get(edge[0]) != SEVERAL:
                continue
            if t == SEVERAL:
                users.setdefault(edge[0], []).append((node, i, edge[1]))
            else:
                boundary.setdefault(node, []).append((i, frontier.setdefault(edge, len(frontier))))
    nodes = [node for node, t in owner.items() if t == SEVERAL and node.next_functions and node.name() not in _FREE]
    for node, output in frontier:
        if node._input_metadata[output].is_cpp_nested_tensor:
            raise NotImplementedError(
                f"several losses read a nested tensor of layout torch.strided, the result of {node.name()}, where "
                "torch.jagged is needed"
            )
    nested = any(node in users for node, _ in frontier)
    opaque = not all(map(is_builtin, nodes))
    return Survey(list(frontier), frozenset(frontier), boundary, whole, nested, nodes, opaque, users)


def parts_of(node: Any, graph: Survey) -> list[Part] | None:
    """What reads a parameter, given its node: one part, or one for each of the disjoint blocks that it is split into.

    None if a loss's own part of the graph reads it, too, or one of its blocks.
    """
    users = graph.users.get(node, ())
    split = users[0][0] if len(users) == 1 and (node, 0) not in graph.open_ends else None
    if split is None or (saved := SPLITS.get(split.name())) is None or not saved.covers(split):
        edges: list[tuple[Edge, tuple[int, int, int] | None]] = [((node, 0), None)]
    else:
        edges = [((split, output), _block(split, output)) for output in range(len(split._input_metadata))]
    try:
        parts = [
            Part(list(_consumers(edge, graph, View(edge), () if block is None else (edge,))), block)
            for edge, block in edges
        ]
    except _ReadElsewhere:
        return None
    return [part for part in parts if part.consumers]


def _block(split: Any, output: int) -> tuple[int, int, int]:
    dim = signed(split._saved_dim)
    lengths = [x.shape[dim] for x in split._input_metadata[: output + 1]]
    return dim, sum(lengths[:-1]), lengths[-1]


class _ReadElsewhere(Exception):
    pass


def _consumers(edge: Edge, graph: Survey, view: View, way: tuple[Edge, ...]) -> Iterator[Consumer]:
    if edge in graph.open_ends:
        raise _ReadElsewhere
    for user, operand, output in graph.users.get(edge[0], ()):
        if output != edge[1]:
            continue
        following = view.through(user)
        if following is None:
            flipped, order = view.order()
            yield Consumer(user, operand, flipped, way, order, () if order is None else view.nodes)
        else:
            yield from _consumers((user, 0), graph, following, (*way, (user, 0)))
