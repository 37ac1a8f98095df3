"""What the gradients of B losses are computed from: factors of weights, and entries of entrywise parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastmtl.gramian.contraction import from_block
from fastmtl.gramian.examples.layout import Layout
from fastmtl.gramian.examples.products import Gram, through_rows
from fastmtl.gramian.forms import Entrywise, Use
from fastmtl.gramian.forms.convolution import Convolution
from fastmtl.graph import Edge

__all__ = ["Arrived", "Entries", "Key", "Weight", "factors", "key", "rows_of_entries"]

_FEW = 2  # times the numbers that a convolution reads and returns: the most that its windows may hold at once

Key: TypeAlias = "tuple[Edge, int, int]"


class Arrived(NamedTuple):
    """What the passes brought.

    Attributes:
        cotangents: by the edge where they arrived, of all tasks [T, ...].
        layouts: which rows belong to which example, by the `key` of a use.
        examples: B.
        dtype: of products.
    """

    cotangents: dict[Edge, Tensor]
    layouts: Mapping[Key, Layout]
    examples: int
    dtype: torch.dtype

    def of(self, edge: Edge) -> Tensor:
        """A use's cotangents in the dtype of products."""
        return self.cotangents[edge].to(self.dtype)

    def layout(self, use: Use | Entrywise) -> Layout:
        """Which rows of its cotangents belong to which example."""
        return self.layouts[key(use)]


def key(use: Use | Entrywise) -> Key:
    """What the layout of a use's rows depends on: the edge where they arrive, and how they are counted."""
    return use.edge, use.outer, use.lead


def factors(use: Use, arrived: Arrived) -> tuple[Tensor, Tensor]:
    """A [g, B, S, I] (or ids [B, S]) and C [g, T, B, S, O]."""
    layout, B = arrived.layout(use), arrived.examples
    if use.is_scattered:
        layout = Layout(owner=use.owners_of_rows(layout.owners(use.lead, B, arrived.cotangents[use.edge].device)))
    elif layout.owner is not None:
        layout = Layout(owner=use.owners_of_rows(layout.owner))
    c = use.cotangents(arrived.of(use.edge))
    T, g, N, width = c.shape
    C = layout.by_example(c.reshape(T * g, N, width), B)
    C = C.view(T, g, *C.shape[1:]).transpose(0, 1)
    A = use.factor(arrived.dtype)
    if use.is_indexed:
        return layout.by_example(A.view(1, N, 1), B)[0, ..., 0], C
    return layout.by_example(A, B), C


class Weight:
    """A weight, or one of the blocks that it is split into, of which every use has a closed form.

    Attributes:
        parameter: the weight.
        uses: its uses.
        bias: the bias, if there is a single use with one row for each example: one more column of A, of ones.
    """

    def __init__(self, parameter: Tensor, uses: Sequence[Use], block: tuple[int, int, int] | None) -> None:
        self.parameter, self.uses, self._block = parameter, uses, block
        self.bias: Tensor | None = None
        self._rows: Tensor | None = None

    @property
    def edges(self) -> list[Edge]:
        """Where cotangents are needed."""
        return [use.edge for use in self.uses]

    def has_rows(self, B: int) -> bool:
        """Whether gradients are sums of several rows, which may cancel."""
        return not self.uses[0].is_indexed and (len(self.uses) > 1 or self.uses[0].rows > B)

    def add(self, gram: Gram, arrived: Arrived) -> Tensor | None:
        """Adds its contribution to the Gram matrix; returns the sizes [T, B] of the terms summed, if they matter."""
        self._rows, sizes = None, None
        if (C := self._windowed(gram, arrived)) is not None:
            use = self.uses[0]
            assert isinstance(use, Convolution)
            sizes, rows = gram.add_windows(use, C)
            self._rows = None if rows is None else rows[None]
            return sizes
        sides = []
        for side in (0, 1):
            found = [factors(u, arrived) for u in self.uses if u.side == side and u.edge in arrived.cotangents]
            if found:
                all_A, all_C = zip(*found, strict=True)
                sides.append((_cat(all_A, 1 if all_A[0].dim() == 2 else 2), _cat(all_C, 3)))
        for A, C in sides:
            if A.dim() == 2:
                gram.add_indexed(A, C[0])
                continue
            parts = []
            for a, c in zip(A, C, strict=True):
                size, formed = gram.add_factors(a, c, self.bias is not None)
                sizes = size if sizes is None or size is None else sizes + size
                parts.append(formed)
            if len(sides) == 1 and parts[0] is not None:
                self._rows = parts[0][None] if len(parts) == 1 else torch.stack([x for x in parts if x is not None])
        if len(sides) == 2:
            (A, C), (E, D) = sides
            # On side 0 a gradient is Cᵀ A, on side 1 its transpose: A on one side corresponds to D on the other.
            gram.add_cross(A if A.dim() == 2 else A[0], C[0], E if E.dim() == 2 else E[0], D[0])
        return sizes

    def _windowed(self, gram: Gram, arrived: Arrived) -> Tensor | None:
        """The cotangents [T, B, S, O] of a convolution whose windows should not all be made at once, else None."""
        use = self.uses[0]
        single = len(self.uses) == use.groups == 1 and self.bias is None and use.edge in arrived.cotangents
        if not single or not isinstance(use, Convolution):
            return None
        layout = arrived.layout(use)
        if layout.owner is not None or layout.pre != 1 or use.rows * use.depth <= _FEW * (use.inputs + use.elements):
            return None
        C = use.of_samples(arrived.of(use.edge))
        return None if through_rows(gram, C, use.depth) else C

    def single(self, gram: Gram, arrived: Arrived) -> tuple[Tensor, Tensor, bool] | None:
        """A [B, I], C [B, O] and whether there is a bias, if each example has one row, in a single use and task."""
        use = self.uses[0]
        if not (
            gram.T == len(self.uses) == use.groups == use.outer == 1
            and use.rows == use.lead == gram.B
            and not use.is_indexed
            and use.edge in arrived.cotangents
            and arrived.layout(use).owner is None
        ):
            return None
        return use.factor(arrived.dtype)[0], use.cotangents(arrived.of(use.edge))[0, 0], self.bias is not None

    def gradients(self, alpha: Tensor, arrived: Arrived) -> Iterator[tuple[Tensor, Tensor]]:
        """The weight and Σ α_tb g_tb of its gradients; alpha [T, B]."""
        used = [use for use in self.uses if use.edge in arrived.cotangents]
        if not used:
            return
        shape = (self.parameter if self._block is None else self.parameter.narrow(*self._block)).shape
        if self._rows is not None:
            a = alpha.to(self._rows.dtype)
            g = torch.tensordot(a, self._rows, ([0, 1], [1, 2]))  # [g, O, I]
            g = used[0].restored(g if used[0].side == 0 else g.mT, shape)
        else:
            g = None
            for use in used:
                weighted = self._weighted(use, alpha, arrived)
                if self.bias is not None:
                    yield self.bias, weighted.sum(0, dtype=arrived.dtype).to(self.bias.dtype)
                own = use.whole_gradient(weighted, shape)
                g = own if g is None else g + own
        yield self.parameter, from_block(g, self.parameter, self._block)

    @staticmethod
    def _weighted(use: Use, alpha: Tensor, arrived: Arrived) -> Tensor:
        c, layout = arrived.cotangents[use.edge], arrived.layout(use)
        weighted = layout.times(c, alpha.to(c.dtype), use.outer)
        return weighted[0] if len(weighted) == 1 else weighted.sum(0)


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat(list(tensors), dim) if len(tensors) > 1 else tensors[0]


class Entries:
    """A parameter, or a block of one, that is broadcast in each of its uses: its gradients [T, B, P] are formed.

    Args:
        parameter: the parameter.
        uses: its uses, and whether each reads the transpose.
        block: dimension, start and length of the block.
    """

    def __init__(
        self, parameter: Tensor, uses: Sequence[tuple[Entrywise, bool]], block: tuple[int, int, int] | None
    ) -> None:
        self.parameter, self.uses, self._block = parameter, uses, block
        self._rows: Tensor | None = None

    @property
    def edges(self) -> list[Edge]:
        """Where cotangents are needed."""
        return [use.edge for use, _ in self.uses]

    def bias_of(self) -> Any:
        """The node of the matrix product whose bias this is, and nothing else; None if there is none."""
        use, _ = self.uses[0]
        plain = len(self.uses) == 1 and self._block is None and use.node.name() == "AddmmBackward0"
        return use.node if plain else None

    def form(self, arrived: Arrived) -> Tensor | None:
        """The gradients [T, B, P]; None if none arrives."""
        parts = []
        for use, flipped in self.uses:
            if use.edge in arrived.cotangents:
                rows = rows_of_entries(use, arrived)
                parts.append((rows.mT if flipped else rows).reshape(*rows.shape[:2], -1))
        self._rows = sum(parts[1:], parts[0]) if parts else None
        return self._rows

    def gradients(self, alpha: Tensor, arrived: Arrived) -> Iterator[tuple[Tensor, Tensor]]:
        """The parameter and Σ α_tb g_tb of its gradients; alpha [T, B]."""
        if self._rows is not None:
            g = alpha.to(self._rows.dtype).flatten() @ self._rows.flatten(0, 1)
            yield self.parameter, from_block(g, self.parameter, self._block)


def rows_of_entries(use: Entrywise, arrived: Arrived) -> Tensor:
    """The gradients [T, B, *operand] of what an operation reads entry by entry."""
    g, layout, B = use.products(arrived.of(use.edge)), arrived.layout(use), arrived.examples
    T, k = len(g), use.leading
    dims = None if layout.owner is not None else _dims(use, layout.pre, B)
    if dims is not None:
        sizes, varies, at = dims
        g = g.reshape(T, *sizes)
        gone = [d + 1 for d, v in enumerate(varies) if not v and d != at]
        g = g.sum(gone, keepdim=True) if gone else g
        return g.movedim(at + 1, 1).reshape(T, B, *use.operand)
    owner = layout.owners(use.lead, B, g.device)
    if all(n == 1 for n in use.spread[:k]):
        out = g.new_zeros(T, B, math.prod(use.shape[k:]))
        return out.index_add_(1, owner, g.reshape(T, use.lead, -1)).view(T, B, *use.operand)
    out = g.new_zeros(T, B, *use.spread)  # the parameter varies along the examples
    for b in owner.unique().tolist():
        mine = (owner == b).view(*use.shape[:k], *[1] * (len(use.shape) - k))
        out[:, b] = torch.where(mine, g, 0).sum_to_size(T, *use.spread)
    return out.reshape(T, B, *use.operand)


def _dims(use: Entrywise, pre: int, B: int) -> tuple[list[int], list[bool], int] | None:
    """A cotangent's dimensions, split so that one is that of the examples: sizes, and whether the parameter varies."""
    ends, product = [], 1
    for n in use.shape:
        product *= n
        ends.append(product)
    if B == 1:
        return [1, *use.shape], [False, *(n > 1 for n in use.spread)], 0
    wanted = sorted({*ends, pre, pre * B} - {1})
    sizes: list[int] = []
    varies: list[bool] = []
    at, before = None, 1
    for end in wanted:
        if end % before:
            return None
        if before == pre and end == pre * B:
            at = len(sizes)
        k = next(k for k, stop in enumerate(ends) if stop >= end)  # the dimension that this is a part of
        whole = use.shape[k] == end // before
        if use.spread[k] > 1 and (not whole or (before >= pre and end <= pre * B)):
            return None
        sizes.append(end // before)
        varies.append(use.spread[k] > 1)
        before = end
    return None if at is None else (sizes, varies, at)
