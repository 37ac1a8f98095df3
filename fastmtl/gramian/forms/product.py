"""Linear layers and every other matrix product with a parameter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmtl.gramian.forms.use import Use
from fastmtl.gramian.saved import Saved

__all__ = [
    "BIAS",
    "LEFT",
    "LEFT_OF_BATCH",
    "LEFT_OF_SUM",
    "RIGHT",
    "RIGHT_OF_BATCH",
    "RIGHT_OF_SUM",
    "left",
    "left_of_batch",
    "left_of_sum",
    "right",
    "right_of_batch",
    "right_of_sum",
]


class _Right(Use):
    """Y = X R: the gradient of R is Xᵀ B_t; that of its transpose, a linear layer's weight, B_tᵀ X."""

    _x: Tensor

    def __init__(self, node: Any, flipped: bool, x: str) -> None:
        rows, width = node._input_metadata[0].shape
        depth = node._saved_mat2_sym_sizes[0]
        super().__init__(node, rows=rows, width=width, depth=depth, side=0 if flipped else 1)
        self._saved = x

    def hold(self) -> bool:
        self._x = getattr(self.node, self._saved)
        return self._reads(self._x)

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

    def __init__(self, node: Any, flipped: bool, sizes: str) -> None:
        width, rows = node._input_metadata[0].shape
        depth = getattr(node, sizes)[1]
        super().__init__(node, rows=rows, width=width, depth=depth, side=1 if flipped else 0, outer=width)

    def hold(self) -> bool:
        self._x = self.node._saved_mat2
        return self._reads(self._x)

    def factor(self, dtype: torch.dtype) -> Tensor:
        return self._x.to(dtype).mT[None]

    def cotangents(self, arrived: Tensor) -> Tensor:
        return arrived.mT[:, None]

    def gradient(self, cotangent: Tensor) -> Tensor:
        x = self._x.to(cotangent.dtype)
        return cotangent @ x.mT if self.side == 0 else x @ cotangent.mT


class _RightOfBatch(Use):
    """Y_g = X_g R_g in each of g groups: the gradient of R_g is X_gᵀ B_t."""

    _x: Tensor

    def __init__(self, node: Any, flipped: bool) -> None:
        groups, rows, width = node._input_metadata[0].shape
        operand, output = node.next_functions[1]
        depth = operand._input_metadata[output].shape[1]
        super().__init__(
            node, groups=groups, rows=rows, width=width, depth=depth, side=0 if flipped else 1, outer=groups
        )

    def hold(self) -> bool:
        self._x = self.node._saved_self
        return self._reads(self._x)

    def factor(self, dtype: torch.dtype) -> Tensor:
        return self._x.to(dtype)

    def cotangents(self, arrived: Tensor) -> Tensor:
        return arrived

    def gradient(self, cotangent: Tensor) -> Tensor:
        x = self._x.to(cotangent.dtype)
        return cotangent.mT @ x if self.side == 0 else x.mT @ cotangent


class _LeftOfBatch(Use):
    """Y_g = L_g X_g in each of g groups: the gradient of L_g is B_t X_gᵀ."""

    _x: Tensor

    def __init__(self, node: Any, flipped: bool) -> None:
        groups, width, rows = node._input_metadata[0].shape
        operand, output = node.next_functions[0]
        depth = operand._input_metadata[output].shape[2]
        side = 1 if flipped else 0
        super().__init__(node, groups=groups, rows=rows, width=width, depth=depth, side=side, outer=groups * width)

    def hold(self) -> bool:
        self._x = self.node._saved_mat2
        return self._reads(self._x)

    def factor(self, dtype: torch.dtype) -> Tensor:
        return self._x.to(dtype).mT

    def cotangents(self, arrived: Tensor) -> Tensor:
        return arrived.mT

    def gradient(self, cotangent: Tensor) -> Tensor:
        x = self._x.to(cotangent.dtype)
        return cotangent @ x.mT if self.side == 0 else x @ cotangent.mT


# mm(L, R), and addmm(bias, L, R) = beta * bias + alpha * L @ R. The operands' strides are where they lie, no more.
_MM = ("self", "self_sym_sizes", "self_sym_strides", "mat2", "mat2_sym_sizes", "mat2_sym_strides")
_ADDMM = ("mat1", "mat1_sym_sizes", "mat1_sym_strides", "mat2", "mat2_sym_sizes", "mat2_sym_strides")

LEFT = RIGHT = Saved(*_MM)
LEFT_OF_BATCH = RIGHT_OF_BATCH = Saved("self", "mat2")
LEFT_OF_SUM = RIGHT_OF_SUM = Saved("beta", *_ADDMM, alpha=1)
BIAS = Saved("alpha", *_ADDMM, beta=1)

left: Callable[[Any, bool], Use] = functools.partial(_Left, sizes="_saved_self_sym_sizes")
left_of_sum: Callable[[Any, bool], Use] = functools.partial(_Left, sizes="_saved_mat1_sym_sizes")
right: Callable[[Any, bool], Use] = functools.partial(_Right, x="_saved_self")
right_of_sum: Callable[[Any, bool], Use] = functools.partial(_Right, x="_saved_mat1")
left_of_batch: Callable[[Any, bool], Use] = _LeftOfBatch
right_of_batch: Callable[[Any, bool], Use] = _RightOfBatch
