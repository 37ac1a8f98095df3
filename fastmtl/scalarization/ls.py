"""Linear scalarization: the mean, the sum or any fixed combination of the losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.scalarization._scalarization import Scalarization, check_numbers

__all__ = ["LS"]


class LS(Scalarization):
    """Linear scalarization (equal weighting, "Uniform"): Σ_t w_t L_t.

    Args:
        weights: task weights w: None or "mean" for 1/T each, "sum" for ones, or T numbers.

    Raises:
        TypeError: `weights` of another kind.
        ValueError: an unknown word, or numbers that are not one-dimensional or not finite.
    """

    fixed: Tensor | None

    def __init__(self, weights: Tensor | Sequence[float] | str | None = None) -> None:
        fixed = None
        if weights is not None and not isinstance(weights, str):
            fixed = check_numbers(weights, "weights")
        elif weights not in (None, "mean", "sum"):
            raise ValueError(f'weights: expected None, "mean", "sum" or T numbers, got {weights!r}')
        super().__init__(None if fixed is None else fixed.shape[0])
        self.rule = weights if isinstance(weights, str) else "mean"
        self.register_buffer("fixed", fixed, persistent=False)  # an option, not state

    def _scalarize(self, L: Tensor) -> tuple[Tensor, Tensor]:
        if self.fixed is not None:
            w = self.fixed.to(L.dtype, copy=True)
        else:
            w = torch.full_like(L, 1.0 if self.rule == "sum" else 1 / L.shape[0], requires_grad=False)
        return (w * L).sum(), w

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"weights={self.rule!r}" if self.fixed is None else f"weights={self.fixed.tolist()}"
