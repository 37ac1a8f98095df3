"""Linear scalarization: the mean, the sum or any fixed combination of the losses."""

from __future__ import annotations

from torch import Tensor

from fastmtl.options import Weights, show_weights
from fastmtl.scalarization.base import masked
from fastmtl.scalarization.weighted import Weighted

__all__ = ["LS"]


class LS(Weighted):
    """Linear scalarization (equal weighting, "Uniform"): Σ_t w_t L_t.

    Args:
        weights: task weights w: None or "mean" for 1/T each, "sum" for ones, or T numbers.

    Raises:
        TypeError: `weights` of another kind.
        ValueError: an unknown word, or numbers that are not one-dimensional or not finite.
    """

    def __init__(self, weights: Weights = None) -> None:
        super().__init__(weights)

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[None, Tensor]:
        return None, masked(self._task_weights(L), here)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"weights={show_weights(self.weights)}"
