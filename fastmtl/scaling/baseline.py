"""What a point is measured against: its gradients, the same method in plain PyTorch, and the answer in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastmtl.info import tolerances
from fastmtl.scaling.digits import per_example
from fastmtl.scaling.points import DTYPES, METHODS, Point

__all__ = ["Pure", "affordable", "error", "exact", "gradients", "task_weights", "tolerance"]

AFFORDABLE = 2e10  # multiply-adds: a QR decomposition in float64 takes a few times as many
CHUNK = 1 << 22  # numbers that are converted to float64 at a time


def gradients(point: Point, device: str = "cpu") -> Tensor:
    """Gradients [T, P] or [B, T, P]: real ones, or random ones with a condition number of about `kappa`.

    Every row of the random ones is a mixture of all directions.
    """
    if point.gradients == "real":
        return per_example(point.tasks, point.params).to(device, DTYPES[point.dtype])
    dtype = torch.float64 if point.dtype == "float64" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    mixed = point.kappa > 1
    if mixed:
        square = torch.randn(point.tasks, point.tasks, generator=generator, device=device, dtype=torch.float64)
        spectrum = point.kappa ** -torch.linspace(0, 1, point.tasks, dtype=torch.float64, device=device)
        mixture = (torch.linalg.qr(square).Q * spectrum).to(dtype)
    G = torch.empty(point.shape, dtype=DTYPES[point.dtype], device=device)
    for chunk in _chunks(G):
        noise = torch.randn(chunk.shape, generator=generator, device=device, dtype=dtype)
        chunk.copy_(mixture @ noise if mixed else noise)
    return G


def task_weights(M: Tensor, w: Tensor) -> Tensor:
    """α = sqrt(λ_min) V diag(λ^-1/2) Vᵀ w from Gram matrices `M` [T, T] or [B, T, T] of full rank, in their dtype.

    A chain of matrix-vector products, without any T×T matrix but V.
    """
    lam: Tensor
    V: Tensor
    lam, V = torch.linalg.eigh(M)
    if M.ndim == 2:
        return lam[0].sqrt() * (V @ ((V.T @ w) * lam.rsqrt()))
    return ((lam[:, :1].sqrt() * ((w @ V) * lam.rsqrt()))[:, None] @ V.mT)[:, 0]


class Pure:
    """Aligned-MTL as an experienced user of plain PyTorch would write it.

    Gram, eigenvectors and result are in the gradients' dtype (16-bit types use float32's eigensolver), and the result
    is allocated once. Full rank is assumed.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        """Allocates the result for gradients of this shape: [P] for [T, P], or [B, 1, P] for [B, T, P]."""
        *batch, T, P = shape
        self.dtype: torch.dtype = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        self.w: Tensor = torch.full((T,), 1 / T, dtype=self.dtype, device=device)
        self.out: Tensor = torch.empty((*batch, 1, P) if batch else (P,), dtype=dtype, device=device)

    def __call__(self, G: Tensor) -> Tensor:
        """`G` [T, P] -> [P] or [B, T, P] -> [B, P], overwritten by the next call."""
        if G.ndim == 3:
            alpha = task_weights(torch.bmm(G, G.mT).to(self.dtype), self.w)
            return torch.bmm(alpha.to(G.dtype)[:, None], G, out=self.out)[:, 0]
        return torch.mv(G.T, task_weights((G @ G.T).to(self.dtype), self.w).to(G.dtype), out=self.out)


def affordable(point: Point) -> bool:
    """Whether a singular value decomposition of the gradients takes seconds, not minutes."""
    return point.batch * point.tasks**2 * point.params <= AFFORDABLE


def exact(G: Tensor, point: Point) -> Tensor:
    """Float64 task weights [T] or [B, T], on the CPU.

    Aligned-MTL's come from a singular value decomposition of the gradients if it is `affordable`, else from a float64
    Gram matrix, accurate to κ² times float64's eps. Those of other methods are fastmtl's own for that Gram matrix: they
    only check what is done with the gradients.
    """
    if point.method != "AlignedMTL":
        return METHODS[point.method]().weighting(_gram(G), G.dtype).cpu()
    if affordable(point):
        L = _factor(G).cpu()
        norms = torch.linalg.vector_norm(L, dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        U, sigma, _ = torch.linalg.svd(L, full_matrices=False)
        judged = torch.linalg.svdvals(L / norms)
    else:
        M = _gram(G).cpu()
        norms = M.diagonal(dim1=-2, dim2=-1).sqrt()[..., None]
        lam, V = torch.linalg.eigh(M)
        sigma, U = lam.clamp_min(0).sqrt().flip(-1), V.flip(-1)
        judged = torch.linalg.eigvalsh(M / norms / norms.mT).clamp_min(0).sqrt().flip(-1)
    rtol, _ = tolerances(point.tasks, G.dtype)
    kept = judged > rtol * judged[..., :1]
    smallest = sigma.gather(-1, kept.sum(-1, keepdim=True) - 1)
    inverse = torch.where(kept, smallest / sigma, 0.0) * U.mean(-2)  # Uᵀw: the mean of U's rows
    alpha: Tensor = U @ inverse[..., None]
    return alpha[..., 0]


def error(result: Tensor, alpha: Tensor, G: Tensor) -> float:
    """How far a result is from αᵀ G, relative to it, in the 2-norm."""
    alpha = alpha.to(G.device)[..., None, :]
    difference = norm = 0.0
    for part, found in zip(_chunks(G), _chunks(result[..., None, :], G.shape[-2]), strict=True):
        expected = alpha @ part.double()
        difference += float((found - expected).square().sum())
        norm += float(expected.square().sum())
    return math.sqrt(difference / norm) if math.isfinite(difference) else math.inf


def tolerance(point: Point) -> float:
    """The allowed relative error: what docs/numerics.md promises, and rounding of the result.

    If nothing is promised, any finite result will do.
    """
    eps = torch.finfo(DTYPES[point.dtype]).eps
    if point.method != "AlignedMTL":
        return max(1e-4, eps)
    if point.gradients == "real":  # κ of full rank is below 1e3
        return max(1e-4, eps)
    if point.tasks <= 40 and point.kappa <= 1e4:
        return max(2e-6, eps)
    promised = point.kappa <= 1e5 and point.kappa * point.tasks * torch.finfo(torch.float32).eps <= 0.3
    return max(1e-4, eps) if promised else math.inf


def _chunks(G: Tensor, tasks: int | None = None) -> Iterator[Tensor]:
    """Blocks of columns, each of at least as many columns as there are tasks."""
    T = G.shape[-2] if tasks is None else tasks
    yield from G.split(max(T, CHUNK // T), dim=-1)


def _gram(G: Tensor) -> Tensor:
    M = G.new_zeros((*G.shape[:-1], G.shape[-2]), dtype=torch.float64)
    for part in _chunks(G):
        wide = part.double()
        M += wide @ wide.mT
    return M


def _factor(G: Tensor) -> Tensor:
    """L [..., T, T] with L Lᵀ = G Gᵀ and the singular values of G, by QR decompositions of its column blocks."""
    R = G.new_empty((*G.shape[:-2], 0, G.shape[-2]), dtype=torch.float64)
    for part in _chunks(G):
        R = torch.linalg.qr(torch.cat([R, part.double().mT], dim=-2), mode="r").R
    return R.mT
