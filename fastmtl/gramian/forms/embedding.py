"""Embeddings, whose ids may repeat."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmtl.gramian.forms.use import Use
from fastmtl.gramian.saved import Saved, is_plain
from fastmtl.graph import signed

__all__ = ["BAG", "TABLE", "bag", "table"]

_MAX = 2  # a mode of bags whose gradient is another

TABLE = Saved("indices", "padding_idx", "scale_grad_by_freq", "weight_sym_argsize_0", sparse=False)

BAG = Saved(
    *("indices", "offsets", "mode", "padding_idx", "per_sample_weights", "weight_sym_argsize_0"),
    *("weight", "result1", "result2", "result3"),
    scale_grad_by_freq=False,
    sparse=False,
)


def table(node: Any, flipped: bool) -> Use | None:
    """The use of an embedding's table, if its gradients are dense."""
    return None if flipped else _Embedding(node)


def bag(node: Any, flipped: bool) -> Use | None:
    """The use of a table by sums or means of an embedding's rows."""
    try:
        return None if flipped or node._saved_mode == _MAX else _Bag(node)
    except RuntimeError:  # the graph was freed, which autograd reports
        return None


class _Embedding(Use):
    """A product with the matrix of the ids' unit vectors."""

    is_indexed = True

    _ids: Tensor

    def __init__(self, node: Any) -> None:
        self._padding = signed(node._saved_padding_idx)  # -1 where there is none
        *ids, width = node._input_metadata[0].shape
        super().__init__(node, rows=math.prod(ids), width=width, depth=node._saved_weight_sym_argsize_0, side=1)

    def hold(self) -> bool:
        self._ids = self.node._saved_indices
        return is_plain(self._ids, self.node._input_metadata[0].device)

    def factor(self, dtype: torch.dtype) -> Tensor:
        return self._ids.reshape(-1)

    def cotangents(self, arrived: Tensor) -> Tensor:
        B = arrived.reshape(len(arrived), 1, self.rows, self.width)
        ids = self._ids.reshape(-1)
        if self.node._saved_scale_grad_by_freq:
            _, place, counts = ids.unique(return_inverse=True, return_counts=True)
            B = B / counts[place].to(B.dtype)[:, None]
        return B if self._padding < 0 else B * (ids != self._padding).to(B.dtype)[:, None]

    def gradient(self, cotangent: Tensor) -> Tensor:
        frequencies = self.node._saved_scale_grad_by_freq
        backward: Callable[..., Tensor] = torch.ops.aten.embedding_dense_backward
        return backward(cotangent, self._ids, self.depth, self._padding, frequencies)


class _Bag(Use):
    """The same, with a cotangent for each bag of ids."""

    is_indexed = True

    _ids: Tensor
    _bags: Tensor
    _factor: Tensor | None

    def __init__(self, node: Any) -> None:
        self._padding = signed(node._saved_padding_idx)  # -1 where there is none
        bags, width = node._input_metadata[0].shape
        ids = node._saved_indices.numel()
        super().__init__(node, rows=ids, width=width, depth=node._saved_weight_sym_argsize_0, side=1, lead=bags)

    def hold(self) -> bool:
        node = self.node
        self._ids, offsets = node._saved_indices.reshape(-1), node._saved_offsets
        if not is_plain(self._ids, node._input_metadata[0].device) or not is_plain(offsets, self._ids.device):
            return False
        places = torch.arange(self.rows, dtype=offsets.dtype, device=offsets.device)
        self._bags = torch.searchsorted(offsets, places, right=True) - 1
        counted = self._ids != self._padding
        self._factor = None if self._padding < 0 else counted.double()
        if node._saved_mode:  # a mean over the ids that count
            sizes = torch.zeros(self.lead, dtype=torch.float64, device=self._ids.device)
            sizes.index_add_(0, self._bags, counted.double())
            self._factor = counted / sizes[self._bags].clamp_min(1)
        elif node._saved_per_sample_weights is not None:
            self._factor = counted * node._saved_per_sample_weights.reshape(-1)
        return True

    @property
    def is_scattered(self) -> bool:
        return True

    def owners_of_rows(self, owners: Tensor) -> Tensor:
        return owners[self._bags]

    def factor(self, dtype: torch.dtype) -> Tensor:
        return self._ids

    def cotangents(self, arrived: Tensor) -> Tensor:
        B = arrived[:, None, self._bags]
        return B if self._factor is None else B * self._factor.to(B.dtype)[:, None]

    def gradient(self, cotangent: Tensor) -> Tensor:
        rows = self.cotangents(cotangent[None])[0, 0]
        return rows.new_zeros(self.depth, self.width).index_add_(0, self._ids, rows)
