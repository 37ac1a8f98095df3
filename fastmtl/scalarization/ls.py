"""Linear scalarization: the mean, the sum or any fixed combination of the losses."""

from __future__ import annotations

from collections.abc import Sequence

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

    fixed: Tensor | str = option(lambda value, _: options.weights(value, "weights"), fixed=True)

    def __init__(self, weights: Tensor | Sequence[float] | str | None = None) -> None:
        fixed = options.weights(weights, "weights")
        super().__init__(None if isinstance(fixed, str) else fixed.shape[0])
        self.fixed = fixed
        self._copies = options.Copies()

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[Tensor, Tensor]:
        if isinstance(self.fixed, str):
            w = torch.full_like(L, 1.0 if self.fixed == "sum" else 1 / L.shape[0], requires_grad=False)
        else:
            w = self._copies.get(self.fixed, L).to(L.dtype)
        w = masked(w, here)
        return (w * L).sum(), w

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"weights={self.fixed!r}" if isinstance(self.fixed, str) else f"weights={self.fixed.tolist()}"
