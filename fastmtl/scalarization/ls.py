"""Linear scalarization: the mean, the sum or any fixed combination of the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import options
from fastmtl.options import option
from fastmtl.scalarization.base import Scalarization, masked

__all__ = ["LS"]


class LS(Scalarization):
    """Linear scalarization (equal weighting, "Uniform"): Σ_t w_t L_t.

    Args:
        weights: task weights w: None or "mean" for 1/T each, "sum" for ones, or T numbers.

    Raises:
        TypeError: `weights` of another kind.
        ValueError: an unknown word, or numbers that are not one-dimensional or not finite.
    """

    weights: Tensor | str = option(options.weights)

    def __init__(self, weights: options.Weights = None) -> None:
        super().__init__()
        self.weights = weights  # type: ignore[assignment]
        self._copies = options.Copies()

    def check_tasks(self, T: int) -> None:
        """Raises ValueError if there are weights for another number of tasks."""
        options.check_weights(self.weights, T)

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[None, Tensor]:
        if isinstance(self.weights, str):
            w = torch.full_like(L, 1.0 if self.weights == "sum" else 1 / L.shape[0], requires_grad=False)
        else:
            w = self._copies.get(self.weights, L).to(L.dtype)
        w = masked(w, here)
        return None, w

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"weights={options.show_weights(self.weights)}"
