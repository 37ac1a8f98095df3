"""Which tasks are there: one whose gradient is exactly zero (M_tt = 0) is absent; the problem is that of the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["is_present", "solve_present"]


def is_present(M: Tensor) -> Tensor:
    """Which tasks are there, bool [..., T], for M [..., T, T] of finite numbers."""
    return M.diagonal(dim1=-2, dim2=-1) > 0.0


def solve_present(M: Tensor, solve: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """α [T] and the residual [] of `solve(M, there)` for the tasks that are there.

    `there` are their numbers, in order, and M has no other. Absent ones get 0. Where no task is there the residual is
    0, where a weight leaves the range of numbers it is infinite.
    """
    alpha = torch.zeros_like(M[0])
    there = is_present(M).nonzero()[:, 0]
    if not len(there):
        return alpha, M.new_zeros(())
    alpha[there], residual = solve(M[there][:, there], there)
    if not bool(alpha.isfinite().all()) and bool(residual.isfinite()):
        residual = torch.full_like(residual, torch.inf)
    return alpha, residual
