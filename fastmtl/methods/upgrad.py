"""UPGrad: Jacobian Descent for Multi-Objective Optimization (Quinton and Rey, 2024)."""

from __future__ import annotations

from fastmtl.methods.dual_cone import DualCone

__all__ = ["UPGrad"]


class UPGrad(DualCone):
    """UPGrad: projects each task gradient onto the dual cone of all of them, and sums the projections.

        g = Σ_t w_t π(g_t)        π(x) the point nearest to x with <g_i, π(x)> >= 0 for every task i

    So g conflicts with no task. Each projection is a quadratic problem in T task weights, solved exactly by active sets
    in float64 (the paper's Proposition 1).

    `info` has `alpha`, `gram` and `residual` (the largest violation of the optimality conditions, relative).

    Args:
        weights: task weights w: None or "mean" for 1/T each, "sum" for ones, or T numbers.
        ridge: adds `ridge` · trace(M) to the diagonal of the Gram matrix M. 0 is the exact projection; larger values
            keep the weights of nearly opposed gradients small, and allow conflicts up to that size.

    Raises:
        ValueError: weights that are not one-dimensional or not finite, a ridge that is negative or not finite.
        TypeError: an option of another kind.
    """

    _each = True
