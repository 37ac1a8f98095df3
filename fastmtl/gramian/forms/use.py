"""What the closed forms have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from fastmtl.gramian.saved import is_plain
from fastmtl.graph import Edge
from fastmtl.inputs import DTYPES

__all__ = ["Use"]


class Use(ABC):
    """One use of a parameter: its gradient is G_t = B_tᵀ A in each of g groups, A the same for all tasks.

    Attributes:
        edge: where the cotangents arrive.
        groups: number of groups g.
        rows: N, rows of A and B_t: samples times positions.
        width: O, columns of B_t.
        depth: I, columns of A.
        side: which dimension of the parameter the columns of B_t are, 0 or 1.
        is_indexed: whether the rows of A are unit vectors.
        outer, lead: a cotangent is [outer, lead, ...] in memory, with the rows of A one after the other along `lead`.
        order, views: of the parameter, as in `Consumer`.
    """

    is_indexed: bool = False
    order: Hashable = None
    views: tuple[Any, ...] = ()
    groups: int
    rows: int
    width: int
    depth: int
    side: int
    outer: int
    lead: int

    def __init__(
        self,
        node: Any,
        *,
        groups: int = 1,
        rows: int,
        width: int,
        depth: int,
        side: int,
        outer: int = 1,
        lead: int | None = None,
    ) -> None:
        self.edge: Edge = (node, 0)
        self.groups, self.rows, self.width, self.depth, self.side = groups, rows, width, depth, side
        self.outer, self.lead = outer, rows if lead is None else lead

    @property
    def node(self) -> Any:
        """The graph node of the operation."""
        return self.edge[0]

    @property
    def shape(self) -> torch.Size:
        """Shape of one cotangent as it arrives."""
        return torch.Size(self.node._input_metadata[0].shape)

    @property
    def elements(self) -> int:
        """Number of entries of one cotangent."""
        return math.prod(self.shape)

    def _reads(self, x: Tensor) -> bool:
        """Whether the formulas are for what the operation saved."""
        return is_plain(x, self.node._input_metadata[0].device) and x.dtype in DTYPES

    @abstractmethod
    def hold(self) -> bool:
        """Keeps what the operation saved, before a pass frees it; False if the form does not apply."""

    @abstractmethod
    def factor(self, dtype: torch.dtype) -> Tensor:
        """A [g, N, I] in this dtype, or for a matrix of unit vectors their indices, int64 [N]."""

    @abstractmethod
    def cotangents(self, arrived: Tensor) -> Tensor:
        """B [c, g, N, O] from c cotangents as they arrived."""

    @abstractmethod
    def gradient(self, cotangent: Tensor) -> Tensor:
        """The gradient from one cotangent of the output, in the parameter's order, or as `views` rearranged it."""

    def whole_gradient(self, cotangent: Tensor, shape: torch.Size) -> Tensor:
        """The same in the shape of the parameter or block itself."""
        return self.restored(self.gradient(cotangent), shape)

    def restored(self, g: Tensor, shape: torch.Size) -> Tensor:
        """A gradient that is in the order of `views`, in the shape of the parameter or block itself."""
        if self.views:
            g = g.reshape(self.views[0]._input_metadata[0].shape)
        for node in self.views:
            g = node(g)
        return g.reshape(shape)

    def owners_of_rows(self, owners: Tensor) -> Tensor:
        """For each of the N rows the entry of `owners` for its place along `lead`."""
        return owners.repeat_interleave(self.rows // self.lead) if self.lead else owners

    @property
    def is_scattered(self) -> bool:
        """Whether the rows are anything but those along `lead`, each equally often."""
        return False
