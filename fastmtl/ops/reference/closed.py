"""Task weights in closed form: the pseudo-inverse of the Gram of unit gradients, and constant ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.ops.reference import products
from fastmtl.ops.reference.present import is_present

__all__ = ["constant", "unit_solve"]

EPS = torch.finfo(torch.float64).eps


def unit_solve(M: Tensor, weights: Tensor | None, rtol: float) -> tuple[Tensor, Tensor]:
    """α = D^-½ C⁺ w and C C⁺ w, with M = D^½ C D^½ the Gram of gradients brought to unit length: M α ≈ D^½ w.

    Absent tasks take no part: their entry of w counts as zero. Singular values of the unit gradients at most `rtol`
    times the largest count as zero, and so do eigenvalues of C below its rounding errors. If w lies in the subspace
    that this leaves out, up to rounding or a part of `rtol` (as equal weights of opposed gradients do), C⁺ w is zero.

    Args:
        M: [..., T, T], float32 or float64.
        weights: w [T], float64; None for ones.
        rtol: relative cut.

    Returns:
        α and C C⁺ w, the cosines that α reaches, [..., T] float64; NaN where M is not finite.
    """
    M = M.to(torch.float64)
    norms = M.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    inverse = torch.where(norms == 0, 0.0, 1 / norms)
    C = M * inverse[..., :, None] * inverse[..., None, :]
    finite = M.isfinite().all(-1).all(-1)[..., None]
    eigh = torch.ops.fastmtl.eigh if M.shape[-1] <= products.FEW_TASKS else products.eigh
    eigenvalues, V = eigh(torch.where(finite[..., None], C, 0.0))
    cut = eigenvalues[..., -1:] * max(rtol**2, 4 * M.shape[-1] * EPS)
    w = is_present(M).to(torch.float64)
    if weights is not None:
        w = w * weights
    along = torch.where(eigenvalues > cut, (w[..., None, :] @ V).squeeze(-2), 0.0)
    least = max(rtol, 16 * M.shape[-1] * EPS)
    reached = along.square().sum(-1, keepdim=True) > least**2 * w.square().sum(-1, keepdim=True)
    x = (V @ torch.where((eigenvalues > cut) & reached, along / eigenvalues, 0.0)[..., None]).squeeze(-1)
    cosines = (C @ x[..., None]).squeeze(-1)
    return torch.where(finite, x * inverse, torch.nan), torch.where(finite, cosines, torch.nan)


def constant(M: Tensor, weights: Tensor | None) -> Tensor:
    """The given weights, [T] or [..., T] (1/T each for None), as α [..., T], 0 for absent tasks.

    NaN where a gradient is not finite. The diagonal of M [..., T, T] shows that: no entry of a Gram matrix is larger
    than the larger of its two diagonal entries.
    """
    T = M.shape[-1]
    w = torch.full((T,), 1 / T, dtype=torch.float64, device=M.device) if weights is None else weights
    finite = M.diagonal(dim1=-2, dim2=-1).isfinite().all(-1, keepdim=True)
    w = torch.where(is_present(M), w.to(torch.float64), 0.0)
    return torch.where(finite, w, torch.nan)
