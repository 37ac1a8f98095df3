"""MGDA: Multi-Task Learning as Multi-Objective Optimization (Sener and Koltun, NeurIPS 2018; Désidéri 2012)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.info import Info
from fastmtl.weighting._method import GramMethod

__all__ = ["MGDA"]

# Of the largest gradient's square norm: what float64 products of a Gram leave uncertain.
_OPTIMALITY = 1e-12
_MAX_STEPS_PER_TASK = 50  # far more than were ever seen; a guard against cycling on rounding noise


class MGDA(GramMethod):
    """MGDA: the shortest vector in the convex hull of the task gradients.

        α = argmin ‖αᵀ G‖²    over    α >= 0, Σ α = 1        g = αᵀ G

    It is a descent direction for every task, or zero at a Pareto-stationary point. Solved exactly, by Wolfe's
    active-set method on the Gram matrix in float64, not by Frank-Wolfe steps. With `fan_out` or `representation=` this
    is MGDA-UB.

    `info` has `alpha` and `gram`. On a GPU the weights are computed on the host, which waits for the Gram matrix.
    """

    def _weigh(self, M: Tensor, dtype: torch.dtype) -> Info:
        flat = M.to(device="cpu", dtype=torch.float64).reshape(-1, *M.shape[-2:])
        alpha = torch.stack([_minimum_norm_point(one) for one in flat]).reshape(M.shape[:-1])
        return Info.of(alpha=alpha.to(M.device), gram=M)

    def __repr__(self) -> str:
        return "MGDA()"


def _minimum_norm_point(M: Tensor) -> Tensor:
    """Weights [T] of the point of least norm in the convex hull of points with Gram matrix M [T, T] (Wolfe 1976).

    A corral of points whose affine hull's least-norm point lies inside their convex hull grows by the point that
    promises the largest decrease, and sheds points whose weights would become negative.
    """
    T = M.shape[0]
    alpha = M.new_zeros(T)
    if not bool(M.isfinite().all()):
        return alpha.fill_(torch.nan)
    largest = M.diagonal().max()
    if largest <= 0:
        return alpha.fill_(1 / T)
    M = M / largest
    corral = [int(M.diagonal().argmin())]
    alpha[corral[0]] = 1
    for _ in range(_MAX_STEPS_PER_TASK * T):
        products = M @ alpha
        norm = alpha @ products
        entering = int(products.argmin())
        if products[entering] >= norm - _OPTIMALITY or entering in corral:
            break
        corral.append(entering)
        while True:
            weights = _affine_minimum(M[corral][:, corral])
            old = alpha[corral]
            negative = weights <= 0
            if not bool(negative.any()):
                break
            # As far towards the affine minimum as the hull reaches; whoever becomes zero there leaves.
            reach = torch.where(negative, old / (old - weights), torch.inf).nan_to_num(0.0).min()
            moved = old + reach * (weights - old)
            keep = moved > _OPTIMALITY
            keep &= ~(negative & (moved <= moved[negative].min()))
            alpha.zero_()
            corral = [i for i, kept in zip(corral, keep.tolist(), strict=True) if kept]
            alpha[corral] = moved[keep] / moved[keep].sum()
        alpha.zero_()
        alpha[corral] = weights
    return alpha


def _affine_minimum(M: Tensor) -> Tensor:
    """Weights, of sum one, of the least-norm point in the affine hull of points with Gram matrix M."""
    n = M.shape[0]
    system = M.new_ones(n + 1, n + 1)
    system[0, 0] = 0
    system[1:, 1:] = M
    right = M.new_zeros(n + 1)
    right[0] = 1
    return torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution[1:, 0]
