"""Gram matrix, weights of Aligned-MTL, recombination and the eigendecomposition behind them.

Eigenproblems of few tasks are solved by Jacobi rotations with a relative stopping rule, of many by matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmtl.ops.reference import products
from fastmtl.ops.reference.present import is_present
from fastmtl.ops.reference.rounding import rounded

__all__ = [
    "align",
    "align_gram",
    "align_rows",
    "balance",
    "balance_many",
    "combine",
    "combine_rows",
    "eigh",
    "gram",
    "gram_rows",
    "second_pass",
]

EPS = torch.finfo(torch.float64).eps
# As in csrc/math/thresholds.h, which explains them.
FLOAT32_SQUARE = 1e-20
LEAST_SQUARE, MOST_SQUARE, LEAST_ENTRY, MOST_ENTRY = 1e-200, 1e200, 1e-100, 1e100


def gram(G: Tensor) -> Tensor:
    """M = G Gᵀ in float64, symmetric to the bit. `G` [..., T, P] -> [..., T, T]."""
    G = G.to(torch.float64)
    return _mirrored(G @ G.mT)


def gram_rows(grads: Sequence[Tensor | None], tasks: int, out: Sequence[Tensor] | None = None) -> Tensor:
    """M = Σ_k G_k G_kᵀ in float64 over the K tensors of each row; entry t·K + k is row t, tensor k; None is zero."""
    K = len(grads) // tasks
    device = next((g.device for g in grads if g is not None), torch.device("cpu"))
    M = torch.zeros(tasks, tasks, dtype=torch.float64, device=device)
    for k in range(K):
        column = grads[k::K]
        present = [t for t, g in enumerate(column) if g is not None]
        if present:
            index = torch.tensor(present, device=device)
            flat = torch.stack([g.reshape(-1).to(torch.float64) for g in column if g is not None])
            M[index[:, None], index] += flat @ flat.mT
    return _mirrored(M)


def _mirrored(M: Tensor) -> Tensor:
    """M with its upper triangle mirrored: a matrix product may sum the two triangles in different orders."""
    return M.triu() + M.triu(1).mT


def combine(G: Tensor, alpha: Tensor, out: Tensor) -> None:
    """Writes out = αᵀ G, summed in float64 and rounded once. `G` [..., T, P], `alpha` [..., T], `out` [..., P]."""
    out.copy_(rounded((alpha[..., None, :] @ G.to(torch.float64)).squeeze(-2), out.dtype))


def combine_rows(grads: Sequence[Tensor | None], alpha: Tensor, out: Sequence[Tensor]) -> None:
    """Writes out_k = Σ_t α_t g_{t,k}, summed in float64 and rounded once; None is zero."""
    K, weights = len(out), alpha.unbind()
    for k, target in enumerate(out):
        total = torch.zeros(target.shape, dtype=torch.float64, device=target.device)
        for weight, g in zip(weights, grads[k::K], strict=True):
            # A missing gradient is zero times a weight that need not be finite.
            total += weight * (0.0 if g is None else g.to(torch.float64))
        target.copy_(rounded(total, target.dtype))


def eigh(M: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and eigenvectors (columns) of symmetric `M` [..., T, T], as torch.linalg.eigh returns."""
    lower = M.to(torch.float64).tril().reshape(-1, *M.shape[-2:])
    finite = lower.isfinite().all(-1).all(-1)[:, None]
    lower = torch.where(finite[..., None], lower, torch.zeros_like(lower))
    lower = lower + lower.tril(-1).mT
    lam, V = _jacobi(lower) if M.shape[-1] <= products.FEW_TASKS else torch.linalg.eigh(lower)
    lam, V = torch.where(finite, lam, torch.nan), torch.where(finite[..., None], V, torch.nan)
    return lam.reshape(M.shape[:-1]).to(M.dtype), V.reshape(M.shape).to(M.dtype)


def balance(
    M: Tensor, weights: Tensor | None, scale: str, rtol: float, zero: float, rank_rule: str
) -> tuple[Tensor, Tensor, Tensor]:
    """α = sqrt(s) V_R diag(λ_R^-1/2) V_Rᵀ w (paper, Algorithm 1), with the rank rule of docs/numerics.md.

    `M` [..., T, T]; `weights` [T] or None for 1/T. Returns α [..., T], eigenvalues [..., T] in descending order
    (negative rounding noise as zero) and rank [...] (int64).
    """
    solver = _jacobi if M.shape[-1] <= products.FEW_TASKS else products.eigh
    return _balance(M, weights, scale, rtol, zero, rank_rule, solver)


def balance_many(
    M: Tensor, weights: Tensor | None, scale: str, rtol: float, zero: float, rank_rule: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`balance` by matrix products and Cholesky factorisations, for many tasks: on a GPU the host does not wait."""
    return _balance(M, weights, scale, rtol, zero, rank_rule, products.eigh)


def _balance(
    M: Tensor,
    weights: Tensor | None,
    scale: str,
    rtol: float,
    zero: float,
    rank_rule: str,
    solver: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """`balance` by an eigensolver of [B, T, T], which gets M and what the rank is judged by in one batch."""
    shape, T = M.shape, M.shape[-1]
    M = M.to(torch.float64).reshape(-1, T, T)
    B = len(M)
    w = M.new_full((T,), 1 / T) if weights is None else weights.to(M)
    finite = M.isfinite().all(-1).all(-1)
    M = torch.where(finite[:, None, None], M, torch.zeros_like(M))
    spectra, vectors = solver(M if rank_rule == "gram" else torch.cat([M, _row_normalised(M, zero)]))
    lam, V = spectra[:B].flip(-1).clamp_min(0.0), vectors[:B].flip(-1)
    judged = spectra[-B:].flip(-1) if B else lam
    rank = (judged > judged[:, :1].clamp_min(0.0) * rtol**2).sum(-1)
    rank = torch.minimum(rank, (lam > 0.0).sum(-1))
    kept = torch.arange(T, device=M.device) < rank[:, None]
    last = (rank - 1).clamp_min(0)[:, None]
    if scale == "min":
        s = lam.gather(-1, last)
    elif scale == "median":  # the lower median of the kept ones, which come first and descend
        s = lam.gather(-1, rank[:, None] // 2)
    else:
        s = (lam * kept).sum(-1, keepdim=True) / rank[:, None].clamp_min(1)
    inverse = torch.where(kept, (s / lam).sqrt(), 0.0)
    alpha = (V @ (inverse * (w @ V))[..., None])[..., 0]
    alpha = torch.where(is_present(M), alpha, 0.0)  # exactly: matrix products leave zeros only to rounding
    alpha = torch.where(finite[:, None], alpha, torch.nan)
    lam = torch.where(finite[:, None], lam, torch.nan)
    rank = torch.where(finite, rank, 0)
    return alpha.reshape(shape[:-1]), lam.reshape(shape[:-1]), rank.reshape(shape[:-2])


def align_gram(
    M: Tensor, weights: Tensor | None, scale: str, rtol: float, zero: float, rank_rule: str
) -> tuple[Tensor, Tensor]:
    """α and the rank as from `balance`."""
    alpha, _, rank = balance(M, weights, scale, rtol, zero, rank_rule)
    return alpha, rank


def align(G: Tensor, weights: Tensor | None, scale: str, rtol: float, zero: float, rank_rule: str, out: Tensor) -> None:
    """gram, align_gram and combine of one matrix [T, P] or a batch [B, T, P]."""
    M = gram(G)
    if G.dtype is torch.float64:
        M = gram(G * _power_of_two(G, (-1, -2))[..., None, None])
    alpha, _ = align_gram(M, weights, scale, rtol, zero, rank_rule)
    combine(G, alpha, out)


def align_rows(
    grads: Sequence[Tensor | None],
    tasks: int,
    weights: Tensor | None,
    scale: str,
    rtol: float,
    zero: float,
    rank_rule: str,
    out: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """gram_rows, align_gram and combine_rows; returns gram, α, rank."""
    M = gram_rows(grads, tasks)
    factor = torch.ones((), dtype=torch.float64, device=M.device)
    wide = [g for g in grads if g is not None and g.dtype is torch.float64 and g.numel()]
    if wide:
        factor = torch.stack([_power_of_two(g, None) for g in wide]).min()
    judged = M
    if factor != 1.0:
        judged = gram_rows([None if g is None else g.to(torch.float64) * factor for g in grads], tasks)
    alpha, rank = align_gram(judged, weights, scale, rtol, zero, rank_rule)
    combine_rows(grads, alpha, out)
    return M, alpha, rank


def second_pass(M: Tensor, bound: Tensor, blocks: bool) -> Tensor:
    """Whether G has to be read again for a better M, and how to scale it: [..., 3], the kernels' `Verdict`.

    Args:
        M: [..., T, T], of the first pass.
        bound: [...]: the λ_min(C) that float32 blocks need, or without blocks the largest float64 entry.
        blocks: whether the first pass summed float32 blocks.

    Returns:
        1 or 0, and two factors, powers of two (1 if nothing is scaled), whose product might leave the range of numbers.
    """
    squares = M.diagonal(dim1=-2, dim2=-1)
    one = torch.ones_like(bound)
    if blocks:  # good enough if C - bound is positive definite, unless a product has underflowed
        inverse = squares.rsqrt()
        shifted = M * inverse[..., :, None] * inverse[..., None, :] - torch.diag_embed(
            bound[..., None].expand_as(squares)
        )
        good = products.cholesky(shifted)[1] & (squares.amin(-1) >= FLOAT32_SQUARE)
        return torch.stack([(~good).to(bound), one, one], -1)
    largest = squares.amax(-1)
    out_of_range = ~((largest > LEAST_SQUARE) & (largest < MOST_SQUARE))
    needed = out_of_range & ((bound <= LEAST_ENTRY) | (bound >= MOST_ENTRY)) & (bound > 0.0) & bound.isfinite()
    exponent = torch.frexp(torch.where(needed, bound, one)).exponent
    half = torch.div(exponent, 2, rounding_mode="trunc")
    factors = (torch.exp2(-part.to(bound)) for part in (half, exponent - half))
    return torch.stack([needed.to(bound), *(torch.where(needed, factor, one) for factor in factors)], -1)


def _power_of_two(G: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    """A power of two that scales float64 entries whose squares would over- or underflow to about 1; else 1."""
    if not G.numel():
        return G.new_ones(G.shape[:-2] if dims else ())
    largest = G.abs().amax(dims) if dims else G.abs().amax()
    exponent = torch.frexp(largest).exponent.to(G.dtype)
    needed = ((largest > MOST_ENTRY) | (largest < LEAST_ENTRY)) & (largest > 0) & largest.isfinite()
    return torch.where(needed, torch.exp2(-exponent), torch.ones_like(largest))


def _row_normalised(M: Tensor, zero: float) -> Tensor:
    """C = D^-1/2 M D^-1/2; rows whose norm is at most `zero` of the largest are rounding noise and become zero."""
    norm = M.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    inverse = torch.where(norm > zero * norm.amax(-1, keepdim=True), 1.0 / norm, 0.0)
    return M * inverse[:, :, None] * inverse[:, None, :]


def _jacobi(M: Tensor) -> tuple[Tensor, Tensor]:
    """Two-sided Jacobi, round-robin order: every round rotates T/2 disjoint pairs, over the whole batch at once.

    Stops when all |m_ij| <= eps sqrt(|m_ii m_jj|), which keeps the small eigenvalues of a graded matrix accurate
    (Demmel and Veselić 1992); LAPACK's tridiagonalisation does not.
    """
    B, T, _ = M.shape
    h = (T + 1) // 2  # pairs (i, h + i) of 2h rows; for odd T the last row is zero and returns to its place
    largest = M.abs().amax((-1, -2)) if T else M.new_zeros(B)
    exponent = torch.frexp(largest).exponent
    # A above V: their columns are rotated together.
    AV = M.new_zeros(B, 2 * h + T, 2 * h)
    AV[:, :T, :T] = torch.ldexp(M, -exponent[:, None, None])
    AV[:, 2 * h :, :T] = torch.eye(T, dtype=M.dtype, device=M.device)
    # The first stays, the others rotate by one place: along the first halves of the pairs, and back along the second.
    moved = [0, h, *range(1, h - 1), *range(h + 1, 2 * h), h - 1] if h > 1 else [0, 1]
    columns = torch.tensor(moved, device=M.device)
    rows = torch.cat([columns, torch.arange(2 * h, 2 * h + T, device=M.device)])
    for _ in range(40):
        A = AV[:, : 2 * h]
        d = A.diagonal(dim1=-2, dim2=-1)
        off = A - torch.diag_embed(d)
        if not bool((off * off > EPS * EPS * (d[:, :, None] * d[:, None, :]).abs()).any()):
            break
        for _ in range(2 * h - 1):
            A = AV[:, : 2 * h]
            a_pp, a_qq = A.diagonal(dim1=-2, dim2=-1).clone().split(h, -1)
            a_pq = A[:, :h, h:].diagonal(dim1=-2, dim2=-1).clone()
            delta = a_qq - a_pp
            active = a_pq * a_pq > EPS * EPS * (a_pp * a_qq).abs()
            t = 2 * a_pq / (delta.abs() + torch.hypot(delta, 2 * a_pq))
            t = torch.where(active, torch.where(delta < 0, -t, t), 0.0).nan_to_num(0.0)
            c = 1 / torch.sqrt(1 + t * t)
            s = t * c
            c, s = torch.cat([c, c], -1), torch.cat([-s, s], -1)
            AV = torch.addcmul(AV * c[:, None], AV.roll(h, -1), s[:, None])
            A = AV[:, : 2 * h]
            A.copy_(torch.addcmul(A * c[..., None], A.roll(h, -2), s[..., None]))
            A.diagonal(dim1=-2, dim2=-1).copy_(torch.cat([a_pp - t * a_pq, a_qq + t * a_pq], -1))
            a_pq = torch.where(active, 0.0, a_pq)
            A.diagonal(h, -2, -1).copy_(a_pq)
            A.diagonal(-h, -2, -1).copy_(a_pq)
            AV = AV.index_select(-1, columns).index_select(-2, rows)
    lam, order = AV[:, :T, :T].diagonal(dim1=-2, dim2=-1).sort(-1)
    return torch.ldexp(lam, exponent[:, None]), AV[:, 2 * h :, :T].gather(-1, order[:, None, :].expand(B, T, T))
