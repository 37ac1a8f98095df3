"""`balance` and AlignedMTL of tasks whose rows are of uneven norms, solved through a Cholesky factor: against
the SVD, against 60 digits, and on the gradients of examples, for which it is made."""

import math
import time

import pytest
import torch
from helpers import EPS32, F32, F64, generator, needs_extension, randn, relative, svd_align, svd_rank

import fastmtl
from fastmtl import ops
from fastmtl.scaling.digits import per_example

SCALES = ("min", "median", "rmse")


def real(T, steps):
    """Gradients of examples, turned into a space of T dimensions."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    return torch.linalg.qr(per_example(T, steps=steps).to(F64).T).R.T.contiguous()


def conditioned(T, kappa, seed=0):
    """Rows of norm one, float64, of condition number about kappa."""
    U = torch.linalg.qr(randn(T, T, dtype=F64, seed=seed))[0]
    V = torch.linalg.qr(randn(2 * T + 9, T, dtype=F64, seed=seed + 1))[0]
    G = (U * torch.logspace(0, -math.log10(kappa), T, dtype=F64)) @ V.T
    return G / G.norm(dim=1, keepdim=True)


def uniform(T, decades, seed=5):
    return 10 ** (decades * torch.rand(T, 1, dtype=F64, generator=generator(seed)))


def groups(T, *sizes):
    return torch.tensor(sizes, dtype=F64).repeat(T)[:T, None][torch.randperm(T, generator=generator(1))]


# T -> G, rows as users do not want them; κ of the row-normalised G at most 1e4, norms over 1e6.
HARD = {
    "spread": lambda T: conditioned(T, 10) * uniform(T, 6),
    "spread, κ 1e4": lambda T: conditioned(T, 1e4) * uniform(T, 6),
    "one is large": lambda T: conditioned(T, 1e3) * torch.cat([1e6 * torch.ones(1, 1), torch.ones(T - 1, 1)]).to(F64),
    "two groups": lambda T: conditioned(T, 10) * groups(T, 1.0, 1e5),
    "two groups, κ 1e4": lambda T: conditioned(T, 1e4) * groups(T, 1.0, 1e5),
    "three groups": lambda T: conditioned(T, 10) * groups(T, 1.0, 1e3, 1e6),
    "ladder": lambda T: conditioned(T, 10) * 10 ** torch.linspace(0, 6, T, dtype=F64).round()[:, None],
    "disjoint": lambda T: (
        torch.block_diag(*(randn(T // 4, T, dtype=F64, seed=s) for s in range(4))) * uniform(T // 4 * 4, 6)
    ),
    "diagonal": lambda T: torch.eye(T, dtype=F64) * uniform(T, 6),
    "nearly alike": lambda T: (randn(1, 3 * T, dtype=F64) + 1e-2 * randn(T, 3 * T, dtype=F64, seed=1)) * uniform(T, 6),
    "more tasks than parameters": lambda T: randn(T, T // 2, dtype=F64) * uniform(T, 6),
    "duplicates": lambda T: torch.cat([X := randn(T // 2, 2 * T, dtype=F64), X]) * uniform(T // 2 * 2, 5),
    "opposed": lambda T: torch.cat([X := randn(T // 2, 2 * T, dtype=F64), -X]) * uniform(T // 2 * 2, 5),
    "zero rows": lambda T: conditioned(T, 10) * uniform(T, 6) * (torch.arange(T)[:, None] % 9 != 4),
}  # fmt: skip


@pytest.mark.cover(1)
@pytest.mark.parametrize("steps", [0, 200, 1000])
@pytest.mark.parametrize("T", [40, 65, 130, 300])
def test_real_gradients(T, steps):
    G, rtol = real(T, steps), math.sqrt(T * EPS32)
    rank = svd_rank(G, rtol)
    for scale in SCALES:
        method = fastmtl.AlignedMTL(scale=scale, rtol=rtol)
        assert method.solve(ops.gram(G), F64).rank == rank
        assert relative(method(G), svd_align(G, scale=scale, rtol=rtol)) <= 1e-6


def test_real_gradients_of_low_rank():
    G, rtol = real(512, 200), math.sqrt(512 * EPS32)
    assert svd_rank(G, rtol) < 480
    for scale in SCALES:
        method = fastmtl.AlignedMTL(scale=scale, rtol=rtol)
        assert relative(method(G), svd_align(G, scale=scale, rtol=rtol)) <= 1e-6


@pytest.mark.parametrize("T", [5, 12, 20, 36, 70, 129])
@pytest.mark.parametrize("name", HARD)
def test_hard_gradients(name, T):
    G = HARD[name](T)
    w = torch.rand(G.shape[0], dtype=F64, generator=generator(9)) - 0.3
    for rtol in (None, 1e-5):
        rtol_used = math.sqrt(T * EPS32) if rtol is None else rtol
        for scale in SCALES:
            for rule in ("normalized", "gram"):
                expected = svd_align(G, w, scale, rtol_used, rule)
                got = fastmtl.AlignedMTL(weights=w, scale=scale, rtol=rtol_used, rank_rule=rule)(G)
                assert relative(got, expected) <= 1e-5, (rtol, scale, rule)


def nearly_opposed(T):
    """Pairs, whose rows are of any size."""
    X = randn(T // 2, 2 * T, dtype=F64)
    return torch.cat([X, 1e-3 * randn(T // 2, 2 * T, dtype=F64, seed=1) - X]) * groups(T, 1.0, 1e3, 1e6, 1e9)


@pytest.mark.parametrize("T", [4, 8, 14, 20, 34])
def test_sixty_digits(T):
    """What float64 cannot check: norms over 1e9 and κ = 1e4 at once, full and truncated, against the eigenvectors of
    the same M in 60 digits; the error of g is that of α in the norm of M."""
    mp = pytest.importorskip("mpmath", reason="mpmath is not installed")
    w = torch.full((T,), 1 / T, dtype=F64)
    with mp.workdps(60):
        for G in (
            conditioned(T, 1e4) * uniform(T, 9),
            conditioned(T, 10) * groups(T, 1.0, 1e3, 1e6),
            nearly_opposed(T),
        ):
            M = G @ G.T
            exact = mp.matrix(M.tolist())
            lam, V = mp.eigsy(exact)
            order = sorted(range(T), key=lambda i: -lam[i])
            for rtol in (1e-6, 1e-2):
                alpha, found, rank = ops.balance(M, w, "min", rtol, 1e-16, "normalized")
                kept = order[: int(rank)]
                for j, i in enumerate(kept):
                    assert abs(found[j].item() / lam[i] - 1) <= 1e-6
                x = [mp.mpf(0)] * T
                for k in kept:
                    c = sum(V[i, k] for i in range(T)) / T * mp.sqrt(lam[kept[-1]] / lam[k])
                    for i in range(T):
                        x[i] += c * V[i, k]
                # With its eigenvalues, alone, one of a batch, and as a GPU finds those of many tasks.
                alone, _ = ops.align_gram(M, w, "min", rtol, 1e-16, "normalized")
                batched, _ = ops.align_gram(torch.stack([M] * 4), w, "min", rtol, 1e-16, "normalized")
                products, _, _ = ops.balance_many(M, w, "min", rtol, 1e-16, "normalized")
                x = mp.matrix(x)
                for a in (alpha, alone, batched[3], products):
                    off = mp.matrix([mp.mpf(a[i].item()) - x[i] for i in range(T)])
                    assert mp.sqrt(abs((off.T * exact * off)[0]) / (x.T * exact * x)[0]) <= 2e-6


@needs_extension
@pytest.mark.parametrize("T", [65, 200, pytest.param(520, id="shared by threads")])
def test_same_bits_for_any_number_of_threads(T):
    matrices = [ops.gram(real(T, 200)), ops.gram(HARD["spread"](T)), ops.gram(HARD["duplicates"](T))]
    expected = None
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        got = [x for M in matrices for x in ops.balance(M, None, "rmse", 1e-3, EPS32, "normalized")]
        expected = got if expected is None else expected
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), threads


@pytest.mark.parametrize("scale", [1e-280, 1e-100, 1e100, 1e280])
def test_power_of_two_changes_no_weight(scale):
    factor = 2.0 ** (2 * round(torch.tensor(scale, dtype=F64).log2().item() / 2))
    M = ops.gram(conditioned(80, 100) * uniform(80, 3))
    alpha, lam, rank = ops.balance(M, None, "median", 1e-4, EPS32, "normalized")
    scaled, lam_scaled, rank_scaled = ops.balance(M * factor, None, "median", 1e-4, EPS32, "normalized")
    assert torch.equal(rank, rank_scaled)
    assert relative(scaled, alpha) <= 1e-14
    assert relative(lam_scaled / factor, lam) <= 1e-14


@needs_extension
@pytest.mark.parametrize("steps", [200, 1000])
def test_no_slower_than_a_few_eigendecompositions(steps):
    """Jacobi rotations take some ten: real gradients need none."""
    M = ops.gram(real(256, steps))
    torch.set_num_threads(1)

    def seconds(call):
        best = math.inf
        for _ in range(7):
            start = time.thread_time()
            call()
            best = min(best, time.thread_time() - start)
        return best

    for scale in SCALES:
        method = fastmtl.AlignedMTL(scale=scale)
        assert seconds(lambda method=method: method.weighting(M, F32)) <= 4 * seconds(lambda: torch.linalg.eigh(M))
