"""TorchJD's scalarizers that are weighted sums or have one parameter per value, and checks for all scalarizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchjd import Stateful
from torchjd.scalarization import Scalarizer

from fastmtl.inputs import describe
from fastmtl.integrations.torchjd.configured import suffix_of
from fastmtl.options import plain

__all__ = ["IMTLL", "UW", "Constant", "Mean", "Sum", "check_shape", "checked_shape", "checked_tensor"]


class Mean(Scalarizer):
    """The mean of the values."""

    def forward(self, values: Tensor, /) -> Tensor:
        """The scalar []."""
        return values.mean()


class Sum(Scalarizer):
    """The sum of the values."""

    def forward(self, values: Tensor, /) -> Tensor:
        """The scalar []."""
        return values.sum()


class Constant(Scalarizer):
    """A weighted sum of the values, differentiable with respect to the weights too.

    Args:
        weights: of the values' shape.

    Raises:
        TypeError: `weights` is not a tensor.
        ValueError: (in a step) values of another shape.
    """

    weights: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        checked = checked_tensor(weights, "weights")
        if checked is None:
            raise TypeError("weights: expected a tensor, got None")
        self.weights = checked

    def forward(self, values: Tensor, /) -> Tensor:
        """The scalar []."""
        check_shape(values, self.weights.shape, "the weights")
        return (self.weights * values).sum()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(weights={self.weights!r})"

    def __str__(self) -> str:
        if self.weights.ndim == 1:
            return type(self).__name__ + suffix_of(self.weights)
        return f"{type(self).__name__}(weights of shape {tuple(self.weights.shape)})"


class _Learned(Scalarizer, Stateful):
    """With one parameter per value, for the user's optimizer."""

    _name: str  # of the parameter, as TorchJD calls it

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__()
        self.register_parameter(self._name, nn.Parameter(torch.zeros(checked_shape(shape))))

    def _checked(self, values: Tensor) -> Tensor:
        """The parameter."""
        s: Tensor = getattr(self, self._name)
        check_shape(values, s.shape, "the parameters")
        return s

    def reset(self) -> None:
        """Resets the parameter to zero."""
        with torch.no_grad():
            getattr(self, self._name).zero_()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(getattr(self, self._name).shape)})"


class UW(_Learned):
    """Uncertainty weighting: Σ ½ exp(-s) L + ½ s, as `fastmtl.scalarization.Uncertainty`.

    Args:
        shape: of the values; an int n is (n,).

    Raises:
        TypeError: `shape` is not a shape.
        ValueError: (in a step) values of another shape.
    """

    _name = "log_var"
    log_var: nn.Parameter

    def forward(self, values: Tensor, /) -> Tensor:
        """The scalar []."""
        s = self._checked(values)
        return (0.5 * torch.exp(-s) * values + 0.5 * s).sum()


class IMTLL(_Learned):
    """IMTL-L: Σ exp(s) L - s, as `fastmtl.scalarization.IMTLL`.

    Args:
        shape: of the values; an int n is (n,).

    Raises:
        TypeError: `shape` is not a shape.
        ValueError: (in a step) values of another shape.
    """

    _name = "log_scale"
    log_scale: nn.Parameter

    def forward(self, values: Tensor, /) -> Tensor:
        """The scalar []."""
        s = self._checked(values)
        return (torch.exp(s) * values - s).sum()


def checked_tensor(value: Any, name: str) -> Tensor | None:
    """A tensor (also from an array) or None; anything else is a TypeError."""
    value = plain(value)
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(value)}")
    return value


def checked_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    """A shape as torch takes it: an int n is (n,)."""
    return tuple(torch.zeros(shape, device="meta").shape)


def check_shape(values: Tensor, shape: Sequence[int], whose: str, name: str = "values") -> None:
    """Raises ValueError if values are of another shape."""
    if values.shape != torch.Size(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, that of {whose}, got {describe(values)}")
