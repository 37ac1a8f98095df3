"""Weights that do not depend on the gradients; differentiable, as in TorchJD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchjd.aggregation import WeightedAggregator, Weighting

from fastmtl import methods
from fastmtl.inputs import describe
from fastmtl.integrations.torchjd.configured import part_of, suffix_of
from fastmtl.options import plain

__all__ = [
    "Constant",
    "ConstantWeighting",
    "Mean",
    "MeanWeighting",
    "Random",
    "RandomWeighting",
    "Sum",
    "SumWeighting",
    "vector",
]


def vector(value: Any, name: str) -> Tensor | None:
    """Accepts a vector of finite numbers or None, unchanged."""
    value = plain(value)
    if value is None:
        return None
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.dtype in _INTEGERS):
        raise TypeError(f"{name}: expected a vector of numbers or None, got {describe(value)}")
    if value.ndim != 1:
        raise ValueError(f"{name}: expected shape [T], got {describe(value)}")
    if value.device.type == "cpu" and not bool(value.isfinite().all()):  # on a device the host would wait
        raise ValueError(f"{name}: expected finite numbers, got {value.tolist()}")
    return value


_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


class ConstantWeighting(Weighting[Tensor]):
    """The weights of `Constant`: the given numbers, differentiable if they require grad.

    Args:
        weights: the weights [m].

    Raises:
        TypeError: `weights` is not a tensor of numbers.
        ValueError: `weights` is not a finite vector; (in a step) of another length than m.
    """

    weights: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        checked = vector(weights, "weights")
        if checked is None:
            raise TypeError("weights: expected a vector of numbers, got None")
        self.weights = checked

    def forward(self, matrix: Tensor, /) -> Tensor:
        """The weights [m]."""
        m = matrix.shape[0]
        if m != len(self.weights):
            raise ValueError(f"weights: expected length {m} (the number of rows), got {len(self.weights)}")
        return self.weights.to(matrix.dtype)


class MeanWeighting(Weighting[Tensor]):
    """The weights of `Mean`: 1/m each."""

    def forward(self, matrix: Tensor, /) -> Tensor:
        """The weights [m]."""
        m = matrix.shape[0]
        return matrix.new_full((m,), 1 / max(m, 1), requires_grad=False)


class RandomWeighting(Weighting[Tensor]):
    """The weights of `Random`: the softmax of normal numbers, drawn anew in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.method = methods.RLW()

    def forward(self, matrix: Tensor, /) -> Tensor:
        """The weights [m]."""
        m = matrix.shape[0]
        if not m:
            return matrix.new_zeros(0)
        alpha: Tensor = self.method.draw((m,), matrix.dtype, matrix.device)
        return alpha


class SumWeighting(Weighting[Tensor]):
    """The weights of `Sum`: ones."""

    def forward(self, matrix: Tensor, /) -> Tensor:
        """The weights [m]."""
        return matrix.new_ones(matrix.shape[0], requires_grad=False)


class Constant(WeightedAggregator):
    """A combination with the same weights in every step. For the argument see `ConstantWeighting`."""

    weighting: ConstantWeighting
    weights: Tensor = part_of("weighting", "weights")

    def __init__(self, weights: Tensor) -> None:
        super().__init__(ConstantWeighting(weights))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(weights={self.weights!r})"

    def __str__(self) -> str:
        return type(self).__name__ + suffix_of(self.weights)


class Mean(WeightedAggregator):
    """The mean of the rows."""

    def __init__(self) -> None:
        super().__init__(MeanWeighting())


class Random(WeightedAggregator):
    """A combination with random weights: `fastmtl.RLW`."""

    def __init__(self) -> None:
        super().__init__(RandomWeighting())


class Sum(WeightedAggregator):
    """The sum of the rows."""

    def __init__(self) -> None:
        super().__init__(SumWeighting())
