"""MGDA: Multi-Task Learning as Multi-Objective Optimization (Sener and Koltun, NeurIPS 2018; Désidéri 2012)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.info import Info
from fastmtl.weighting._method import GramMethod

__all__ = ["MGDA"]

# Relative to the lengths of both gradients: what float64 products of a Gram leave uncertain.
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
        alpha = flat.new_empty(flat.shape[:-1])
        for one, row in zip(flat, alpha, strict=True):
            row.copy_(_minimum_norm_point(one))
        return Info.of(alpha=alpha.reshape(M.shape[:-1]).to(M.device), gram=M)

    def __repr__(self) -> str:
        return "MGDA()"


def _minimum_norm_point(M: Tensor) -> Tensor:
    """Weights [T] of the point of least norm in the convex hull of points with Gram matrix M [T, T] (Wolfe 1976).

    A corral of points whose affine hull's least-norm point lies inside their convex hull grows by the point that
    promises the largest decrease, and sheds points whose weights would become negative. All on points of unit length,
    so that long ones do not drown the rest: with lengths d it finds y = α d, which is min yᵀ C y over y >= 0, bᵀ y = 1.
    """
    T = M.shape[0]
    if not bool(M.isfinite().all()):
        return M.new_full((T,), torch.nan)
    norms = M.diagonal().clamp_min(0).sqrt()
    shortest = int(norms.argmin())
    y = M.new_zeros(T)
    y[shortest] = 1
    if norms[shortest] == 0:
        return y if bool(norms.any()) else y.fill_(1 / T)
    C = M / norms / norms[:, None]
    b = norms[shortest] / norms
    corral = [shortest]
    for _ in range(_MAX_STEPS_PER_TASK * T):
        products = C @ y
        decrease = (y @ products) * b - products
        entering = int(decrease.argmax())
        if decrease[entering] <= _OPTIMALITY * y.sum() or entering in corral:
            break
        corral.append(entering)
        while True:
            solved = _affine_minimum(C[corral][:, corral], b[corral])
            negative = solved <= 0
            if not bool(negative.any()):
                break
            # As far towards the affine minimum as the hull reaches; whoever becomes zero there leaves.
            old = y[corral]
            reach = torch.where(negative, old / (old - solved), torch.inf)
            moved = old + reach.min() * (solved - old)
            keep = (moved > 0) & (reach > reach.min())
            corral = [i for i, kept in zip(corral, keep.tolist(), strict=True) if kept]
            y.zero_()
            y[corral] = moved[keep]
        y.zero_()
        y[corral] = solved
        if entering not in corral:  # nothing was left to gain but rounding
            break
    alpha = y * b
    return alpha / alpha.sum()


def _affine_minimum(C: Tensor, b: Tensor) -> Tensor:
    """The y of least yᵀ C y with bᵀ y = 1."""
    n = C.shape[0]
    size = b.max()
    system = C.new_zeros(n + 1, n + 1)
    system[0, 1:] = system[1:, 0] = b / size
    system[1:, 1:] = C
    right = C.new_zeros(n + 1)
    right[0] = 1
    return torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution[1:, 0] / size
