"""Task weights from a tridiagonal matrix, on the host: against long double, against Jacobi's rotations, and which of
the two solves what. Jacobi is what is asked for eigenvalues, so equal bits say that it has solved the other call too.
"""

import math

import harness
import mpmath
import numpy as np
import pytest
import torch
from harness import LARGE_SHARED, MIDDLE_SHARED, ORDERS, SMALL_SHARED, Device
from helpers import EPS32, EPS64, F32, F64, conditioned, generator, randn
from parity import SCALES, graded, with_spectrum
from test_spectral import HARD, real

pytestmark = pytest.mark.cover(1)  # an emulated kernel takes its time

TASKS = (3, 4, 7, 8, 9, 10, 16, 17, 32, 33, 62, 63, 64, 65, 81, 97, 127, 128)
SMALLEST = 1e-8  # λ_min / λ_max, below which Jacobi solves


@pytest.fixture(autouse=True)
def _first_order():
    yield
    harness.module().set_order("sequential", 0)


def weights(T):
    return torch.rand(T, dtype=F64, generator=generator(T)) - 0.3


def spectrum(T, kappa):
    return with_spectrum(torch.logspace(0, -math.log10(kappa), T, dtype=F64), seed=T)


def root(M):
    """M^½ and M^-½ in long double, by Newton and Schulz."""
    M = M.numpy().astype(np.longdouble)
    size, one = np.sqrt((M * M).sum()), np.eye(len(M), dtype=np.longdouble)
    Y, Z = M / size, one
    for _ in range(80):
        step = (3 * one - Z @ Y) / 2
        Y, Z = Y @ step, step @ Z
        if abs(step - one).max() <= 1e-15:
            break
    return Y * np.sqrt(size), Z / np.sqrt(size)


def error(M, alpha, w, scale):
    """Of the aligned gradient, whose norm is sqrt(s) ‖w‖: M^½ is an isometry from α to it."""
    half, inverse = root(M)
    T, exact, w = len(M), M.numpy().astype(np.longdouble), w.numpy().astype(np.longdouble)
    if scale == "rmse":
        s = np.trace(exact) / T
    else:  # a quotient has twice the digits of its vector
        _, V = np.linalg.eigh(M.numpy())
        v = V[:, 0 if scale == "min" else (T - 1) // 2].astype(np.longdouble)
        s = v @ exact @ v / (v @ v)
    off = half @ (alpha.numpy() / np.sqrt(s) - inverse @ w)
    return float(np.sqrt((off @ off) / (w @ w)))


def both(M, w, dtype=F32, **options):
    """α without eigenvalues and with, the ranks, which are the same, and whether it was the tridiagonal way."""
    alpha, _, rank = Device().balance(M, dtype, wanted=False, weights=w, **options)
    jacobi, _, expected = Device().balance(M, dtype, weights=w, **options)
    assert torch.equal(rank, expected)
    return alpha, jacobi, rank, not torch.equal(alpha, jacobi)


@pytest.mark.parametrize("T", TASKS)
@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e4, 1e6, 1e7])
def test_accuracy(T, kappa):
    """eps κ(M) at most, wherever the scratch lies, with the same bits in every order of threads."""
    M, w = spectrum(T, kappa), weights(T)
    scale = SCALES[(T + int(math.log10(kappa))) % 3]
    results = []
    small = SMALL_SHARED if T <= 64 else MIDDLE_SHARED
    for order, limit in zip(ORDERS, (LARGE_SHARED, small, LARGE_SHARED), strict=True):
        harness.module().set_order(order, T)
        results.append(Device(limit=limit).balance(M, F32, wanted=False, weights=w, scale=scale, rtol=1e-6)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    alpha, _, rank, reduced = both(M, w, scale=scale, rtol=1e-6)
    assert torch.equal(alpha, results[0])
    assert reduced
    assert rank == T
    assert error(M, alpha, w, scale) <= 1e-13 + EPS64 * kappa


@pytest.mark.parametrize("T", [3, 10, 33, 64, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scale", SCALES)
def test_both_sides_of_the_switch(T, scale):
    """Where one way ends and the other begins both are as accurate as each other."""
    w, ways = weights(T), set()
    for kappa in np.geomspace(0.2 / SMALLEST, 2 / SMALLEST, 5):
        M = spectrum(T, kappa)
        alpha, jacobi, _, reduced = both(M, w, scale=scale, rtol=1e-6)
        assert max(error(M, alpha, w, scale), error(M, jacobi, w, scale)) <= EPS64 * kappa <= 5e-8
        ways.add(reduced)
    assert ways == {False, True}


def exactly(M, w):
    """M and sqrt(λ_min) M^-½ w, in sixty digits: how far rows are apart is then nothing to them."""
    A, T = mpmath.matrix(M.tolist()), len(M)
    lam, V = mpmath.eigsy(A)
    along = [mpmath.sqrt(lam[0] / lam[j]) * sum(V[i, j] * x for i, x in enumerate(w.tolist())) for j in range(T)]
    return A, mpmath.matrix([sum(V[i, j] * along[j] for j in range(T)) for i in range(T)])


def exact_error(M, alpha, w):
    """Of the aligned gradient, relative."""
    with mpmath.workdps(60):
        A, expected = exactly(M, w)
        off = mpmath.matrix(alpha.tolist()) - expected
        return float(mpmath.sqrt((off.T * A * off)[0] / (expected.T * A * expected)[0]))


@pytest.mark.parametrize("T", [3, 9, 24, pytest.param(70, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("spread", "dtype"), [(1e3, F32), (1e6, F32), (1e1, F64), (1e8, F64), (1e13, F64)], ids=str)
def test_rows_that_are_uneven(T, spread, dtype):
    """Eigenvalues far below the largest, that only rows of small norm are to blame for, cost no accuracy."""
    G, w = conditioned(T, 3 * T, 5.0, spread, dtype=F64, seed=T), weights(T)
    alpha, _, rank, reduced = both(G @ G.T, w, dtype, rtol=1e-6)
    assert reduced
    assert rank == T
    for order, limit in zip(ORDERS, (MIDDLE_SHARED, SMALL_SHARED, LARGE_SHARED), strict=True):
        harness.module().set_order(order, T)
        again = Device(limit=limit).balance(G @ G.T, dtype, wanted=False, weights=w, rtol=1e-6)[0]
        assert torch.equal(again, alpha)
    # Up to here M's own tridiagonal form may have served, with an error of eps κ(M).
    limit = EPS64 * (5.0 * spread) ** 2 if (5.0 * spread) ** 2 <= 1 / SMALLEST else 0.0
    assert exact_error(G @ G.T, alpha, w) <= max(limit, 1e-12)


UNEVEN = list(HARD)[: list(HARD).index("more tasks than parameters")]


@pytest.mark.parametrize("name", [*UNEVEN, "graded", "an example each, late in training"])
def test_uneven_rows_as_users_have_them(name):
    if name in UNEVEN:
        G = HARD[name](20)
        M = G @ G.T
    else:
        G = real(24, 200)
        M = graded(20) if name == "graded" else G @ G.T
    w = weights(len(M))
    alpha, jacobi, rank, reduced = both(M, w, F64, rtol=1e-5)
    assert reduced
    assert rank == len(M)
    assert exact_error(M, alpha, w) <= max(1e-9, 2 * exact_error(M, jacobi, w))


@pytest.mark.parametrize(
    ("limit", "most"), [(SMALL_SHARED, 83), (99 << 10, 105), (MIDDLE_SHARED, 128), (LARGE_SHARED, 128)]
)
def test_how_many_tasks_one_block_solves(limit, most):
    """As docs/numerics.md says."""
    device = Device(limit=limit)
    session = device.session()
    found = [T for T in range(1, 300) if harness.module().in_one_block(session, T)]
    assert found == [T for T in range(1, 300) if device.takes_spectra(T)]
    assert found[-1] == most


DEGENERATE = {
    "duplicates": lambda G: torch.cat([G[:-1], G[:1]]),
    "opposed": lambda G: torch.cat([G[:-1], -G[:1]]),
    "a zero row": lambda G: torch.cat([G[:-1], 0 * G[:1]]),
    "low rank": lambda G: G[:, :2] @ randn(2, 60, dtype=F64),
    "all equal": lambda G: G[:1].expand_as(G),
    "nothing": lambda G: 0 * G,
    "one row far below": lambda G: torch.cat([G[:-1], 1e-9 * G[-1:]]),
}


@pytest.mark.parametrize("T", [3, 9, 33, 72])
@pytest.mark.parametrize("name", DEGENERATE)
def test_what_is_not_of_full_rank_is_left_to_jacobi(T, name):
    G = DEGENERATE[name](randn(T, 2 * T, dtype=F64, seed=T))
    for rule in ("normalized", "gram"):
        alpha, jacobi, _, _ = both(G @ G.T, weights(T), rank_rule=rule)
        assert torch.equal(alpha, jacobi)


@pytest.mark.parametrize("T", [3, 10, 33])
def test_ranks_by_rtol(T):
    """The same number as by all eigenvalues, wherever the cut lies between them."""
    for make in (lambda: spectrum(T, 1e5), lambda: with_spectrum(0.5 + torch.linspace(0, 1, T, dtype=F64), T)):
        M = make()
        C = M / M.diagonal().sqrt() / M.diagonal().sqrt()[:, None]
        for rule, A in (("gram", M), ("normalized", C)):
            lam = torch.linalg.eigvalsh(A).flip(0)
            edge = math.sqrt(lam[-1] / lam[0])
            for rtol in (0.0, 0.3 * edge, 0.999 * edge, 1.001 * edge, 3 * edge):
                _, _, rank, reduced = both(M, weights(T), rank_rule=rule, rtol=rtol)
                assert rank == (lam.sqrt() > rtol * lam[0].sqrt()).sum()
                assert not reduced or rank == T


@pytest.mark.parametrize("T", [10, 64, pytest.param(90, marks=pytest.mark.slow)])
def test_hard_and_real_rows(T):
    ways = []
    for G in [*(HARD[name](T) for name in HARD), real(T, 0)]:
        w = weights(len(G))
        for rtol in (math.sqrt(T * EPS32), 1e-5):
            alpha, jacobi, _, reduced = both(G @ G.T, w, rtol=rtol)
            ways.append(reduced)
            assert float(((alpha - jacobi) @ G).norm() / (jacobi @ G).norm()) <= 1e-8
    assert any(ways)
    assert not all(ways)


def test_many_shapes_of_tridiagonal_matrices():
    """Decoupled, diagonal, and with subnormal entries beside others: nothing divides by what is not there."""
    for T in (3, 5, 20):
        block = with_spectrum(1 + torch.linspace(0, 1, T, dtype=F64), T)
        cases = [
            torch.eye(T, dtype=F64),
            torch.diag(1 + torch.linspace(0, 3, T, dtype=F64)),
            torch.block_diag(block, 2 * block),
            block + 1e-160 * torch.ones(T, T, dtype=F64),
            torch.eye(T, dtype=F64) + 1e-160 * (torch.ones(T, T, dtype=F64) - torch.eye(T, dtype=F64)),
            2.0**300 * block,
            2.0**-300 * block,
        ]
        for M in cases:
            w = weights(len(M))
            for scale in SCALES:
                alpha, jacobi, rank, _ = both(M, w, scale=scale)
                assert rank == len(M)
                assert float((alpha - jacobi).norm() / jacobi.norm()) <= 1e-12
