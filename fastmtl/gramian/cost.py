"""What is cheaper: which form of a weight, cotangents all at once or one after another, which engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastmtl.gramian.contraction import BLOCK
from fastmtl.gramian.forms import Use
from fastmtl.gramian.survey import Survey
from fastmtl.inputs import DTYPES

__all__ = [
    "SECONDS",
    "Work",
    "closed",
    "features",
    "forward",
    "goes_at_once",
    "is_cheaper_explicit",
    "prefers_full",
    "rows_read",
]

# Next to a multiply-add of a large float32 product:
_GRAM = 4.0  # one of a float64 Gram matrix of explicit gradients, which are also written and read
_SMALL_PRODUCT = 4.0  # one of the T x T products of a row with all others

# Entries of one task's cotangents over the whole graph up to which operations cost more to launch than to run.
_TOGETHER = 1 << 19
_ALL = 1 << 24  # entries of all tasks' cotangents up to which they go through the graph together
# Operations that cannot be vectorised over cotangents, or then run one by one.
_ALONE = ("ScaledDotProduct", "Rnn")


@dataclass
class Work:
    """What a step costs, as far as the engines differ.

    Attributes:
        nodes: shared nodes that compute.
        entries: of one cotangent of each of them.
        at_once: whether all tasks' cotangents go through them at once.
        spared: multiply-adds of one task's gradients of the weights that are contracted; as many as forward.
        formed: the same of the explicit gradients.
        contracted: multiply-adds of the contractions, all tasks.
        explicit: entries of one task's explicit gradients.
        parameters: entries of one task's gradients.
    """

    nodes: int
    entries: int
    at_once: bool = False
    spared: float = 0.0
    formed: float = 0.0
    contracted: float = 0.0
    explicit: int = 0
    parameters: int = 0

    @classmethod
    def of(cls, graph: Survey, tasks: int) -> Work:
        """Work on the way through the shared part of a graph."""
        entries = sum(_entries(x) for node in graph.nodes for x in node._input_metadata)
        return cls(len(graph.nodes), entries, goes_at_once(graph, entries, tasks))


def _entries(x: Any, dimensions: slice = slice(None)) -> int:
    """The number of entries of a tensor, or of some of its dimensions; 0 for a nested one, which has no shape."""
    return 0 if x.is_nested_tensor else math.prod(x.shape[dimensions])


def forward(use: Use) -> float:
    """Multiply-adds of one task's gradient: as many as the operation itself takes."""
    return use.elements * (1 if use.is_indexed else use.depth)


def rows_read(users: Iterable[tuple[Any, int, int]]) -> float:
    """About how often operations of an unknown kind read a parameter: once for each row of what they return."""
    return sum(_entries(node._input_metadata[0], slice(-1)) for node, _, _ in users)


def closed(uses: Sequence[Use], T: int) -> float:
    """Multiply-adds of a contraction of all uses of a block, in units of those of a large float32 product."""
    total = 0.0
    for side in (0, 1):
        own = [use for use in uses if use.side == side]
        if own:
            total += _one_side(own[0], sum(use.rows for use in own), T)
    if len({use.side for use in uses}) == 2:
        one, other = (sum(use.rows for use in uses if use.side == side) for side in (0, 1))
        dense = uses[0] if not uses[0].is_indexed else uses[-1]
        total += one * other * T * (dense.depth + (0 if any(u.is_indexed for u in uses) else dense.width))
        total += one * other * T * T * _SMALL_PRODUCT
    return total


def _one_side(use: Use, N: int, T: int) -> float:
    if use.is_indexed:
        return T * N * use.width * (1.0 + T * _GRAM / 2)
    K = (N + min(N, BLOCK)) / 2  # of its symmetric matrix products, what is computed of a row
    return use.groups * N * (K * use.depth + T * K * use.width + T * T * use.width * _SMALL_PRODUCT)


def is_cheaper_explicit(blocks: Sequence[Sequence[Use]], T: int, parameters: int) -> bool:
    """Whether T explicit gradients of a weight of so many entries cost less than the closed forms of its blocks."""
    explicit = T * sum(forward(use) for uses in blocks for use in uses) + T * (T + 1) / 2 * parameters * _GRAM
    return explicit < sum(closed(uses, T) for uses in blocks)


def goes_at_once(graph: Survey, entries: int, T: int) -> bool:
    """Whether the cotangents of all tasks go through the graph at once, given how many entries those of one have."""
    if entries > _TOGETHER or entries * T > _ALL or graph.opaque:
        return False
    starts = [node._input_metadata[output] for node, output in graph.frontier]
    if len({x.device for x in starts}) > 1 or any(x.is_nested_tensor or x.dtype not in DTYPES for x in starts):
        return False
    return not any(part in node.name() for node in graph.nodes for part in _ALONE)


def features(work: Work, T: int) -> tuple[list[float], list[float]]:
    """What the times of the full engine and of this one are linear in: a row each, for the coefficients `SECONDS`."""
    w = work
    full = [
        T * w.nodes,
        0,
        T * w.entries,
        2 * T * (w.spared + w.formed),
        0,
        T * T * w.parameters,
        T * w.parameters,
        T,
        0,
    ]
    own = [
        w.nodes * (1 if w.at_once else T),
        w.nodes,
        T * w.entries,
        T * (w.spared + 2 * w.formed) + w.spared,
        w.contracted,
        T * T * w.explicit,
        T * w.explicit,
        0 if w.at_once else T,
        1,
    ]
    return full, own


# Seconds of a node, a node looked at, an entry of a cotangent, a multiply-add, one of a contraction, one of a Gram
# matrix, an entry of a gradient, a pass, and once. By `tools/fit_engine_costs.py` on two AVX-512 cores, from a run
# before the one in benchmarks/results, which judges them. Only ratios matter.
SECONDS = (1.2e-05, 2.8e-06, 9.9e-11, 1.1e-11, 1.9e-11, 4.3e-12, 3.9e-10, 0.00013, 0.002)


def prefers_full(work: Work, T: int) -> bool:
    """Whether T backward passes are faster than the gramian engine, on the machine that the coefficients are from."""
    full, own = (sum(x * c for x, c in zip(row, SECONDS, strict=True)) for row in features(work, T))
    return full < own
