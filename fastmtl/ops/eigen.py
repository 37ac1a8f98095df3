"""Batched eigendecomposition of small symmetric matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.inputs import describe

__all__ = ["eigh"]


def eigh(M: Tensor) -> tuple[Tensor, Tensor]:
    """Eigendecomposition M = V diag(λ) Vᵀ of symmetric matrices, for many small ones at once.

    Up to T = 32 by Jacobi rotations with a relative stopping rule, one matrix per SIMD lane: small eigenvalues of a
    graded positive definite matrix come out with high relative accuracy (Demmel and Veselić 1992). Larger ones go to
    `torch.linalg.eigh`; on a GPU rotations serve up to T = 128 (83 where a block has 64 KiB of shared memory), and
    beyond the host waits for LAPACK. Only the lower triangle is read. A non-finite matrix gives NaN.

    Args:
        M: [T, T] or [..., T, T], float64 or float32 (solved in float64).

    Returns:
        Eigenvalues [..., T], ascending, and eigenvectors [..., T, T] in columns, both of M's dtype.

    Raises:
        TypeError: `M` is not a dense float32 or float64 tensor.
        ValueError: `M` is not square, or requires grad (there is no derivative).
    """
    if not isinstance(M, Tensor) or M.dtype not in (torch.float32, torch.float64) or M.layout is not torch.strided:
        raise TypeError(f"M: expected a dense float32 or float64 tensor, got {describe(M)}")
    if M.ndim < 2 or M.shape[-1] != M.shape[-2]:
        raise ValueError(f"M: expected shape [..., T, T], got {describe(M)}")
    if M.requires_grad and torch.is_grad_enabled():
        raise ValueError("M: has requires_grad=True, but eigh has no derivative; pass it detached")
    eigenvalues, eigenvectors = ops.eigh(M)
    return eigenvalues, eigenvectors
