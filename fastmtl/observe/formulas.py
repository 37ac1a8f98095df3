"""The measures as formulas of a checked Gram matrix M [..., T, T], its norms [..., T] and its spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import condition_number, smallest_kept

__all__ = [
    "aligned_gram",
    "condition_number",
    "conflicts",
    "cosines",
    "curvature_bound",
    "max_norm_ratio",
    "norms",
    "pairs",
    "similarity",
    "smallest_kept",
    "stable_rank",
    "total",
    "total_cosines",
]

# What float64 leaves of ‖g + g'‖² where g' = -g, relative to ‖g‖².
_NOISE = 16 * torch.finfo(torch.float64).eps


def stable_rank(eigenvalues: Tensor) -> Tensor:
    """‖G‖_F² / σ_max² [...]; 0 where all are zero."""
    largest = eigenvalues[..., 0]
    return torch.where(largest == 0, 0.0, eigenvalues.sum(-1) / largest)


def aligned_gram(M: Tensor, eigenvalues: Tensor, kept: Tensor, scale: str) -> Tensor:
    """M̂ = s · V_R V_Rᵀ [..., T, T], s by `scale`: "min", "median" or "rmse"."""
    place = torch.arange(M.shape[-1], device=M.device)
    inside = place < kept[..., None]
    if scale == "min":
        s = smallest_kept(eigenvalues, kept)
    elif scale == "median":  # the lower median of the kept ones, which stand first and descend
        s = eigenvalues.gather(-1, (kept // 2)[..., None])[..., 0]
    else:
        s = (eigenvalues * inside).sum(-1) / kept.clamp_min(1)
    V = ops.eigh(M)[1].flip(-1) * inside[..., None, :]
    P = V @ V.mT
    return s[..., None, None] * (0.5 * P + 0.5 * P.mT)


def norms(M: Tensor) -> Tensor:
    """‖g_t‖ [..., T]."""
    return M.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()


def cosines(M: Tensor, lengths: Tensor) -> Tensor:
    """cos(g_i, g_j) [..., T, T]; 0 for a zero gradient."""
    inverse = torch.where(lengths == 0, 0.0, 1 / lengths)
    C = (M * (inverse[..., :, None] * inverse[..., None, :])).clamp(-1.0, 1.0)
    C.diagonal(dim1=-2, dim2=-1).copy_(torch.where(lengths == 0, 0.0, lengths / lengths))
    return C


def conflicts(cosine: Tensor) -> Tensor:
    """The share [...] of pairs with a negative cosine, for cosines [..., T, T] that are all NaN or none."""
    T = cosine.shape[-1]
    return (cosine < 0).sum((-1, -2), dtype=torch.float64) / max(T * (T - 1), 1) + 0 * cosine[..., 0, 0]


def pairs(lengths: Tensor) -> Tensor:
    """The smaller norm of two over the larger [..., T, T]; 1 for two zeros."""
    a, b = lengths[..., :, None], lengths[..., None, :]
    return torch.where(a == b, 1.0, torch.minimum(a, b) / torch.maximum(a, b))


def similarity(ratio: Tensor) -> Tensor:
    """2r / (1 + r²), of the ratio r of two norms."""
    return 2 * ratio / (1 + ratio * ratio)


def max_norm_ratio(lengths: Tensor) -> Tensor:
    """The largest norm over the smallest [...]; 1 where they are equal."""
    largest, smallest = lengths.amax(-1), lengths.amin(-1)
    return torch.where(largest == smallest, 1.0, largest / smallest)


def curvature_bound(cosine: Tensor, lengths: Tensor) -> Tensor:
    """ξ(g_i, g_j) [..., T, T]."""
    # Both squares over the larger norm's, and the part that cancels split off.
    ratio = pairs(lengths)
    apart = (1 - ratio) ** 2
    difference, total = apart + 2 * ratio * (1 - cosine), apart + 2 * ratio * (1 + cosine)
    bound = torch.where(total <= _NOISE, 4.0, (1 - cosine) * (1 + cosine) * difference / total)
    bound.diagonal(dim1=-2, dim2=-1).mul_(0)
    return bound


def total(M: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Products G (αᵀ G) [..., T] and the norm ‖αᵀ G‖ [...]."""
    products = (M @ alpha[..., None])[..., 0]
    return products, (products * alpha).sum(-1).clamp_min(0.0).sqrt()


def total_cosines(lengths: Tensor, products: Tensor, total: Tensor) -> Tensor:
    """cos(αᵀG, g_t) [..., T], from what `total` returns."""
    size = lengths * total[..., None]
    return torch.where(size == 0, 0.0, products / size).clamp(-1.0, 1.0)
