"""Uniform: the plain mean or sum of the task gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.methods.base import GramMethod
from fastmtl.methods.weighted import Weighted
from fastmtl.rule import NOTHING, Context

__all__ = ["Uniform"]


class Uniform(Weighted, GramMethod):
    """The same task weights in every step: the baseline that the paper calls Uniform, and any other constant ones.

        g = wᵀ G

    The gradients could be summed in a single backward pass (`fastmtl.scalarization.LS`); this takes those of the tasks,
    like every other method, and so has their Gram matrix for the diagnostics: `info` has `alpha` and `gram`.

    Args:
        weights: None or "mean" for 1/T each, "sum" for ones, or T numbers.

    Raises:
        ValueError: weights that are not one-dimensional or not finite.
        TypeError: `weights` of another kind.
    """

    def __init__(self, *, weights: Tensor | Sequence[float] | str | None = None) -> None:
        super().__init__(weights)

    def __repr__(self) -> str:
        return f"Uniform(weights={self._weights_repr()})"

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        return Info.of(ops.constant(M, self._task_weights(M.shape[-1], M)), M)
