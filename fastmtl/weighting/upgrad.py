"""UPGrad: Jacobian Descent for Multi-Objective Optimization (Quinton and Rey, 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.weighting._context import NOTHING, Context
from fastmtl.weighting._method import GramMethod
from fastmtl.weighting._weights import Weighted

__all__ = ["UPGrad"]


class UPGrad(Weighted, GramMethod):
    """UPGrad: each task gradient is projected onto the dual cone of all of them, and the projections are summed.

        g = Σ_t w_t π(g_t)        π(x) the nearest point with <g_i, π(x)> >= 0 for every task i

    So g conflicts with no task. Each projection is a quadratic problem in T task weights, solved exactly by active sets
    in float64 (the paper's Proposition 1).

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
        return f"UPGrad(weights={self._weights_repr()})"

    def _weigh(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        alpha, residual = ops.dual_cone(M, self._task_weights(M.shape[-1], M), True)
        return Info.of(alpha, M, residual=residual)
