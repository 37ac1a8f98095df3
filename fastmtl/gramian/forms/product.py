"""Linear layers and every other matrix product with a parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmtl.gramian.forms._use import Use

__all__ = ["product"]


def product(node: Any, operand: int, flipped: bool) -> Use | None:
    """The left or right matrix of `L @ R` or of `addmm(bias, L, R)`; one of them is the parameter, or its transpose."""
    fused = node.name() == "AddmmBackward0"
    if fused and (operand == 0 or node._saved_alpha != 1):
        return None
    left = operand == (1 if fused else 0)
    return (_Left if left else _Right)(node, fused, flipped)


class _Right(Use):
    """Y = X R: the gradient of R is Xᵀ B_t; that of its transpose, a linear layer's weight, B_tᵀ X."""

    _x: Tensor

    def __init__(self, node: Any, fused: bool, flipped: bool) -> None:
        rows, width = node._input_metadata[0].shape
        self._saved = "_saved_mat1" if fused else "_saved_self"
        depth = node._saved_mat2_sym_sizes[0]
        super().__init__(node, rows=rows, width=width, depth=depth, side=0 if flipped else 1)

    def hold(self) -> None:
        self._x = getattr(self.node, self._saved)

    def factor(self, dtype: torch.dtype) -> Tensor:
        return self._x.to(dtype)[None]

    def cotangents(self, arrived: Tensor) -> Tensor:
        return arrived[:, None]

    def gradient(self, cotangent: Tensor) -> Tensor:
        x = self._x.to(cotangent.dtype)
        return cotangent.mT @ x if self.side == 0 else x.mT @ cotangent


class _Left(Use):
    """Y = L X: the gradient of L is B_t Xᵀ."""

    _x: Tensor

    def __init__(self, node: Any, fused: bool, flipped: bool) -> None:
        width, rows = node._input_metadata[0].shape
        sizes = node._saved_mat1_sym_sizes if fused else node._saved_self_sym_sizes
        super().__init__(node, rows=rows, width=width, depth=sizes[1], side=1 if flipped else 0)

    def hold(self) -> None:
        self._x = self.node._saved_mat2

    def factor(self, dtype: torch.dtype) -> Tensor:
        return self._x.to(dtype).mT[None]

    def cotangents(self, arrived: Tensor) -> Tensor:
        return arrived.mT[:, None]

    def gradient(self, cotangent: Tensor) -> Tensor:
        x = self._x.to(cotangent.dtype)
        return cotangent @ x.mT if self.side == 0 else x @ cotangent.mT
