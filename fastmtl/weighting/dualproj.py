"""DualProj: Gradient Episodic Memory for Continual Learning (Lopez-Paz and Ranzato, NeurIPS 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.weighting._context import NOTHING, Context
from fastmtl.weighting._method import GramMethod
from fastmtl.weighting._weights import Weighted

__all__ = ["DualProj"]


class DualProj(Weighted, GramMethod):
    """DualProj: the weighted sum of the task gradients, projected onto their dual cone.

        g = π(Σ_t w_t g_t)        π(x) the nearest point with <g_i, π(x)> >= 0 for every task i

    So g conflicts with no task (their Eq. 11). Solved exactly by active sets on the Gram matrix, in float64.

    `info` has `alpha`, `gram` and `residual` (the largest violation of the optimality conditions, relative).

    Args:
        weights: task weights w: None or "mean" for 1/T each, "sum" for ones, or T numbers.

    Raises:
        ValueError: weights that are not one-dimensional or not finite.
        TypeError: `weights` of another kind.
    """

    def __init__(self, weights: Tensor | Sequence[float] | str | None = None) -> None:
        super().__init__(weights)

    def __repr__(self) -> str:
        return f"DualProj(weights={self._weights_repr()})"

    def _weigh(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        alpha, residual = ops.dual_cone(M, self._task_weights(M.shape[-1], M), False)
        return Info.of(alpha, M, residual=residual)
