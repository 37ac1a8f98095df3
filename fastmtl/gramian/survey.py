"""Where the parts of the graph that belong to one loss end, and how parameters are used behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastmtl._graph import SEVERAL, Edge, edge_of

__all__ = ["Consumer", "Part", "Survey", "parts_of", "survey"]

# What an operation that only passes a parameter on does to it: whether it transposes it.
_PASSED_ON = {"TBackward0": True, "TransposeBackward0": True, "ToCopyBackward0": False}
_SPLITS = ("SplitBackward0", "SplitWithSizesBackward0")


class Consumer(NamedTuple):
    """An operation that reads a parameter.

    Attributes:
        node: its graph node.
        operand: which of its inputs the parameter is.
        flipped: whether it reads the transpose.
        passed: whether another operation has handed the parameter on.
    """

    node: Any
    operand: int
    flipped: bool
    passed: bool


class Part(NamedTuple):
    """A parameter, or one of the blocks that it is split into.

    Attributes:
        consumers: who reads it.
        block: dimension, start and length of the block.
    """

    consumers: list[Consumer]
    block: tuple[int, int, int] | None


class Survey(NamedTuple):
    """The graph of T losses, cut where their own parts of it end.

    Attributes:
        frontier: the edges that lead out of some loss's own part.
        boundary: the nodes of those parts that have such edges: which of its inputs, and which edge of `frontier`.
        whole: losses that another loss depends on, or that were passed twice: which loss, which edge of `frontier`.
        nested: whether an edge of the frontier lies behind another.
        nodes: the shared nodes that compute.
        users: for every shared node, the shared nodes that read its outputs: node, which input of it, which output.
    """

    frontier: list[Edge]
    boundary: dict[Any, list[tuple[int, int]]]
    whole: list[tuple[int, int]]
    nested: bool
    nodes: list[Any]
    users: dict[Any, list[tuple[Any, int, int]]]


def survey(losses: Sequence[Tensor], owner: dict[Any, int]) -> Survey:
    """The survey of a graph whose nodes belong to one loss or to several."""
    frontier: dict[Edge, int] = {}
    boundary: dict[Any, list[tuple[int, int]]] = {}
    users: dict[Any, list[tuple[Any, int, int]]] = {}
    whole = [
        (t, frontier.setdefault(edge, len(frontier)))
        for t, edge in enumerate(map(edge_of, losses))
        if owner[edge[0]] == SEVERAL
    ]
    for node, t in owner.items():
        for i, edge in enumerate(node.next_functions):
            if owner.get(edge[0]) != SEVERAL:
                continue
            if t == SEVERAL:
                users.setdefault(edge[0], []).append((node, i, edge[1]))
            else:
                boundary.setdefault(node, []).append((i, frontier.setdefault(edge, len(frontier))))
    nodes = [
        node for node, t in owner.items() if t == SEVERAL and node.next_functions and node.name() not in _PASSED_ON
    ]
    nested = any(node in users for node, _ in frontier)
    return Survey(list(frontier), boundary, whole, nested, nodes, users)


def parts_of(node: Any, graph: Survey) -> list[Part] | None:
    """Who reads a parameter, given its node: one part, or one for each of the disjoint blocks that it is split into.

    None where a loss's own part of the graph reads it too.
    """
    users = graph.users.get(node, ())
    split = users[0][0] if len(users) == 1 and users[0][0].name() in _SPLITS else None
    open_ends = set(graph.frontier)
    try:
        if split is None:
            return [Part(list(_consumers((node, 0), graph, open_ends, False, False)), None)]
        outputs = sorted({output for _, _, output in graph.users.get(split, ())})
        return [
            Part(list(_consumers((split, output), graph, open_ends, False, True)), _block(split, output))
            for output in outputs
        ]
    except _ReadElsewhere:
        return None


def _block(split: Any, output: int) -> tuple[int, int, int]:
    outputs = split._input_metadata
    dim = split._saved_dim if split._saved_dim < len(outputs[0].shape) else split._saved_dim - 2**64
    lengths = [x.shape[dim] for x in outputs[: output + 1]]
    return dim, sum(lengths[:-1]), lengths[-1]


class _ReadElsewhere(Exception):
    pass


def _consumers(edge: Edge, graph: Survey, open_ends: set[Edge], flipped: bool, passed: bool) -> Iterator[Consumer]:
    if edge in open_ends:
        raise _ReadElsewhere
    for user, operand, output in graph.users.get(edge[0], ()):
        if output != edge[1]:
            continue
        turns = _PASSED_ON.get(user.name())
        if turns is None:
            yield Consumer(user, operand, flipped, passed)
        else:
            yield from _consumers((user, 0), graph, open_ends, flipped ^ turns, True)
