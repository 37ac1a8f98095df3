"""Pairwise gradient surgery in weight space: PCGrad (Yu et al., 2020) and GradVac (Wang et al., 2021).

The modified gradient of task i is Σ_k v_k g_k with v row i of V, which starts as the identity; its products with all
gradients, C = V M, are kept up to date. All tasks make their n-th visit at once. Absent tasks take no part: their rows
of V are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.ops.reference.philox import permutations
from fastmtl.ops.reference.present import is_present

__all__ = ["gradvac", "pcgrad"]

EPS = torch.finfo(torch.float64).eps


def pcgrad(M: Tensor, seed: Tensor, per_task: bool) -> Tensor:
    """α = Σ_i v_i: each gradient is projected off those that it conflicts with, one after another in random order.

    Args:
        M: [..., T, T].
        seed: int64 [] or [1], on M's device.
        per_task: a separate order for every task (the authors'), else one for all tasks of a matrix.

    Returns:
        α [..., T], float64; NaN where M is not finite.
    """
    X, finite = _finite(M)
    B, T, _ = X.shape
    order = permutations(seed, B, T if per_task else 1, T).expand(B, T, T)
    square = X.diagonal(dim1=-2, dim2=-1)
    V, C = torch.diag_embed(is_present(X).to(X.dtype)), X.clone()
    for n in range(T):
        j = order[:, :, n : n + 1]  # [B, T, 1]: whom task i meets
        product, size = C.gather(-1, j), square[:, :, None].gather(-2, j)
        met = (product < 0.0) & (size > 0.0) & ~_self(j)
        w = torch.where(met, -product / size, 0.0)
        V.scatter_add_(-1, j, w)
        C += w * X.gather(-2, j.expand(B, T, T))
    return torch.where(finite, V.sum(-2), torch.nan).reshape(M.shape[:-1])


def gradvac(M: Tensor, seed: Tensor, beta: float, targets: Tensor) -> Tensor:
    """α = Σ_i v_i: where the cosine φ with g_j is below its target φ̂, so much of g_j is added that it becomes φ̂.

    The targets follow as (1 - beta) φ̂ + beta φ. csrc/math/conflicts.h says what happens where this is not defined:
    φ̂ = 1, cosines within rounding of ±1, and zero vectors, whose targets are kept.

    Args:
        M: [..., T, T].
        seed: int64 [] or [1], on M's device.
        beta: how fast the targets follow.
        targets: [..., T, T] float64, updated in place except where M is not finite.

    Returns:
        α [..., T], float64; NaN where M is not finite.
    """
    X, finite = _finite(M)
    B, T, _ = X.shape
    rounding = 16 * T * EPS
    order = permutations(seed, B, T, T)
    norms = X.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    V, C = torch.diag_embed(is_present(X).to(X.dtype)), X.clone()
    hat = targets.reshape(B, T, T).clone()
    square = norms.square()[..., None]  # [B, T, 1]: of the current gradients
    terms = norms[..., None].clone()  # Σ |v_k| ‖g_k‖, which bounds the rounding error of `square`
    for n in range(T):
        j = order[:, :, n : n + 1]
        norm = norms[:, :, None].gather(-2, j)
        visited = (norm > 0.0) & (square > rounding * terms.square()) & ~_self(j)
        ratio = torch.where(visited, square.clamp_min(0.0).sqrt() / norm, 1.0)
        cosine = torch.where(visited, C.gather(-1, j) / norm / norm / ratio, 0.0)
        cosine = torch.where(cosine.abs() > 1.0 - rounding, cosine.sign(), cosine)
        target = hat.gather(-1, j)
        hat.scatter_(-1, j, torch.where(visited, (1.0 - beta) * target + beta * cosine, target))
        sine = ((1.0 - target) * (1.0 + target)).clamp_min(1e-16).sqrt()
        w = ratio * (target * ((1.0 - cosine) * (1.0 + cosine)).sqrt() / sine - cosine)
        w = torch.where(visited & (cosine < target), w, 0.0)
        V.scatter_add_(-1, j, w)
        C += w * X.gather(-2, j.expand(B, T, T))
        square = torch.where(w == 0.0, square, (V * C).sum(-1, keepdim=True))
        terms += w.abs() * norm
    targets.copy_(torch.where(finite[..., None], hat, targets.reshape(B, T, T)).reshape(targets.shape))
    return torch.where(finite, V.sum(-2), torch.nan).reshape(M.shape[:-1])


def _finite(M: Tensor) -> tuple[Tensor, Tensor]:
    """M as [B, T, T] in float64, with zeros for matrices that are not finite, and which are finite, bool [B, 1]."""
    X = M.to(torch.float64).reshape(-1, *M.shape[-2:])
    finite = X.isfinite().all(-1).all(-1)[:, None]
    return torch.where(finite[..., None], X, 0.0), finite


def _self(j: Tensor) -> Tensor:
    return j == torch.arange(j.shape[1], device=j.device)[:, None]
