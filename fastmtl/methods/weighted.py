"""Task weights as an option of a method."""

from __future__ import annotations

from collections.abc import Sequence

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

    def __init__(self, weights: Tensor | Sequence[float] | str | None) -> None:
        self.weights = weights  # type: ignore[assignment]
        self._copies = options.Copies()

    def _weights_repr(self) -> str:
        return repr(self.weights) if isinstance(self.weights, str) else str(self.weights.tolist())

    def check_tasks(self, T: int) -> None:
        if isinstance(self.weights, Tensor) and self.weights.shape[0] != T:
            raise ValueError(
                f"weights: expected length {T} (the number of tasks), got {self.weights.shape[0]}; "
                "pass None for a task that is absent, so that the others keep their places"
            )

    def _task_weights(self, T: int, like: Tensor) -> Tensor | None:
        """The weights [T] for the ops, where `like` is; None for 1/T each."""
        if isinstance(self.weights, str):
            return None if self.weights == "mean" else self._copies.get(T, like)
        self.check_tasks(T)
        return self._copies.get(self.weights, like)
