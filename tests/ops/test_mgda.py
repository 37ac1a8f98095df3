"""MGDA: the shortest vector of the convex hull, by its optimality conditions and by trying every face."""

import pytest
import torch
from helpers import BF16, DEPENDENT, EPS, F16, F64, conditioned, dense, dtype_id, flat, generator, randn, relative
from models import shortest

import fastmtl
from fastmtl import MGDA

F32 = torch.float32


def check_optimal(M, alpha, tol=1e-12):
    """KKT: α on the simplex and (Mα)_t >= αᵀMα, with equality where α_t > 0; all relative to the norms involved."""
    assert alpha.shape == (M.shape[0],)
    assert alpha.dtype is F64
    there = M.diagonal() > 0
    assert (alpha[~there] == 0).all()
    M, alpha = M[there][:, there], alpha[there]
    T = M.shape[0]
    if T == 0:
        return
    assert (alpha >= 0).all()
    assert alpha.sum().item() == pytest.approx(1.0, abs=1e-12)
    norms = M.diagonal().clamp_min(0).sqrt()
    products = M @ alpha
    slack = tol * T * norms * (alpha @ norms)
    excess = products - alpha @ products
    assert (excess >= -slack).all(), (excess / slack.clamp_min(1e-300)).min()
    # Complementarity, as Σ α_t · excess_t = 0 with all terms >= 0.
    assert ((alpha * excess) <= alpha @ slack + slack * alpha).all()


def spread(G, decades, seed=0):
    T = G.shape[0]
    return G * torch.logspace(0, decades, T, dtype=F64)[torch.randperm(T, generator=generator(seed))][:, None]


def opposed(G, factor=1.0):
    return torch.cat([G, -factor * G[:1]])


# name: (T, seed) -> G [T or T + 1, P], float64
FAMILIES = {
    "random": lambda T, seed: randn(T, 50, dtype=F64, seed=seed),
    "all alike": lambda T, seed: randn(T, 50, dtype=F64, seed=seed) + 1,
    "conflict": lambda T, seed: randn(T, 2, dtype=F64, seed=seed),
    "P = 1": lambda T, seed: randn(T, 1, dtype=F64, seed=seed),
    "P = 3": lambda T, seed: randn(T, 3, dtype=F64, seed=seed) + 0.7,
    "rank 2 alike": lambda T, seed: randn(T, 2, dtype=F64, seed=seed).abs() @ randn(2, 30, dtype=F64, seed=9),
    "half the rank": lambda T, seed: randn(T, max(1, T // 2), dtype=F64, seed=seed) + 0.5,
    "ill-conditioned": lambda T, seed: conditioned(T, 60, 1e5, dtype=F64, seed=seed),
    "spread 1e3": lambda T, seed: spread(randn(T, 50, dtype=F64, seed=seed), 3, seed),
    "spread 1e6": lambda T, seed: spread(randn(T, 50, dtype=F64, seed=seed), 6, seed),
    "spread 1e8 alike": lambda T, seed: spread(randn(T, 50, dtype=F64, seed=seed) + 0.5, 8, seed),
    "one is huge": lambda T, seed: randn(T, 50, dtype=F64, seed=seed) * torch.tensor([1e7] + [1.0] * (T - 1))[:, None],
    "one is tiny": lambda T, seed: randn(T, 50, dtype=F64, seed=seed) * torch.tensor([1e-7] + [1.0] * (T - 1))[:, None],
    "duplicate": lambda T, seed: torch.cat([randn(T, 9, dtype=F64, seed=seed), randn(T, 9, dtype=F64, seed=seed)[:1]]),
    "opposed": lambda T, seed: opposed(randn(T, 9, dtype=F64, seed=seed)),
    "opposed and long": lambda T, seed: opposed(randn(T, 9, dtype=F64, seed=seed), 1e5),
    "zero row": lambda T, seed: torch.cat([randn(T, 9, dtype=F64, seed=seed), torch.zeros(1, 9)]),
    "all equal": lambda T, seed: randn(1, 9, dtype=F64, seed=seed).expand(T, 9),
    "nearly equal": lambda T, seed: randn(1, 9, dtype=F64, seed=seed) + 1e-6 * randn(T, 9, dtype=F64, seed=seed + 50),
    "mean of the others": lambda T, seed: torch.cat([X := randn(T, 50, dtype=F64, seed=seed) + 1, X.mean(0)[None]]),
    "all zero": lambda T, seed: torch.zeros(T, 9, dtype=F64),
}


@pytest.mark.parametrize("T", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_optimality(family, T):
    for seed in range(1 if T == 40 else 5):
        G = FAMILIES[family](T, seed)
        check_optimal(G @ G.T, MGDA().weighting(G @ G.T))


@pytest.mark.parametrize("exponent", [-25, 25])
@pytest.mark.parametrize("family", ["random", "rank 2 alike", "opposed", "zero row", "spread 1e3"])
def test_scale_does_not_matter(family, exponent):
    G = FAMILIES[family](6, 1)
    scaled = G * 10.0**exponent
    check_optimal(G @ G.T, MGDA().weighting(scaled @ scaled.T))
    big = G.float() * 10.0**exponent  # squares of these leave float32's range
    got = MGDA()(big).to(F64) * 10.0**-exponent
    lengths = float(MGDA().weighting(G @ G.T) @ G.norm(dim=1))
    assert (got - MGDA()(G)).norm() <= 1e-6 * lengths


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("spread 1e8 alike", "one is huge", "all zero")])
def test_equals_the_best_face(family, T):
    for seed in range(3):
        G = FAMILIES[family](T, seed)
        expected = shortest(G)
        got = MGDA()(G)
        # The shortest vector is unique; the lengths of what it is made of set the rounding.
        alpha = MGDA().weighting(G @ G.T)
        limit = 1e-10 * float(alpha @ G.norm(dim=1)) + 1e-7 * float(expected.norm())
        assert (got - expected).norm() <= limit
        assert got.norm() <= expected.norm() + limit


def test_two_tasks_in_closed_form():
    """α_1 = clip(g2·(g2 - g1) / ‖g1 - g2‖², 0, 1)."""
    for seed in range(20):
        G = randn(2, 3, dtype=F64, seed=seed) + (seed % 3)
        a, b = G
        first = ((b @ (b - a)) / (a - b).square().sum()).clamp(0, 1)
        assert MGDA().weighting(G @ G.T)[0].item() == pytest.approx(first.item(), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_result_is_a_common_descent_direction(seed):
    G = randn(5, 100, dtype=F64, seed=seed) + 0.2
    g = MGDA()(G)
    assert (G @ g >= g.square().sum() * (1 - 1e-9)).all()


def test_orthogonal_tasks_get_weights_by_their_inverse_squares():
    lengths = torch.tensor([1.0, 2.0, 10.0, 1e4], dtype=F64)
    expected = lengths.pow(-2) / lengths.pow(-2).sum()
    alpha = MGDA().weighting(torch.diag(lengths.square()))
    assert torch.allclose(alpha, expected, rtol=1e-12, atol=0)


def test_a_huge_task_does_not_hide_the_others():
    G = torch.tensor([[1e7, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=F64)
    alpha = MGDA().weighting(G @ G.T)
    assert torch.allclose(alpha[1:], torch.full((2,), 0.5, dtype=F64), atol=1e-12)
    assert alpha[0].item() == pytest.approx(0.5e-14, rel=1e-6)


def test_degenerate_problems():
    assert torch.equal(MGDA().weighting(torch.zeros(4, 4)), torch.zeros(4, dtype=F64))
    assert torch.equal(MGDA()(torch.zeros(3, 5)), torch.zeros(5))
    assert torch.equal(MGDA().weighting(torch.tensor([[3.0]])), torch.ones(1, dtype=F64))
    G = randn(1, 8)
    assert torch.equal(MGDA()(G), G[0])
    opposite = torch.stack([G[0], -G[0]])
    assert MGDA()(opposite).norm() <= 1e-6 * G.norm()
    zero_row = torch.cat([randn(3, 8), torch.zeros(1, 8)])
    assert torch.equal(MGDA()(zero_row), MGDA()(zero_row[:3]))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_non_finite(value):
    G = randn(4, 30)
    G[2, 5] = value
    assert not MGDA()(G).isfinite().any()
    assert MGDA().weighting(G @ G.T).isnan().all()
    rows = [[G[t, :10], G[t, 10:]] for t in range(4)]
    assert not any(g.isfinite().any() for g in MGDA()(rows))
    batch = torch.stack([randn(4, 30), G, randn(4, 30, seed=1)])
    result = MGDA()(batch)
    assert result[[0, 2]].isfinite().all()
    assert not result[1].isfinite().any()


def test_batched():
    G = torch.stack([randn(5, 40, seed=s) + s % 3 for s in range(6)])
    G[4, 2] = 0
    G[5, 1] = G[5, 0]
    result, M = MGDA()(G), G.to(F64) @ G.to(F64).mT
    assert result.shape == (6, 40)
    alphas = MGDA().weighting(M)
    assert alphas.shape == (6, 5)
    for b in range(6):
        assert torch.equal(result[b], MGDA()(G[b]))
        assert torch.equal(alphas[b], MGDA().weighting(M[b]))
        check_optimal(M[b], alphas[b])
    assert MGDA()(G[:0]).shape == (0, 40)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=dtype_id)
@pytest.mark.parametrize("name", DEPENDENT)
def test_dtypes_and_dependent_rows(name, dtype):
    G = DEPENDENT[name](dtype)
    got = MGDA()(G)
    assert got.dtype is dtype
    X = G.to(F64)
    alpha = MGDA().weighting(X @ X.T)
    check_optimal(X @ X.T, alpha)
    limit = EPS[dtype] * float((alpha @ X).norm()) + 1e-7 * float(alpha @ X.norm(dim=1))
    assert (got.to(F64) - alpha @ X).norm() <= limit


def test_ragged_rows():
    rows = [[randn(3, 2, seed=t), None if t == 1 else randn(4, seed=9 + t), None] for t in range(3)]
    got = MGDA()(rows)
    assert got[2] is None
    assert relative(flat(got), shortest(dense(rows))) <= 1e-6


def test_out():
    G, out = randn(3, 10), torch.full((10,), 7.0)
    assert MGDA()(G, out=out) is out
    assert torch.equal(out, MGDA()(G))


def test_backward():
    a = torch.nn.Parameter(randn(6))
    G = randn(3, 6, seed=1)
    info = MGDA().backward([(a * g).sum() for g in G], [a])
    assert relative(a.grad, shortest(G)) <= 1e-6
    check_optimal(info.gram, info.alpha)
    assert info.eigenvalues is None
    assert info.rank is None


@pytest.mark.parametrize("seed", range(4))
def test_parity_with_torchjd(seed):
    """TorchJD's takes Frank-Wolfe steps: ours is never longer, and theirs comes near."""
    aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
    G = randn(4, 30, seed=seed) + 0.5
    ours, theirs = MGDA()(G), aggregation.MGDA(epsilon=1e-6, max_iters=2000)(G)
    assert ours.norm() <= theirs.norm() * (1 + 1e-6)
    assert relative(theirs, ours) <= 0.02


def test_repr_and_reuse():
    method = MGDA()
    assert repr(method) == "MGDA(normalization='none')"
    G = randn(3, 10)
    first = method(G)
    method(randn(5, 7))
    assert torch.equal(method(G), first)
    assert fastmtl.MGDA is MGDA
