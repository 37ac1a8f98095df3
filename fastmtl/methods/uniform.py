"""Uniform: the plain mean or sum of the task gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.methods.base import GramMethod
from fastmtl.methods.weighted import Weighted
from fastmtl.options import Weights, show_weights
from fastmtl.rule import NOTHING, Context

__all__ = ["Uniform"]


class Uniform(Weighted, GramMethod):
    """The same task weights in every step: the baseline that the paper calls Uniform, or any other constants.

        g = wᵀ G

    A single backward pass could sum the gradients (`fastmtl.scalarization.LS`). This method takes the tasks' gradients
    like every other, and so has their Gram matrix for the diagnostics: `info` has `alpha` and `gram`.

    Args:
        weights: None or "mean" for 1/T each, "sum" for ones, or T numbers.

    Raises:
        ValueError: weights that are not one-dimensional or not finite.
        TypeError: `weights` of another kind.
    """

    def __init__(self, *, weights: Weights = None) -> None:
        super().__init__(weights)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"weights={show_weights(self.weights)}"

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        return Info.of(ops.constant(M, self._task_weights(M.shape[-1], M)), M)
