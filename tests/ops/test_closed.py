"""Methods with a closed form: IMTL-G, ConFIG, Krum, constant and random weights, by their definitions."""

import pytest
import torch
from helpers import F64, conditioned, randn, relative

import fastmtl
from fastmtl import ops
from fastmtl.ops import reference

FAMILIES = {
    "random": lambda T: randn(T, 200, dtype=F64),
    "alike": lambda T: randn(T, 200, dtype=F64) + 1,
    "conflict": lambda T: randn(T, 3, dtype=F64) if T <= 3 else randn(T, T, dtype=F64, seed=3),
    "spread": lambda T: randn(T, 200, dtype=F64) * torch.logspace(0, 6, T, dtype=F64)[:, None],
    "ill-conditioned": lambda T: conditioned(T, 200, 1e4, dtype=F64),
}
families = pytest.mark.parametrize("family", FAMILIES)
sizes = pytest.mark.parametrize("T", [1, 2, 3, 10, 40, 128])


def units(G):
    return G / G.norm(dim=1, keepdim=True)


# ------------------------------------------------------------------------------------------------ the op


@families
@sizes
@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weights"])
def test_unit_solve_by_svd(T, family, weighted):
    """Gᵀα is the shortest vector whose products with the unit gradients are w."""
    G = FAMILIES[family](T)
    w = torch.rand(T, dtype=F64) + 0.5 if weighted else None
    alpha, cosines = ops.unit_solve(G @ G.T, w, 0.0)
    wanted = torch.ones(T, dtype=F64) if w is None else w
    kappa = torch.linalg.cond(units(G)).item()
    limit = 1e-13 * T * kappa**2
    assert relative(alpha @ G, torch.linalg.pinv(units(G)) @ wanted) <= limit
    assert (cosines - wanted).abs().max().item() <= limit
    expected_alpha, expected_cosines = reference.unit_solve(G @ G.T, w, 0.0)
    assert relative(alpha @ G, expected_alpha @ G) <= limit
    assert relative(cosines, expected_cosines) <= limit


@pytest.mark.parametrize("T", [4, 10, 80])
def test_unit_solve_of_dependent_gradients(T):
    G = randn(T, 200, dtype=F64)
    G[1], G[-1] = 2 * G[0], 0  # alike, and none
    alpha, cosines = ops.unit_solve(G @ G.T, None, 1e-6)
    U = units(G)
    U[-1] = 0
    wanted = torch.ones(T, dtype=F64)
    wanted[-1] = 0
    assert relative(alpha @ G, torch.linalg.pinv(U, rtol=1e-6) @ wanted) <= 1e-10
    assert relative(cosines, wanted) <= 1e-10
    assert alpha[-1] == 0
    w = wanted.clone()
    w[1] = 3.0  # asks two different products of the same direction: the mean of both is as near as can be
    _, cosines = ops.unit_solve(G @ G.T, w, 1e-6)
    assert relative(cosines[:2], torch.tensor([2.0, 2.0], dtype=F64)) <= 1e-10


def test_unit_solve_cuts_at_rtol():
    G = conditioned(6, 300, 1e3, dtype=F64)
    kept = ops.unit_solve(G @ G.T, None, 1e-5)[0] @ G
    cut = ops.unit_solve(G @ G.T, None, 1e-2)[0] @ G
    assert relative(kept, torch.linalg.pinv(units(G), rtol=1e-5) @ torch.ones(6, dtype=F64)) <= 1e-6
    assert relative(cut, torch.linalg.pinv(units(G), rtol=1e-2) @ torch.ones(6, dtype=F64)) <= 1e-6
    assert relative(cut, kept) > 1e-3


@pytest.mark.parametrize("T", [3, 70])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_ops_of_a_bad_matrix(T, bad):
    G = randn(2, T, 100, dtype=F64)
    M = G @ G.mT
    G[1, 2, 5] = bad
    M = G @ G.mT
    w = torch.ones(T, dtype=F64)
    for x in (*ops.unit_solve(M, None, 0.0), ops.constant(M, w), ops.constant(M, None)):
        assert x[0].isfinite().all()
        assert x[1].isnan().all()


def test_batches_and_threads_give_the_same_bits():
    G = randn(9, 20, 100, dtype=F64)
    M = G @ G.mT
    batch = ops.unit_solve(M, None, 1e-6)
    torch.set_num_threads(2)
    threads = ops.unit_solve(M, None, 1e-6)
    for b in range(9):
        single = ops.unit_solve(M[b], None, 1e-6)
        assert all(torch.equal(x[b], y) for x, y in zip(batch, single, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(batch, threads, strict=True))


def test_constant_weights():
    M = torch.stack([torch.eye(3), 2 * torch.eye(3)])
    w = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    assert torch.equal(ops.constant(M, w), torch.stack([w, w]))
    assert torch.equal(ops.constant(M, torch.stack([w, -w])), torch.stack([w, -w]))
    assert torch.equal(ops.constant(M[0], None), torch.full((3,), 1 / 3, dtype=F64))
    for op in (lambda w: ops.constant(M, w), lambda w: ops.unit_solve(M, w, 0.0)):
        for wrong in (w[:2], w.float()):
            with pytest.raises(RuntimeError, match=r"weights: expected (a )?contiguous"):
                op(wrong)


# ------------------------------------------------------------------------------------------------ IMTL


@families
@sizes
def test_imtl_projects_equally(T, family):
    G = FAMILIES[family](T)
    M = G @ G.T
    alpha = fastmtl.IMTL().weighting(M)
    assert alpha.sum().item() == pytest.approx(1.0, rel=1e-9, abs=1e-9 * alpha.abs().sum().item())
    projections = M @ alpha / M.diagonal().sqrt()
    kappa = torch.linalg.cond(units(G)).item()
    limit = 1e-13 * T * kappa**2 * max(1.0, (alpha.abs() * M.diagonal().sqrt()).sum().item())
    assert (projections - projections.mean()).abs().max().item() <= limit


def test_imtl_by_the_paper():
    """α_2.. = g_1 Uᵀ (D Uᵀ)^-1 with D = g_1 - g_t and U = u_1 - u_t (their Eq. 6), α_1 the rest."""
    G = randn(6, 100, dtype=F64) + 0.2
    u = units(G)
    D, U = G[0] - G[1:], u[0] - u[1:]
    rest = G[0] @ U.T @ torch.linalg.inv(D @ U.T)
    expected = torch.cat([1 - rest.sum()[None], rest])
    assert relative(fastmtl.IMTL().weighting(G @ G.T), expected) <= 1e-11


def test_imtl_where_there_is_none():
    """Opposed gradients of different length: no weights with sum one project equally on both, but zero does."""
    info = fastmtl.IMTL().solve(torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=F64), F64)
    assert not info.converged
    duplicate = torch.ones(2, 2, dtype=F64)
    info = fastmtl.IMTL().solve(duplicate, F64)
    assert info.converged
    assert relative(info.alpha, torch.tensor([0.5, 0.5], dtype=F64)) <= 1e-12


def test_zero_gradients_take_no_part():
    G = randn(4, 50, dtype=F64)
    G[2] = 0
    for method in (fastmtl.IMTL(), fastmtl.ConFIG()):
        alpha = method.weighting(G @ G.T)
        rest = method.weighting(G[[0, 1, 3]] @ G[[0, 1, 3]].T)
        assert alpha[2] == 0
        assert relative(alpha[[0, 1, 3]], rest) <= 1e-12


# ------------------------------------------------------------------------------------------------ ConFIG


@families
@pytest.mark.parametrize("T", [2, 3, 10, 40])
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weights"])
def test_config_by_definition(T, family, weighted):
    G = FAMILIES[family](T)
    w = torch.rand(T, dtype=F64) + 0.5 if weighted else torch.ones(T, dtype=F64)
    u = torch.linalg.pinv(units(G)) @ w
    u = u / u.norm()
    expected = (G @ u).sum() * u
    got = fastmtl.ConFIG(weights=w if weighted else None)(G)
    assert relative(got, expected) <= 1e-12 * T * torch.linalg.cond(units(G)).item() ** 2
    cosines = units(G) @ got / got.norm()
    assert (cosines * w.sum() / w).std().item() <= 1e-10 * torch.linalg.cond(units(G)).item() ** 2


# ------------------------------------------------------------------------------------------------ Krum


@pytest.mark.parametrize("squared", [True, False], ids=["squared", "plain"])
@pytest.mark.parametrize(("T", "f", "m"), [(3, 0, 1), (5, 1, 1), (8, 2, 3), (20, 5, 10)])
def test_krum_by_brute_force(T, f, m, squared):
    G = randn(T, 30, dtype=F64) * torch.linspace(1, 3, T, dtype=F64)[:, None]
    scores = []
    for i in range(T):
        distances = sorted((G[i] - G[j]).norm().item() ** (2 if squared else 1) for j in range(T) if j != i)
        scores.append(sum(distances[: T - f - 2]))
    chosen = sorted(range(T), key=scores.__getitem__)[:m]
    expected = torch.zeros(T, dtype=F64)
    expected[chosen] = 1 / m
    assert torch.equal(fastmtl.Krum(byzantine=f, selected=m, squared=squared).weighting(G @ G.T), expected)


def test_krum_ignores_an_outlier():
    G = torch.ones(6, 20) + 0.1 * randn(6, 20)
    G[3] = -1e6
    assert fastmtl.Krum(byzantine=1, selected=5).weighting(G.double() @ G.double().T)[3] == 0
    assert (fastmtl.Krum(byzantine=1)(G) - 1).abs().max() < 1


# ------------------------------------------------------------------------------------------------ constant, random


def test_uniform_is_the_mean():
    G = randn(5, 100, dtype=F64)
    assert relative(fastmtl.Uniform()(G), G.mean(0)) <= 1e-15
    assert relative(fastmtl.Uniform(weights="sum")(G), G.sum(0)) <= 1e-15
    w = torch.arange(5.0, dtype=F64)
    assert relative(fastmtl.Uniform(weights=w)(G), w @ G) <= 1e-15


def test_random_weights():
    method = fastmtl.RLW()
    M = torch.eye(6, dtype=F64)
    alphas = torch.stack([method.weighting(M) for _ in range(4000)])
    assert ((alphas.sum(1) - 1).abs() <= 1e-12).all()
    assert (alphas > 0).all()
    logits = alphas.log() - alphas.log().mean(1, keepdim=True)
    # Centred normal numbers: variance 1 - 1/T, and the fourth moment of a normal distribution.
    assert logits.var().item() == pytest.approx(5 / 6, rel=0.05)
    assert (logits**4).mean().item() / logits.var().item() ** 2 == pytest.approx(3.0, rel=0.1)
    assert alphas.mean(0).max().item() == pytest.approx(1 / 6, rel=0.1)
    torch.manual_seed(5)
    one = method.weighting(M)
    torch.manual_seed(5)
    assert torch.equal(method.weighting(M), one)


# ------------------------------------------------------------------------------------------------ TorchJD


def test_torchjd_agrees():
    theirs = pytest.importorskip("torchjd.aggregation")
    for seed in range(5):
        G = randn(6, 80, dtype=F64, seed=seed) + 0.1
        for ours, their in (
            (fastmtl.IMTL(), theirs.IMTLG()),
            (fastmtl.ConFIG(), theirs.ConFIG()),
            (fastmtl.Krum(byzantine=1, selected=2, squared=False), theirs.Krum(1, 2)),
            (fastmtl.Uniform(), theirs.Mean()),
            (fastmtl.Uniform(weights="sum"), theirs.Sum()),
            (fastmtl.Uniform(weights=[1.0, 2, 3, 4, 5, 6]), theirs.Constant(torch.arange(1.0, 7, dtype=F64))),
        ):
            assert relative(ours(G), their(G)) <= 1e-10, ours
