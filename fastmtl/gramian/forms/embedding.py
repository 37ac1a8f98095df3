"""Embeddings, whose ids may repeat."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmtl.gramian.forms.use import Use
from fastmtl.gramian.saved import Saved, is_plain

__all__ = ["TABLE", "table"]

TABLE = Saved("indices", "padding_idx", "scale_grad_by_freq", "weight_sym_argsize_0", sparse=False)


def table(node: Any, flipped: bool) -> Use | None:
    """The table of an embedding that makes dense gradients."""
    return None if flipped else _Embedding(node)


class _Embedding(Use):
    """A product with the matrix of the ids' unit vectors."""

    is_indexed = True

    _ids: Tensor

    def __init__(self, node: Any) -> None:
        padding = node._saved_padding_idx  # -1, read as unsigned, where there is none
        self._padding = padding if padding < 2**63 else -1
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
