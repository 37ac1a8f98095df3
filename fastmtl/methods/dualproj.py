"""DualProj: Gradient Episodic Memory for Continual Learning (Lopez-Paz and Ranzato, NeurIPS 2017)."""

from __future__ import annotations

from fastmtl.methods.dual_cone import DualCone

__all__ = ["DualProj"]


class DualProj(DualCone):
    """DualProj: the weighted sum of the task gradients, projected onto their dual cone.

        g = π(Σ_t w_t g_t)        π(x) the point nearest to x with <g_i, π(x)> >= 0 for every task i

    So g conflicts with no task (their Eq. 11). Solved exactly by active sets on the Gram matrix, in float64.

    `info` has `alpha`, `gram` and `residual` (the largest violation of the optimality conditions, relative).

    Args:
        weights: task weights w: None or "mean" for 1/T each, "sum" for ones, or T numbers.
        ridge: adds `ridge` · trace(M) to the diagonal of the Gram matrix M. 0 is the exact projection; larger values
            keep the weights of nearly opposed gradients small, and allow conflicts up to that size.

    Raises:
        ValueError: weights that are not one-dimensional or not finite, a ridge that is negative or not finite.
        TypeError: an option of another kind.
    """

    _each = False
