"""Kinds of graphs, and what has been learned about them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from fastmtl.gramian.examples.layout import Layout
from fastmtl.graph import Leaves, edge_of

__all__ = ["Known", "Memory", "kind_of"]

_MOST = 64  # how many kinds are remembered
_SAID = ("_saved_training", "_saved_dim", "_saved_dim0", "_saved_dim1", "_saved_dims")

V = TypeVar("V")


class Known(NamedTuple):
    """What a check has found: places of nodes in the graph, and the layouts of all uses, in order."""

    constant: list[int]
    odd: list[int]
    layouts: list[Layout]


class Memory(dict[Hashable, V]):
    """Something about kinds of graphs, of which the last ones are remembered."""

    def __setitem__(self, kind: Hashable, value: V) -> None:
        if len(self) >= _MOST:
            self.pop(next(iter(self)))
        super().__setitem__(kind, value)


def kind_of(losses: Tensor, parameters: Sequence[Tensor], leaves: Leaves) -> Hashable:
    """What distinguishes graphs: operations, their shapes and dimensions, whether norms train, and what is shared."""
    places = {node: k for k, node in enumerate(leaves.owner)}
    said = (
        (node.name(), *(tuple(x.shape) for x in node._input_metadata), *(str(getattr(node, x, "")) for x in _SAID))
        for node in places
    )
    ways = (tuple((places.get(behind), k) for behind, k in node.next_functions) for node in places)
    shared = tuple(places.get(edge_of(p)[0]) for p in parameters)
    return losses.shape, losses.dtype, losses.device, shared, tuple(said), tuple(ways)
