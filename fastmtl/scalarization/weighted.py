"""Task weights as an option of a scalarization."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import options
from fastmtl.options import option
from fastmtl.scalarization.base import Scalarization

__all__ = ["Weighted"]


class Weighted(Scalarization):
    """A scalarization with task weights w: "mean" (1/T each), "sum" (ones), or T numbers.

    Attributes:
        weights: "mean", "sum" or a float64 tensor [T].
    """

    weights: Tensor | str = option(options.weights)

    def __init__(self, weights: options.Weights) -> None:
        super().__init__()
        self.weights = weights  # type: ignore[assignment]
        self._copies = options.Copies()

    def check_tasks(self, T: int) -> None:
        """Raises ValueError if there are weights for another number of tasks."""
        options.check_weights(self.weights, T)

    def _task_weights(self, L: Tensor) -> Tensor:
        """The weights [T] in the dtype and on the device of the losses L [T]."""
        if isinstance(self.weights, str):
            return torch.full_like(L, 1.0 if self.weights == "sum" else 1 / L.shape[0], requires_grad=False)
        return self._copies.get(self.weights, L).to(L.dtype)
