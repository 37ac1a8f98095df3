"""Task weights as an option of a method."""

from __future__ import annotations

from torch import Tensor

from fastmtl import options
from fastmtl.options import option

__all__ = ["Weighted"]


class Weighted:
    """A method with task weights w: "mean" (1/T each), "sum" (ones), or T numbers.

    Attributes:
        weights: "mean", "sum" or a float64 tensor [T].
    """

    weights: Tensor | str = option(options.weights)

    def __init__(self, weights: options.Weights, *state: str) -> None:
        super().__init__(*state)
        self.weights = weights  # type: ignore[assignment]
        self._copies = options.Copies()

    def check_tasks(self, T: int) -> None:
        options.check_weights(self.weights, T)

    def _task_weights(self, T: int, like: Tensor) -> Tensor | None:
        """The weights [T] for the ops, on the device of `like`; None for 1/T each."""
        if isinstance(self.weights, str):
            return None if self.weights == "mean" else self._copies.get(T, like)
        self.check_tasks(T)
        return self._copies.get(self.weights, like)
