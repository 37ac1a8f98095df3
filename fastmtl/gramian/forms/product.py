"""Linear layers and every other matrix product with a parameter."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmtl.gramian.forms.use import Use
from fastmtl.gramian.saved import Saved

__all__ = ["ADDMM", "BIAS", "BMM", "MM", "left", "left_of_sum", "right", "right_of_sum"]


class _Right(Use):
    """Y = X R: the gradient of R is Xᵀ B_t; that of its transpose, a linear layer's weight, B_tᵀ X.

    In a batch, Y_g = X_g R_g in each of g groups.
    """

    _x: Tensor

    def __init__(self, node: Any, flipped: bool, operand: int, x: str) -> None:
        *batch, rows, width = node._input_metadata[0].shape
        source, output = node.next_functions[operand]
        depth, groups = source._input_metadata[output].shape[-2], math.prod(batch)
        side = 0 if flipped else 1
        super().__init__(node, groups=groups, rows=rows, width=width, depth=depth, side=side, outer=groups)
        self._saved = x

    def hold(self) -> bool:
        self._x = getattr(self.node, self._saved)
        return self._reads(self._x)

    def factor(self, dtype: torch.dtype) -> Tensor:
        return _grouped(self._x.to(dtype), 0)

    def cotangents(self, arrived: Tensor) -> Tensor:
        return _grouped(arrived, 1)

    def gradient(self, cotangent: Tensor) -> Tensor:
        x = self._x.to(cotangent.dtype)
        return cotangent.mT @ x if self.side == 0 else x.mT @ cotangent


class _Left(Use):
    """Y = L X: the gradient of L is B_t Xᵀ. In a batch, Y_g = L_g X_g in each of g groups."""

    _x: Tensor

    def __init__(self, node: Any, flipped: bool, operand: int) -> None:
        *batch, width, rows = node._input_metadata[0].shape
        source, output = node.next_functions[operand]
        depth, groups = source._input_metadata[output].shape[-1], math.prod(batch)
        side = 1 if flipped else 0
        super().__init__(node, groups=groups, rows=rows, width=width, depth=depth, side=side, outer=groups * width)

    def hold(self) -> bool:
        self._x = self.node._saved_mat2
        return self._reads(self._x)

    def factor(self, dtype: torch.dtype) -> Tensor:
        return _grouped(self._x.to(dtype).mT, 0)

    def cotangents(self, arrived: Tensor) -> Tensor:
        return _grouped(arrived.mT, 1)

    def gradient(self, cotangent: Tensor) -> Tensor:
        x = self._x.to(cotangent.dtype)
        return cotangent @ x.mT if self.side == 0 else x @ cotangent.mT


def _grouped(x: Tensor, dim: int) -> Tensor:
    """`x` with its groups along `dim`: a product without a batch has one."""
    return x if x.ndim == dim + 3 else x.unsqueeze(dim)


# mm(L, R), bmm(L, R), and addmm(bias, L, R) = beta * bias + alpha * L @ R. The operands' strides do not matter.
_OF_SUM = ("mat1", "mat1_sym_sizes", "mat1_sym_strides", "mat2", "mat2_sym_sizes", "mat2_sym_strides")

MM = Saved("self", "self_sym_sizes", "self_sym_strides", "mat2", "mat2_sym_sizes", "mat2_sym_strides")
BMM = Saved("self", "mat2")
ADDMM = Saved("beta", *_OF_SUM, alpha=1)
BIAS = Saved("alpha", *_OF_SUM, beta=1)

left: Callable[[Any, bool], Use] = functools.partial(_Left, operand=0)
left_of_sum: Callable[[Any, bool], Use] = functools.partial(_Left, operand=1)
right: Callable[[Any, bool], Use] = functools.partial(_Right, operand=1, x="_saved_self")
right_of_sum: Callable[[Any, bool], Use] = functools.partial(_Right, operand=2, x="_saved_mat1")
