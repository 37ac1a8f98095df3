"""MGDA, dual cone and CAGrad on Gram matrices: by their optimality conditions, their reference, and others' solvers."""

import math
import time

import numpy as np
import pytest
import torch
from helpers import DEPENDENT, F32, F64, conditioned, generator, needs_extension, randn, relative
from scipy import optimize

import fastmtl
from fastmtl import ops
from fastmtl.ops import reference

CERTIFIED = 1e-10  # what every residual here stays below; 1e-8 counts as solved
ROUNDING = 64 * torch.finfo(F64).eps  # of a sum of products of T gradients, per task, relative to their lengths


def spread(G, decades):
    T = G.shape[0]
    return G * torch.logspace(0, decades, T, dtype=F64)[torch.randperm(T, generator=generator(3))][:, None]


def opposed(G, factor=1.0):
    return torch.cat([G, -factor * G[:1]])


# name: (T, seed) -> G [T or so, P], float64
FAMILIES = {
    "random": lambda T, seed: randn(T, 300, dtype=F64, seed=seed),
    "alike": lambda T, seed: randn(T, 300, dtype=F64, seed=seed) + 1,
    "opposed parts": lambda T, seed: randn(T, 300, dtype=F64, seed=seed) + 2 * randn(T, 1, dtype=F64, seed=seed).sign(),
    "conflict": lambda T, seed: randn(T, 2, dtype=F64, seed=seed),
    "conflict, spread": lambda T, seed: spread(randn(T, 2, dtype=F64, seed=seed), 6),
    "P = 1": lambda T, seed: randn(T, 1, dtype=F64, seed=seed),
    "P = 3": lambda T, seed: randn(T, 3, dtype=F64, seed=seed) + 0.7,
    "half the rank": lambda T, seed: randn(T, max(1, T // 2), dtype=F64, seed=seed),
    "half the rank, alike": lambda T, seed: randn(T, max(1, T // 2), dtype=F64, seed=seed) + 0.5,
    "kappa 1e4": lambda T, seed: conditioned(T, T + 20, 1e4, dtype=F64, seed=seed),
    "kappa 1e7": lambda T, seed: conditioned(T, T + 20, 1e7, dtype=F64, seed=seed),
    "spread 1e6": lambda T, seed: spread(randn(T, 300, dtype=F64, seed=seed), 6),
    "spread 1e6, alike": lambda T, seed: spread(randn(T, 300, dtype=F64, seed=seed) + 0.5, 6),
    "one is huge": lambda T, seed: randn(T, 50, dtype=F64, seed=seed) * torch.tensor([1e7] + [1.0] * (T - 1))[:, None],
    "one is tiny": lambda T, seed: randn(T, 50, dtype=F64, seed=seed) * torch.tensor([1e-7] + [1.0] * (T - 1))[:, None],
    "duplicates": lambda T, seed: randn(T, 90, dtype=F64, seed=seed).repeat(2, 1),
    "doubled": lambda T, seed: torch.cat([X := randn(T, 90, dtype=F64, seed=seed), 2 * X]),
    "opposed": lambda T, seed: opposed(randn(T, 9, dtype=F64, seed=seed)),
    "opposed and long": lambda T, seed: opposed(randn(T, 9, dtype=F64, seed=seed), 1e5),
    "all opposed": lambda T, seed: torch.cat([X := randn(T, 90, dtype=F64, seed=seed), -X]),
    "zero row": lambda T, seed: torch.cat([randn(T, 90, dtype=F64, seed=seed), torch.zeros(1, 90)]),
    "zero rows, alike": lambda T, seed: torch.cat([torch.zeros(2, 90), randn(T, 90, dtype=F64, seed=seed) + 1]),
    "all equal": lambda T, seed: randn(1, 9, dtype=F64, seed=seed).expand(T, 9),
    "nearly equal": lambda T, seed: randn(1, 9, dtype=F64, seed=seed) + 1e-6 * randn(T, 9, dtype=F64, seed=seed + 50),
    "all zero": lambda T, seed: torch.zeros(T, 9, dtype=F64),
}
SIZES = [1, 2, 3, 5, 10, 40, 128]


def problems(family, T):
    for seed in range(3 if T < 40 else 1):
        yield FAMILIES[family](T, seed)


def tangled(seed):
    """What is hard, at random and all at once: dependent, opposed and nearly parallel rows, of lengths far apart."""
    draw = np.random.default_rng(seed)
    T = int(draw.integers(2, 48))
    P = int(draw.choice([1, 2, 3, max(1, T // 2), T, T + 1, 50]))
    G = draw.standard_normal((T, P))
    if draw.random() < 0.4:
        G += (
            10 ** draw.uniform(-3, 1)
            * draw.standard_normal(P)
            * (np.sign(draw.standard_normal((T, 1))) ** draw.integers(2))
        )
    if draw.random() < 0.4:
        common = draw.standard_normal(P) * np.sign(draw.standard_normal((T, 1)) + draw.uniform(0, 3))
        G = common + 10 ** draw.uniform(-8, 0) * G
    if draw.random() < 0.4:
        G = G * np.logspace(0, -draw.uniform(0, 8), P)
    if draw.random() < 0.5:
        G = G * 10 ** (draw.uniform(0, 6) * draw.random((T, 1)))
    if draw.random() < 0.4:
        G[draw.integers(T)] = G[draw.integers(T)] * draw.choice([1.0, -1.0, -100.0])
    if draw.random() < 0.1:
        G[draw.integers(T)] = 0
    if draw.random() < 0.1:
        G = np.round(G)
    return torch.from_numpy(G)


def lengths_of(M):
    return M.diagonal().clamp_min(0).sqrt()


def present(M, *weights):
    """The problem of the tasks that are there, once α (the first of the weights) is seen to be zero for the others."""
    there = M.diagonal() > 0
    assert (weights[0][~there] == 0).all()
    return M[there][:, there], *(w[there] for w in weights)


def check_shortest(M, alpha, residual):
    """KKT: on the simplex, (Mα)_t >= αᵀMα, with equality where α_t > 0; relative to the lengths involved.

    αᵀMα is known to rounding of a sum of such products only, which a short gradient among long ones sees.
    """
    assert alpha.shape == (M.shape[0],)
    assert residual.shape == ()
    assert residual <= CERTIFIED
    M, alpha = present(M, alpha)
    T, lengths = M.shape[0], lengths_of(M)
    if T == 0:
        return
    assert (alpha >= 0).all()
    assert alpha.sum().item() == pytest.approx(1, abs=1e-12)
    size = alpha @ lengths
    excess, slack = M @ alpha - alpha @ M @ alpha, 1e-12 * T * lengths * size + ROUNDING * T * size**2
    assert (excess >= -slack).all()
    assert ((alpha == 0) | (excess <= slack)).all()


def check_projection(M, u, v, residual):
    """KKT: v >= u and (Mv)_t >= 0, with equality where v_t > u_t; relative to the lengths of u."""
    M, v, u = present(M, v, u)
    lengths = lengths_of(M)
    size = u.abs() @ lengths
    assert residual <= CERTIFIED
    assert (v >= u).all()
    products, slack = M @ v, 1e-12 * M.shape[0] * lengths * size
    assert (products >= -slack).all()
    assert ((v <= u) | (products <= slack)).all()


def check_conflict_averse(M, c, alpha, residual):
    """d = g0 + Gᵀx with x >= 0 and ‖Gᵀx‖ = ρ, and no w of the simplex promises a better worst slope than d has.

    Squares of vectors are known to rounding of a sum of products of the lengths: near a zero in the convex hull they
    cancel.
    """
    w0 = M.new_full(M.shape[:1], 1 / M.shape[0])
    M, alpha, w0 = present(M, alpha, w0)
    T, lengths = M.shape[0], lengths_of(M)
    x = alpha - w0
    size = alpha @ lengths
    rounding = ROUNDING * T * size**2
    assert residual <= CERTIFIED
    assert (x >= -1e-16).all()
    square, distance = c**2 * (w0 @ M @ w0), x @ M @ x
    assert distance <= square * (1 + 1e-9) + rounding
    if square <= ROUNDING * T * (w0 @ lengths) ** 2:
        return
    slack = 1e-12 * T * lengths * size
    if distance >= square * (1 - 1e-9) - rounding and bool((x > 0).any()):
        value = (x @ M @ w0 + square) / x.sum()
        slack = slack + (rounding + 1e-9 * square) / x.sum()
    else:  # zero is in the convex hull: no slope can be positive
        hull = ops.mgda(M)[0]
        assert hull @ M @ hull <= ROUNDING * T * (hull @ lengths) ** 2
        value = M.new_zeros(())
    assert (value - M @ alpha <= slack).all()


@pytest.mark.parametrize("T", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_optimality(family, T):
    for G in problems(family, T):
        M = G @ G.T
        check_shortest(M, *ops.mgda(M))
        n = M.shape[0]
        even = M.new_full((n,), 1 / n)
        check_projection(M, even, *ops.dual_cone(M, None, False))
        signed = randn(n, dtype=F64, seed=7)
        check_projection(M, signed, *ops.dual_cone(M, signed, False))
        for c in (0.0, 0.01, 0.5, 3.0):
            check_conflict_averse(M, c, *ops.cagrad(M, c))


@pytest.mark.parametrize("seed", range(0, 200, 25))
def test_optimality_of_tangled_problems(seed):
    for one in range(seed, seed + 25):
        G = tangled(one)
        M, T = G @ G.T, G.shape[0]
        check_shortest(M, *ops.mgda(M))
        for u in (M.new_full((T,), 1 / T), randn(T, dtype=F64, seed=one)):
            check_projection(M, u, *ops.dual_cone(M, u, False))
        check_conflict_averse(M, 0.4, *ops.cagrad(M, 0.4))
        check_conflict_averse(M, 2.0, *ops.cagrad(M, 2.0))
        if T <= 20:
            assert ops.dual_cone(M, None, True)[1] <= CERTIFIED


@pytest.mark.parametrize("T", [2, 10, 40])
@pytest.mark.parametrize(
    "family",
    ["half the rank", "conflict", "P = 3", "duplicates", "doubled", "all opposed", "nearly equal", "kappa 1e7"],
)
def test_gram_in_float32(family, T):
    """Indefinite by rounding, and not quite symmetric: solved for a matrix that M is to its own precision."""
    G = FAMILIES[family](T, 1).to(F32)
    single = G @ G.T
    M = single.to(F64)
    lengths = lengths_of(M)
    for alpha, residual in (
        ops.mgda(single),
        ops.dual_cone(single, None, False),
        ops.dual_cone(single, None, True),
        ops.cagrad(single, 0.5),
        ops.cagrad(single, 2.0),
    ):
        assert residual <= CERTIFIED
        assert alpha.isfinite().all()
    slack = 2e-6 * lengths
    alpha, _ = ops.mgda(single)
    assert (M @ alpha - alpha @ M @ alpha >= -slack * (alpha @ lengths)).all()
    for each in (False, True):
        v, _ = ops.dual_cone(single, None, each)
        assert (M @ v >= -slack * (v @ lengths)).all()


@needs_extension
@pytest.mark.parametrize("family", ["half the rank", "half the rank, alike", "conflict", "all opposed"])
def test_dependent_rows_take_no_more_steps(family):
    """In units of the problems of regular matrices of the same size, each some three factorisations."""
    T = 64

    def seconds(G):
        M, best = G @ G.T, math.inf
        for _ in range(5):
            start = time.thread_time()
            ops.dual_cone(M, None, True)
            ops.mgda(M)
            ops.cagrad(M, 0.5)
            best = min(best, time.thread_time() - start)
        return best

    torch.set_num_threads(1)
    rows = T // 2 if family == "all opposed" else T
    assert seconds(FAMILIES[family](rows, 5)) <= 50 * seconds(FAMILIES["random"](T, 5))


@pytest.mark.parametrize(
    ("family", "T"),
    [(f, T) for f in FAMILIES for T in (1, 2, 3, 5, 10, 40)] + [(f, 128) for f in ("random", "opposed parts")],
)
def test_upgrad_is_the_sum_of_projections(family, T):
    G = FAMILIES[family](T, 1)
    M = G @ G.T
    n = M.shape[0]
    weights = randn(n, dtype=F64, seed=2).abs()
    alpha, residual = ops.dual_cone(M, weights, True)
    expected = torch.zeros(n, dtype=F64)
    for u in torch.diag(weights):
        v, one = ops.dual_cone(M, u, False)
        check_projection(M, u, v, one)
        expected += v
        assert residual >= one
    lengths = lengths_of(M)
    if n < 65:
        assert torch.equal(alpha, expected)
    else:  # each from the support of another task, not from signs
        assert ((alpha - expected) @ G).norm() <= 1e-14 * (alpha @ lengths)
    assert (M @ alpha >= -1e-11 * lengths * (alpha @ lengths)).all()  # in conflict with no task


@pytest.mark.cover(1)
@pytest.mark.parametrize("T", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("family", FAMILIES)
def test_reference(family, T):
    """The reference solves the same problems: the vectors are unique, the weights of dependent gradients are not."""
    G = FAMILIES[family](T, 2)
    M = G @ G.T
    calls = [
        (ops.mgda(M), reference.mgda(M)),
        (ops.dual_cone(M, None, False), reference.dual_cone(M, None, False)),
        (ops.cagrad(M, 0.5), reference.cagrad(M, 0.5)),
        (ops.cagrad(M, 2.0), reference.cagrad(M, 2.0)),
    ]
    if T <= 7:
        calls.append((ops.dual_cone(M, None, True), reference.dual_cone(M, None, True)))
    for (ours, residual), (alpha, expected) in calls:
        assert max(residual, expected) <= CERTIFIED
        limit = 1e-7 if family == "kappa 1e7" else 1e-10
        assert ((ours - alpha) @ G).norm() <= limit * (ours.abs() @ lengths_of(M))


@pytest.mark.parametrize("T", [2, 3, 5, 10, 40])
@pytest.mark.parametrize("family", ["random", "alike", "conflict", "P = 3", "half the rank", "kappa 1e4", "duplicates"])
def test_scipy_nnls(family, T):
    """Against scipy, which sees the gradients, not their squares."""
    G = FAMILIES[family](T, 4)
    M, n = G @ G.T, G.shape[0]
    size = G.norm(dim=1).max()
    A = G.T.numpy()
    # min ‖Gᵀx‖² + (1 - Σx)² points to the shortest vector of the hull.
    x, _ = optimize.nnls(np.vstack([A / size.item(), np.ones((1, n))]), np.append(np.zeros(A.shape[0]), 1.0))
    assert ((ops.mgda(M)[0] - torch.from_numpy(x / x.sum())) @ G).norm() <= 1e-8 * size
    x, _ = optimize.nnls(A, -A.mean(1))
    assert ((ops.dual_cone(M, None, False)[0] - torch.from_numpy(x + 1 / n)) @ G).norm() <= 1e-8 * size * (1 + x.sum())


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9, 1.5, 4.0])
@pytest.mark.parametrize("seed", range(5))
def test_cagrad_of_two_tasks(seed, c):
    """One variable: w of the paper's objective by a bounded search."""
    G = randn(2, 4, dtype=F64, seed=seed) + 0.3
    M, g0 = G @ G.T, G.mean(0)
    rho = c * g0.norm()

    def objective(first):
        g = first * G[0] + (1 - first) * G[1]
        return float(g @ g0 + rho * g.norm())

    found = optimize.minimize_scalar(objective, bounds=(0, 1), method="bounded", options={"xatol": 1e-12})
    best = min((objective(0.0), 0.0), (objective(1.0), 1.0), (found.fun, found.x))[1]
    g = best * G[0] + (1 - best) * G[1]
    expected = g0 + rho * g / g.norm()
    assert (ops.cagrad(M, c)[0] @ G - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("family", ["random", "conflict", "P = 3", "alike", "spread 1e6", "zero row", "opposed"])
@pytest.mark.parametrize("c", [0.4, 1.2])
def test_cagrad_is_the_best_direction_in_its_ball(family, c):
    """As a cone program: the largest worst slope within ρ of the mean."""
    cvxpy = pytest.importorskip("cvxpy", reason="cvxpy is not installed")
    G = FAMILIES[family](4, 3)[:, :40]
    G = G / G.norm(dim=1).max()
    X = torch.linalg.qr(G.T).R.T.numpy()  # the same Gram matrix in few dimensions
    d, slope = cvxpy.Variable(X.shape[1]), cvxpy.Variable()
    mean = X.mean(0)
    problem = cvxpy.Problem(
        cvxpy.Maximize(slope), [X @ d >= slope, cvxpy.norm(d - mean) <= c * float(np.linalg.norm(mean))]
    )
    problem.solve(solver="CLARABEL", tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    M = torch.from_numpy(X @ X.T)
    alpha, residual = ops.cagrad(M, c)
    assert residual <= CERTIFIED
    assert (M @ alpha).min().item() == pytest.approx(float(slope.value), abs=1e-8)


def test_cagrad_where_zero_lies_inside_the_hull():
    """No point of the ball harms no task; the best one is on its border, and g_w is not zero."""
    G = randn(5, 8, dtype=F64)
    G[4] = -torch.tensor([0.5, 1.0, 2.0, 0.3], dtype=F64) @ G[:4]
    alpha, residual = ops.cagrad(G @ G.T, 0.5)
    g0, d = G.mean(0), alpha @ G
    assert residual <= CERTIFIED
    assert (d - g0).norm().item() == pytest.approx(0.5 * g0.norm().item(), rel=1e-9)
    assert (G @ d).min() < -1e-3 * d.norm()
    aside = g0 + 0.5 * g0.norm() * torch.nn.functional.normalize(d - g0 + 0.05 * randn(200, 8, dtype=F64), dim=1)
    assert (aside @ G.T).amin(1).max() <= (G @ d).min() + 1e-12


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("T", [2, 5, 20])
def test_torchjd(T, seed):
    """On well-conditioned Grams; its tolerances are what keeps them apart."""
    aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
    linalg = pytest.importorskip("torchjd.linalg", reason="torchjd has no projectors")
    G = randn(T, 200, dtype=F64, seed=seed) + 0.1
    G[::3] -= 0.4
    M = G @ G.T
    projector = linalg.QuadprogProjector(norm_eps=0.0, reg_eps=1e-13)
    upgrad = aggregation.UPGradWeighting(projector=projector)(M)
    dualproj = aggregation.DualProjWeighting(projector=projector)(M)
    assert torch.allclose(ops.dual_cone(M, None, True)[0], upgrad.to(F64), rtol=1e-8, atol=1e-10)
    assert torch.allclose(ops.dual_cone(M, None, False)[0], dualproj.to(F64), rtol=1e-8, atol=1e-10)
    cagrad = aggregation.CAGradWeighting(c=0.5, norm_eps=0.0)(M)
    # Its alpha has the solver's accuracy; the worst slope that follows is second order in it.
    ours = ops.cagrad(M, 0.5)[0]
    assert ((ours - cagrad.to(F64)) @ G).norm() <= 1e-3 * (ours @ G).norm()
    assert (M @ ours).min() >= (M @ cagrad.to(F64)).min() - 1e-6 * M.diagonal().max()


def test_known_answers():
    one = torch.ones(1, dtype=F64)
    M = torch.tensor([[4.0, -2.0, 0.0], [-2.0, 3.0, 1.5], [0.0, 1.5, 2.0]], dtype=F64)
    # The first two: Mα = μ1 gives 4a - 2(1 - a) = -2a + 3(1 - a).
    expected = torch.tensor([5 / 11, 6 / 11, 0], dtype=F64)
    assert torch.allclose(ops.mgda(M)[0], expected, rtol=1e-14, atol=0)
    # The mean is in conflict with no task, and of the tasks only 0 and 1 with each other.
    assert torch.equal(ops.dual_cone(M, None, False)[0], torch.full((3,), 1 / 3, dtype=F64))
    expected = torch.tensor([1 + 2 / 4, 1 + 2 / 3, 1.0], dtype=F64) / 3
    assert torch.allclose(ops.dual_cone(M, None, True)[0], expected, rtol=1e-14, atol=0)
    # Orthogonal gradients of lengths 1 and 2: ρ² = c² (1 + 4) / 4 = 1/20 all goes to the slower task.
    alpha = ops.cagrad(torch.diag(torch.tensor([1.0, 4.0], dtype=F64)), 0.2)[0]
    assert torch.allclose(alpha, torch.tensor([0.5 + math.sqrt(0.05), 0.5], dtype=F64), rtol=1e-14, atol=0)
    for alpha, residual in (ops.mgda(3 * one[None]), ops.dual_cone(3 * one[None], None, True)):
        assert torch.equal(alpha, one)
        assert residual == 0
    alpha, residual = ops.cagrad(3 * one[None], 0.25)
    assert alpha.item() == pytest.approx(1.25, rel=1e-15)
    assert residual <= 1e-15


# What the Gram matrix below gave when the solvers had passed all other tests of this file.
FROZEN = {
    "mgda": [0.19027661357921205, 0.2967309304274937, 0.31098072087175194, 0.2020117351215423],
    "dual_cone": [0.25, 0.25, 0.25, 0.25],
    "dual_cone each": [0.328125, 0.4775950999355255, 0.5184659090909091, 0.38513962765957444],
    "cagrad 0.5": [0.2661656324716809, 0.41507768235671805, 0.43501079139644727, 0.2825811340338108],
    "cagrad 1.5": [0.4851470944455722, 0.756573001910716, 0.7929056036973885, 0.5150680606228318],
}


@pytest.mark.parametrize("kind", [fastmtl.UPGrad, fastmtl.DualProj])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_ridge(kind, scale):
    """A ridge is one more parameter for each task, which it alone depends on."""
    G = scale * torch.stack([randn(5, 12, dtype=F64, seed=seed) for seed in range(3)])
    length = (1e-2 * G.square().sum((1, 2), keepdim=True)).sqrt()
    wide = torch.cat([G, length * torch.eye(5, dtype=F64)], -1)
    got, exact = kind(ridge=1e-2)(G), kind()(G)
    assert relative(got, kind()(wide)[:, :12]) <= 1e-10
    assert relative(got, exact) > 1e-3
    M = G[0] @ G[0].T
    assert torch.equal(kind(ridge=0.0).weighting(M), kind().weighting(M))
    info = kind(weights=[1, 2, 3, 4, 5], ridge=1.0).solve(M, F64)
    assert info.converged
    assert torch.equal(info.gram, M)
    for ridge in (-1e-3, math.inf, math.nan):
        with pytest.raises(ValueError, match="ridge: expected a finite number >= 0"):
            kind(ridge=ridge)


def test_frozen_values():
    M = torch.tensor([[5, -2, 1, 0], [-2, 6, -3, 1], [1, -3, 7, -4], [0, 1, -4, 8]], dtype=F64)
    got = {
        "mgda": ops.mgda(M)[0],
        "dual_cone": ops.dual_cone(M, None, False)[0],
        "dual_cone each": ops.dual_cone(M, None, True)[0],
        "cagrad 0.5": ops.cagrad(M, 0.5)[0],
        "cagrad 1.5": ops.cagrad(M, 1.5)[0],
    }
    for name, alpha in got.items():
        assert torch.allclose(alpha, torch.tensor(FROZEN[name], dtype=F64), rtol=1e-12, atol=1e-15), name


def test_degenerate_problems():
    M = torch.zeros(4, 4, dtype=F64)
    for alpha, residual in (ops.mgda(M), ops.dual_cone(M, None, True), ops.cagrad(M, 0.5)):
        assert torch.equal(alpha, torch.zeros(4, dtype=F64))
        assert residual == 0
    g = randn(1, 5, dtype=F64)
    M = torch.cat([g, -g]) @ torch.cat([g, -g]).T
    assert torch.equal(ops.mgda(M)[0], torch.full((2,), 0.5, dtype=F64))
    assert ((ops.dual_cone(M, torch.tensor([1.0, 0.0], dtype=F64), False)[0] @ torch.cat([g, -g])).norm()) <= 1e-15
    # Opposed gradients a million times as long as a third: the short one must not be decided by their rounding.
    G = torch.stack([randn(9, dtype=F64), *(1e6 * randn(1, 9, dtype=F64, seed=1) * torch.tensor([[1.0], [-1.0]]))])
    check_shortest(G @ G.T, *ops.mgda(G @ G.T))


OPS = {
    "mgda": lambda M: ops.mgda(M),
    "dual_cone": lambda M: ops.dual_cone(M, None, False),
    "dual_cone each": lambda M: ops.dual_cone(M, None, True),
    "cagrad": lambda M: ops.cagrad(M, 0.5),
    "cagrad 3": lambda M: ops.cagrad(M, 3.0),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("exponent", [-25, 25])
@pytest.mark.parametrize("family", ["random", "conflict", "opposed", "zero row", "spread 1e6", "half the rank"])
def test_scale_does_not_matter(family, exponent, op):
    G = FAMILIES[family](6, 1)
    M = G @ G.T
    alpha, _ = OPS[op](M)
    powers = 2.0 ** round(exponent / math.log10(2))
    assert torch.equal(OPS[op](M * powers * powers)[0], alpha)  # powers of two round nothing
    scaled = G * 10.0**exponent
    got, residual = OPS[op](scaled @ scaled.T)
    assert residual <= CERTIFIED
    assert ((got - alpha) @ G).norm() <= 1e-11 * (alpha @ lengths_of(M))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite(value, op):
    M = torch.stack([(G := randn(5, 20, dtype=F64, seed=s)) @ G.T for s in range(4)])
    M[1, 0, 3] = value
    M[2, 4, 4] = value
    alpha, residual = OPS[op](M)
    assert alpha[1:3].isnan().all()
    assert residual[1:3].isnan().all()
    for b in (0, 3):
        expected = OPS[op](M[b])
        assert torch.equal(alpha[b], expected[0])
        assert torch.equal(residual[b], expected[1])


@needs_extension
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("B", "T"), [(1, 40), (3, 7), (3, 60), (20, 5), (40, 20)])
def test_batches_and_threads_change_no_bit(op, B, T):
    families = ["random", "half the rank", "opposed parts"]
    M = torch.stack([(G := FAMILIES[families[b % 3]](T, b)) @ G.T for b in range(B)])
    torch.set_num_threads(1)
    alpha, residual = OPS[op](M)
    assert alpha.shape == (B, T)
    assert residual.shape == (B,)
    for b in range(B):
        one = OPS[op](M[b])
        assert torch.equal(alpha[b], one[0])
        assert torch.equal(residual[b], one[1])
    torch.set_num_threads(2)
    shared = OPS[op](M)
    assert torch.equal(shared[0], alpha)
    assert torch.equal(shared[1], residual)


@pytest.mark.parametrize("op", OPS)
def test_layouts_and_dtypes(op):
    G = randn(6, 30, dtype=F64)
    M = G @ G.T
    alpha, _ = OPS[op](M)
    wide = torch.full((6, 13), 7.0, dtype=F64)
    wide[:, 1::2] = M
    assert torch.equal(OPS[op](wide[:, 1::2])[0], alpha)
    single = M.to(F32)
    got, residual = OPS[op](single)
    assert got.dtype is F64
    assert residual.dtype is F64
    assert torch.equal(got, OPS[op](single.to(F64))[0])
    batch = torch.stack([M, 2 * M]).mT.contiguous().mT
    assert torch.equal(OPS[op](batch)[0][0], alpha)
    assert OPS[op](M[None][:0])[0].shape == (0, 6)


@pytest.mark.parametrize("op", OPS)
def test_upper_triangle_is_read(op):
    G = FAMILIES["opposed parts"](9, 2)
    M = G @ G.T
    M = M.triu() + M.triu(1).T
    expected = OPS[op](M)
    got = OPS[op](M + 1e-7 * randn(9, 9, dtype=F64).tril(-1))
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("op", OPS)
def test_order_of_tasks_does_not_matter(op):
    G = FAMILIES["opposed parts"](12, 3)
    M, order = G @ G.T, torch.randperm(12, generator=generator(1))
    alpha, _ = OPS[op](M)
    assert torch.allclose(OPS[op](M[order][:, order])[0], alpha[order], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", DEPENDENT)
def test_dependent_rows(name):
    G = DEPENDENT[name](F64)
    M = G @ G.T
    check_shortest(M, *ops.mgda(M))
    check_projection(M, M.new_full(M.shape[:1], 1 / M.shape[0]), *ops.dual_cone(M, None, False))
    check_conflict_averse(M, 0.5, *ops.cagrad(M, 0.5))


def test_radius_of_cagrad():
    """c = 0 is the mean; with c >= 1 the worst slope is never negative; it grows with c."""
    G = FAMILIES["opposed parts"](8, 5)
    M = G @ G.T
    assert torch.equal(ops.cagrad(M, 0.0)[0], torch.full((8,), 0.125, dtype=F64))
    worst = [float((M @ ops.cagrad(M, c)[0]).min()) for c in (0.0, 0.1, 0.3, 0.7, 1.0, 1.5, 3.0)]
    assert worst == sorted(worst)
    assert worst[0] < 0
    assert worst[4] >= -1e-12 * float(M.diagonal().max())
    assert worst[5] > 0


@needs_extension
def test_errors():
    M = torch.eye(3, dtype=F64)
    with pytest.raises(RuntimeError, match=r"M: expected .* of shape \[..., T, T\]"):
        ops.mgda(torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match=r"weights: expected .*\[3\]"):
        ops.dual_cone(M, torch.zeros(4, dtype=F64), True)
    with pytest.raises(RuntimeError, match="weights: expected"):
        ops.dual_cone(M, torch.zeros(3), False)
