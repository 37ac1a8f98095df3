"""Weights of many tasks as a GPU finds them, by matrix products and Cholesky factorisations: run here on the CPU's
tensors, against the CPU's kernels and the SVD."""

import math

import pytest
import torch
from helpers import BF16, EPS32, EPS64, F32, F64, generator, needs_extension, randn, relative, svd_align, svd_rank
from test_spectral import HARD, SCALES, conditioned, real, uniform

from fastmtl import ops
from fastmtl.ops.reference import products

POLICY = (EPS32, "normalized")


@needs_extension
@pytest.mark.parametrize(
    ("T", "steps", "scales"),
    [
        (65, 0, SCALES),
        (65, 1000, SCALES),
        (128, 200, SCALES),
        (256, 200, ("median",)),
        (512, 200, ("rmse",)),
        pytest.param(512, 1000, SCALES, marks=pytest.mark.slow),
        pytest.param(1024, 200, SCALES, marks=pytest.mark.slow),
    ],
)
def test_real_gradients(T, steps, scales):
    """As the CPU's kernels have it: full rank up to T = 256, R = 358 of 1024."""
    G = real(T, steps)
    M, rtol = ops.gram(G), math.sqrt(T * EPS32)
    for scale in scales:
        alpha, lam, rank = ops.balance_many(M, None, scale, rtol, *POLICY)
        expected, lam_expected, rank_expected = ops.balance(M, None, scale, rtol, *POLICY)
        assert rank == rank_expected
        assert rank < T or T <= 256
        assert relative(alpha, expected) <= 1e-4
        assert relative(alpha @ G, expected @ G) <= 2e-6
        kept = slice(int(rank))
        assert ((lam / lam_expected)[kept] - 1).abs().max() <= 2e-6


@pytest.mark.parametrize("name", HARD)
def test_hard_gradients(name):
    """Every kind of uneven and dependent rows, full and truncated, in one batch."""
    T = 70
    G = HARD[name](T)
    T = len(G)
    w = torch.rand(T, dtype=F64, generator=generator(9)) - 0.3
    M = torch.stack([ops.gram(G), 2.0**40 * ops.gram(G), ops.gram(conditioned(T, 10))])
    for rtol, scale, rule in (
        (math.sqrt(T * EPS32), "min", "normalized"),
        (1e-5, "median", "normalized"),
        (1e-5, "rmse", "gram"),
    ):
        alpha, lam, _ = ops.balance_many(M, w, scale, rtol, EPS64, rule)
        assert relative(alpha[0] @ G, svd_align(G, w, scale, rtol, rule)) <= 1e-8
        assert relative(alpha[1], alpha[0]) <= 1e-12
        assert relative(lam[1], 2.0**40 * lam[0]) <= 1e-12
        assert (lam[:, 1:] <= lam[:, :-1]).all()


@pytest.mark.parametrize("T", [1, 2, 3, 9, 64, 65, 127, 128, 129, 260])
def test_eigenvectors(T):
    A = ops.gram(conditioned(T, 100) * uniform(T, 4))
    lam, V = products.eigh(A[None])
    lam, V = lam[0], V[0]
    assert ((V.T @ V) - torch.eye(T)).abs().max() <= 1e-12
    n = A.diagonal().sqrt()
    assert ((V * lam @ V.T - A) / n / n[:, None]).abs().max() <= 1e-11
    D = V.T @ A @ V  # diagonal in the units of its own rows
    if T <= 65:
        assert ((D - torch.diag(lam)) / lam.sqrt() / lam.sqrt()[:, None]).abs().max() <= 1e-6


def test_clusters():
    """Eigenvalues that are equal, or differ by less than the last power of M tells apart."""
    T = 80
    Q = torch.linalg.qr(randn(T, T, dtype=F64))[0]
    for lam in (
        torch.ones(T, dtype=F64),
        1 + 1e-7 * torch.arange(T, dtype=F64),
        torch.tensor([4.0, 1.0, 0.25, 1e-3], dtype=F64).repeat(T // 4),
    ):
        M = (Q * lam) @ Q.T
        alpha, found, rank = ops.balance_many(M, None, "median", 1e-4, *POLICY)
        order = lam.argsort(descending=True)
        lam, V = lam[order], Q[:, order]
        expected = lam[T // 2].sqrt() * V @ (V.sum(0) / T / lam.sqrt())
        assert rank == T
        assert ((found / lam) - 1).abs().max() <= 1e-6
        assert relative(alpha, expected) <= 1e-6


def smooth(T):
    x = torch.arange(T, dtype=F64)
    yield "running sums", torch.ones(T, T, dtype=F64).tril()
    yield "a wide kernel", (-((x[:, None] - x) ** 2) / 18).exp()
    yield "Hilbert", 1 / (x[:, None] + x + 1)
    yield "powers", torch.linspace(-1, 1, T, dtype=F64)[:, None] ** x
    yield "periodic", torch.nn.functional.one_hot(torch.arange(T) % 13, 40).to(F64)


def test_neighbours_that_are_alike():
    """Rows in an order in which the first ones are nearly dependent, whatever lies behind them."""
    T = 130
    for name, G in smooth(T):
        rtol = math.sqrt(T * EPS32)
        alpha, _, rank = ops.balance_many(ops.gram(G), None, "min", rtol, EPS64, "normalized")
        assert rank == svd_rank(G, rtol), name
        assert relative(alpha @ G, svd_align(G, rtol=rtol)) <= 1e-5, name


def test_one_of_a_batch_that_is_not_finite_or_zero_spares_the_others():
    M = torch.stack([ops.gram(randn(70, 200, dtype=F64, seed=s)) for s in range(4)])
    policy = (None, "min", 1e-3, *POLICY)
    alpha, lam, _ = ops.balance_many(M, *policy)
    M[1, 3, 5] = torch.nan
    M[2] = 0.0
    got, lam_got, rank_got = ops.balance_many(M, *policy)
    assert got[1].isnan().all()
    assert lam_got[1].isnan().all()
    assert rank_got.tolist() == [70, 0, 0, 70]
    assert not got[2].any()
    assert not lam_got[2].any()
    for b in (0, 3):
        assert relative(got[b], alpha[b]) <= 1e-12
        assert relative(lam_got[b], lam[b]) <= 1e-12


@pytest.mark.parametrize(("dtype", "rtol", "error"), [(F32, 1e-2, 1e-5), (BF16, 0.14, 0.3)], ids=str)
def test_rounded_grams(dtype, rtol, error):
    """Of low rank, rounded: indefinite by rounding errors."""
    G = randn(90, 30, dtype=F64)
    alpha, lam, rank = ops.balance_many(ops.gram(G).to(dtype).to(F64), None, "rmse", rtol, *POLICY)
    assert rank == 30
    assert (lam >= 0).all()
    assert relative(alpha @ G, svd_align(G, scale="rmse", rtol=1e-3)) <= error


# ------------------------------------------------------------------------------------------------ a second pass over G


def test_blocks_are_good_enough_where_the_smallest_eigenvalue_is_above_the_bound():
    M = torch.stack([ops.gram(conditioned(70, 10) * uniform(70, 6))] * 7)
    n = M[0].diagonal().sqrt()
    least = torch.linalg.eigvalsh(M[0] / n / n[:, None])[0]
    M[3, 0, 1] = M[3, 1, 0] = torch.nan
    M[4, 5, :] = M[4, :, 5] = 0.0
    M[5] *= 1e-25 / M[5].diagonal().min()
    bound = least * torch.tensor([0.99, 1.01, torch.nan, 0.1, 0.1, 0.1, 1e9], dtype=F64)
    verdict = ops.second_pass(M, bound, True)
    assert verdict[:, 0].tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert (verdict[:, 1:] == 1).all()


def test_what_is_out_of_range_is_scaled():
    largest = torch.tensor([1.0, 1e250, 1e-250, 5e-324, math.inf, math.nan, 0.0, 1e120], dtype=F64)
    M = largest[:, None, None].square() * torch.eye(2, dtype=F64)
    again, half, rest = ops.second_pass(M, largest, False).T
    assert again.tolist() == [0, 1, 1, 1, 0, 0, 0, 1]
    scaled = largest * half * rest
    assert ((scaled >= 0.5) & (scaled <= 1))[again > 0].all()
    assert (half * rest)[again == 0].eq(1).all()
    assert (half.log2() % 1 == 0).all()
    assert (rest.log2() % 1 == 0).all()
    # Bound and range: an entry that is large where the Gram matrix is not, needs nothing.
    assert not ops.second_pass(torch.eye(2, dtype=F64), largest[1], False)[0]
