"""Eigenvectors of the Gram matrices of many tasks, by matrix products and Cholesky factorisations alone.

The number of steps is fixed and nothing is read back: on a GPU the host does not wait, and what torch can capture in a
CUDA graph stays capturable. docs/numerics.md ("On a GPU, many tasks") has the derivation.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FEW_TASKS", "cholesky", "eigh"]

EPS = torch.finfo(torch.float64).eps
# Doublings of the power before the basis is renewed, and after: eigenvalues that differ by 1e-5 are separated. Of
# closer ones, no more than their difference stays off the diagonal.
FIRST, THEN = 3, 22
# Times T, added to the diagonal of the row-normalised matrix: the first that makes it positive definite. They cover the
# rounding of dependent rows in float64, of several sums of them, in float32, and in 16 bits.
LIFTS = (0.0, 2.0**-48, 2.0**-40, 2.0**-24, 2.0**-8)
GOLDEN = 0.6180339887498949  # its multiples by squares, modulo one, are as good as random
TINY = 2.0**-500  # a norm, relative to the largest: the square of a smaller one is subnormal
LEAF = 128  # rows factorised at once; the rest is matrix products
ENTRIES = 1 << 21  # of the matrices solved at once
FEW_TASKS = 64  # up to this many, Jacobi rotations are faster


def eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues [..., T] and eigenvectors [..., T, T] of positive semidefinite `A` [..., T, T].

    Accurate relative to the row norms, as Jacobi rotations are, however long or short a row is. A matrix that is
    semidefinite up to rounding errors has some eigenvalues around zero; one that is further from it gives NaN.
    """
    T = A.shape[-1]
    found = [_eigh(part) for part in A.reshape(-1, T, T).split(max(1, ENTRIES // T**2))]
    lam, V = (torch.cat(parts) for parts in zip(*found, strict=True))
    return lam.reshape(A.shape[:-1]), V.reshape(A.shape)


def _eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """Of A [B, T, T]."""
    T = A.shape[-1]
    eye = torch.eye(T, dtype=A.dtype, device=A.device)
    squares = A.diagonal(dim1=-2, dim2=-1).clamp_min(0.0)
    exponent = torch.frexp(squares.amax(-1)).exponent.to(A.dtype).clamp(-1022.0, 1022.0)[:, None]
    norms = (squares * torch.exp2(-exponent)).sqrt()
    absent = norms <= TINY
    norms = torch.where(absent, TINY, norms)
    C = A * torch.exp2(-exponent)[..., None] / norms[:, :, None] / norms[:, None, :]
    C = torch.where(absent[:, :, None] | absent[:, None, :], 0.0, C)
    # Longest rows first, but not in the caller's order: neighbours may be alike, and the first rows a poor basis.
    place = torch.arange(1, T + 1, dtype=A.dtype, device=A.device)
    _, n, V = _descending(norms.log2() + 2.0 * (GOLDEN * place.square() % 1.0), norms[:, None, :], eye.expand_as(C))
    n = n.squeeze(-2)
    C = torch.where(eye > 0.0, 1.0, V.mT @ C @ V)
    F, lift = _lifted(C, eye)
    n, Y, V = _turned(F, n, V, FIRST)
    n, _, V = _turned(_root(Y), n, V, THEN)
    added = lift * norms.square()
    lam = torch.where(n > 2.0 * TINY, n.square() - (added[:, None, :] @ V.square()).squeeze(-2), 0.0)
    lam, order = (lam * torch.exp2(exponent)).sort(-1)
    return lam, V.gather(-1, order[:, None, :].expand_as(V))


def _turned(F: Tensor, n: Tensor, V: Tensor, doublings: int) -> tuple[Tensor, ...]:
    """A basis nearer than V [B, T, T] to the eigenvectors of V diag(n) F Fᵀ diag(n) Vᵀ, F lower triangular.

    The higher the power of the matrix, the nearer; n descends, up to small factors.

    Returns:
        n [B, T], Y and V [B, T, T]: the matrix is V diag(n) YᵀY diag(n) Vᵀ, with unit columns of Y.
    """
    logs, X = _columns(torch.zeros_like(n), F * n[:, :, None])
    for _ in range(doublings):  # A^m = X diag(exp(2 logs)) Xᵀ
        logs, X = _descending(logs, X)
        K = _root(X)
        decay = (2.0 * (logs[:, :, None] - logs[:, None, :])).clamp_max(0.0).exp()
        logs, X = _columns(2.0 * logs, X @ (K * decay))
    Q = _orthonormal(_orthonormal(X))
    logs, Y = _columns(torch.zeros_like(n), F.mT @ (n[:, :, None] * Q))
    logs, Y, V = _descending(logs, Y, V @ Q)
    return logs.exp(), Y, V


def cholesky(A: Tensor) -> tuple[Tensor, Tensor]:
    """L with L Lᵀ = A [..., T, T], of which the lower triangle is read, and whether it exists, bool [...]."""
    L, failed = _factor(A)
    return L, (failed == 0) & L.isfinite().all(-1).all(-1)


def _factor(A: Tensor) -> tuple[Tensor, Tensor]:
    """L, and an integer [...] that is not zero if the factorisation failed."""
    T = A.shape[-1]
    if T <= LEAF:
        L, failed = torch.linalg.cholesky_ex(A, check_errors=False)
        return L, failed
    L, failed = torch.zeros_like(A), torch.zeros(A.shape[:-2], dtype=torch.int32, device=A.device)
    for i in range(0, T, LEAF):
        j = min(i + LEAF, T)
        panel = A[..., i:, i:j]
        if i:
            panel = panel - L[..., i:, :i] @ L[..., i:j, :i].mT
        leaf, info = torch.linalg.cholesky_ex(panel[..., : j - i, :], check_errors=False)
        failed += info
        L[..., i:j, i:j] = leaf
        if j < T:
            L[..., j:, i:j] = torch.linalg.solve_triangular(leaf.mT, panel[..., j - i :, :], upper=True, left=False)
    return L, failed


def _root(X: Tensor) -> Tensor:
    """Lower triangular K with K Kᵀ = XᵀX, for unit columns of X [B, T, T].

    It always exists: what rounding may have taken from the diagonal is added back.
    """
    H = X.mT @ X
    H.diagonal(dim1=-2, dim2=-1).add_(4.0 * X.shape[-1] * EPS)
    return _factor(H)[0]


def _lifted(C: Tensor, eye: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of C with the smallest of LIFTS that suffices, and that one [B, 1]; NaN if none does."""
    T = C.shape[-1]
    L, fine = cholesky(torch.stack([C + T * lift * eye for lift in LIFTS]))
    F, lift = torch.full_like(C, torch.nan), C.new_zeros(len(C), 1)
    for mine, does, added in reversed(list(zip(L.unbind(), fine.unbind(), LIFTS, strict=True))):
        F = torch.where(does[:, None, None], mine, F)
        lift = torch.where(does[:, None], T * added, lift)
    return F, lift


def _columns(logs: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """X diag(exp(logs)) with the columns of X [B, T, T] scaled to norm one."""
    norms = torch.linalg.vector_norm(X, dim=-2)
    return logs + norms.log(), X / norms[:, None, :]


def _descending(keys: Tensor, *matrices: Tensor) -> tuple[Tensor, ...]:
    """The keys [B, T] in descending order, and the columns of matrices [B, T, T] in the same order."""
    keys, order = keys.sort(-1, descending=True)
    return keys, *(X.gather(-1, order[:, None, :].expand_as(X)) for X in matrices)


def _orthonormal(X: Tensor) -> Tensor:
    """Q of X = Q R."""
    Q: Tensor = torch.linalg.solve_triangular(_root(X).mT, X, upper=True, left=False)
    return Q
