"""Which tasks are present: one whose gradient is exactly zero (M_tt = 0) is absent, and the problem is the others'."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["is_present", "solve_each"]

Solve: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def is_present(M: Tensor) -> Tensor:
    """Which tasks are present, bool [..., T], for a finite M [..., T, T]."""
    return M.diagonal(dim1=-2, dim2=-1) > 0.0


def solve_each(M: Tensor, solve: Solve) -> tuple[Tensor, Tensor]:
    """α [..., T] and the residual [...] of M [..., T, T], both float64: one matrix after another, on the host.

    `solve(M, there)` gets the matrix of the present tasks, and their numbers in order. Absent ones get 0. The residual
    is 0 if no task is present, infinite if a weight overflows; both are NaN where M is not finite.
    """
    flat = M.detach().to(device="cpu", dtype=torch.float64).reshape(-1, *M.shape[-2:])
    alpha, residual = flat.new_full(flat.shape[:-1], torch.nan), flat.new_full(flat.shape[:1], torch.nan)
    for b, one in enumerate(flat):
        if bool(one.isfinite().all()):
            alpha[b], residual[b] = _solve_present(one, solve)
    return alpha.reshape(M.shape[:-1]).to(M.device), residual.reshape(M.shape[:-2]).to(M.device)


def _solve_present(M: Tensor, solve: Solve) -> tuple[Tensor, Tensor]:
    alpha = torch.zeros_like(M[0])
    there = is_present(M).nonzero()[:, 0]
    if not len(there):
        return alpha, M.new_zeros(())
    alpha[there], residual = solve(M[there][:, there], there)
    if not bool(alpha.isfinite().all()) and bool(residual.isfinite()):
        residual = torch.full_like(residual, torch.inf)
    return alpha, residual
