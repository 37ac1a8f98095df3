"""`balance` and `unit_solve` of more than 64 tasks, whose eigenproblem is solved without eigenvectors: against LAPACK's
with them, in float64."""

import pytest
import torch
from helpers import EPS64, F64, generator, needs_extension, randn, relative

from fastmtl import ops

SIZES = (65, 100, 257, 600)
SCALES = ("min", "median", "rmse")
RTOL = 1e-6
TINY = 1e-16  # policy.zero


def orthogonal(T, seed):
    return torch.linalg.qr(randn(T, T, dtype=F64, seed=seed))[0]


def of_spectrum(lam, seed=1):
    Q = orthogonal(lam.numel(), seed)
    M = (Q * lam) @ Q.T
    return (M + M.T) / 2


def gram_of(*shape, seed=2):
    G = randn(*shape, dtype=F64, seed=seed)
    return G @ G.T


def blocks(T):
    M = torch.zeros(T, T, dtype=F64)
    for begin in range(0, T, 30):
        n = min(30, T - begin)
        M[begin : begin + n, begin : begin + n] = gram_of(n, 90, seed=begin)
    return M


# T -> a matrix of full rank and a condition number of at most 1e4.
FULL = {
    "random": lambda T: gram_of(T, 3 * T),
    "graded eigenvalues": lambda T: of_spectrum(torch.logspace(0, -4, T, dtype=F64)),
    "two clusters": lambda T: of_spectrum(
        torch.cat([torch.full((T // 2,), 1.0), torch.full((T - T // 2,), 1e-3)]).to(F64)
    ),
    "tight cluster": lambda T: of_spectrum(1 + 1e-13 * torch.arange(T, dtype=F64)),
    "one large eigenvalue": lambda T: torch.eye(T, dtype=F64) + 1.0,
    "identity": lambda T: torch.eye(T, dtype=F64),
    "diagonal": lambda T: torch.diag(torch.rand(T, dtype=F64, generator=generator(3)) + 0.1),
    "blocks": blocks,
    "tiny off-diagonal": lambda T: torch.diag(torch.linspace(1, 2, T, dtype=F64)) + 1e-30 * gram_of(T, 3 * T),
    "underflowing off-diagonal": lambda T: torch.diag(torch.linspace(1, 2, T, dtype=F64)) + 1e-200 * gram_of(T, 3 * T),
    "tridiagonal": lambda T: (
        2.1 * torch.eye(T, dtype=F64)
        - torch.eye(T, dtype=F64).roll(1, 0).tril()
        - torch.eye(T, dtype=F64).roll(-1, 0).triu()
    ),
    "1e150": lambda T: 1e150 * gram_of(T, 3 * T),
    "1e-150": lambda T: 1e-150 * gram_of(T, 3 * T),
    "1e290": lambda T: 1e290 * gram_of(T, 3 * T),
    "1e-290": lambda T: 1e-290 * gram_of(T, 3 * T),
}

# T -> a matrix of lower rank whose other eigenvalues are rounding noise, and its rank.
DEFICIENT = {
    "few columns": lambda T: (gram_of(T, T // 3), T // 3),
    "ones": lambda T: (torch.ones(T, T, dtype=F64), 1),
    "opposed pairs": lambda T: ((s := torch.tensor([1.0, -1.0], dtype=F64).repeat(T)[:T])[:, None] * s, 1),
    "duplicates": lambda T: (gram_of(T // 2, 3 * T).repeat_interleave(2, 0).repeat_interleave(2, 1), T // 2),
    "half a spectrum": lambda T: (of_spectrum((torch.arange(T) % 2).to(F64)), T // 2),
}


def eigh(M):
    """Descending, of a matrix of any size: LAPACK's own scaling fails some of the extremes."""
    size = M.abs().max()
    lam, V = torch.linalg.eigh(M / size)
    return lam.flip(0).clamp_min(0) * size, V.flip(1)


def expected_weights(lam, V, rank, w, scale):
    kept = lam[:rank]
    s = {"min": kept[-1], "median": kept[rank // 2], "rmse": kept.mean()}[scale]
    return V[:, :rank] @ ((s / kept).sqrt() * (V[:, :rank].T @ w))


def weights(T):
    return torch.rand(T, dtype=F64, generator=generator(4)) + 0.1


@pytest.mark.cover(1)
@pytest.mark.parametrize("T", SIZES)
@pytest.mark.parametrize("name", FULL)
def test_full_rank(name, T):
    M = FULL[name](T)
    lam, V = eigh(M)
    # Errors of both solvers: about eps λ_max for each eigenvalue, and on the way to it T rotations of random sign.
    limit = 1e-12 + T**0.5 * EPS64 * lam[0] / lam[-1]
    for scale in SCALES:
        alpha, eigenvalues, rank = ops.balance(M, weights(T), scale, RTOL, TINY, "gram")
        assert rank == T
        assert (eigenvalues / lam[0] - lam / lam[0]).abs().max() <= 64 * EPS64
        assert (eigenvalues.diff() <= 0).all()
        assert relative(alpha, expected_weights(lam, V, T, weights(T), scale)) <= limit


@pytest.mark.parametrize("rank_rule", ["gram", "normalized"])
@pytest.mark.parametrize("T", SIZES)
@pytest.mark.parametrize("name", DEFICIENT)
def test_dependent_rows(name, T, rank_rule):
    M, R = DEFICIENT[name](T)
    M = M[:T, :T]
    T = M.shape[0]
    lam, V = eigh(M)
    for scale in SCALES:
        alpha, eigenvalues, rank = ops.balance(M, weights(T), scale, RTOL, TINY, rank_rule)
        assert rank == R
        assert (eigenvalues - lam).abs().max() <= 64 * EPS64 * lam[0]
        assert (eigenvalues >= 0).all()
        assert relative(alpha, expected_weights(lam, V, R, weights(T), scale)) <= 1e-12


@pytest.mark.parametrize("T", SIZES)
def test_without_weights_is_with_even_ones(T):
    M = gram_of(T, 3 * T)
    even = torch.full((T,), 1 / T, dtype=F64)
    for got, expected in zip(
        ops.balance(M, None, "min", RTOL, TINY, "gram"), ops.balance(M, even, "min", RTOL, TINY, "gram"), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("T", SIZES)
def test_zero(T):
    alpha, eigenvalues, rank = ops.balance(torch.zeros(T, T, dtype=F64), None, "min", RTOL, TINY, "normalized")
    assert rank == 0
    assert not alpha.any()
    assert not eigenvalues.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("T", SIZES)
def test_not_finite(T, bad):
    M = gram_of(T, 3 * T)
    M[3, T - 2] = M[T - 2, 3] = bad
    alpha, eigenvalues, rank = ops.balance(M, None, "min", RTOL, TINY, "gram")
    assert rank == 0
    assert alpha.isnan().all()
    assert eigenvalues.isnan().all()


@pytest.mark.parametrize("scale", [1e-300, 1e-140, 1e140, 1e300])
@pytest.mark.parametrize("T", SIZES)
def test_power_of_two_changes_no_bit(T, scale):
    """Up to underflow of the small eigenvalues, the scaled matrix is the same one."""
    factor = 2.0 ** round(torch.tensor(scale, dtype=F64).log2().item())
    M = of_spectrum(torch.logspace(0, -2, T, dtype=F64))
    alpha, eigenvalues, rank = ops.balance(M, weights(T), "median", RTOL, TINY, "gram")
    scaled_alpha, scaled, scaled_rank = ops.balance(M * factor, weights(T), "median", RTOL, TINY, "gram")
    assert torch.equal(scaled, eigenvalues * factor)
    assert relative(scaled_alpha, alpha) <= 1e-15
    assert torch.equal(rank, scaled_rank)


@pytest.mark.parametrize("T", SIZES)
@pytest.mark.parametrize("rank", [None, 40])
def test_unit_solve(T, rank):
    M = gram_of(T, rank or 3 * T)
    norms = M.diagonal().sqrt()
    C = M / norms / norms[:, None]
    w = weights(T)
    alpha, cosines = ops.unit_solve(M, w, 1e-7)
    lam, V = eigh(C)
    R = rank or T
    x = V[:, :R] @ ((V[:, :R].T @ w) / lam[:R])
    assert relative(alpha * norms, x) <= 1e-12
    assert relative(cosines, C @ x) <= 1e-12


@needs_extension  # the reference leaves the order of sums to the BLAS
@pytest.mark.parametrize("rank_rule", ["gram", "normalized"])
@pytest.mark.parametrize("T", [65, 257, 600, 1030])
def test_same_bits_for_any_number_of_threads(T, rank_rule):
    matrices = [gram_of(T, 3 * T), gram_of(T, T // 2)]
    expected = None
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        got = [x for M in matrices for x in ops.balance(M, weights(T), "rmse", RTOL, TINY, rank_rule)]
        expected = got if expected is None else expected
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), threads
