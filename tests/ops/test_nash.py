"""The solver of M α = α^-p (Nash-MTL for p = 1, FairGrad for others) against its equation, scipy, mpmath, TorchJD."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from helpers import EPS64, F64, conditioned, needs_ecos, randn
from scipy.optimize import root

import fastmtl
from fastmtl import ops
from fastmtl.ops import reference

POWERS = [0.1, 0.5, 1.0, 2.0, 10.0]


def gram(G):
    return G @ G.mT


def equation(M, alpha, power):
    """‖(Mα) ∘ α^p - 1‖_inf: the residual as defined, computed here."""
    return ((M @ alpha) * alpha**power - 1).abs().max().item()


def backward_error(M, alpha, power):
    """The largest error of an equation relative to its terms, in roundings: all that a sum that cancels can promise."""
    wanted = alpha**-power
    return (((M @ alpha) - wanted).abs() / (M.abs() @ alpha + (1 + power) * wanted)).max().item() / EPS64


def solve(M, power=1.0):
    alpha, residual = ops.nash(M, power)
    return alpha, residual.item()


def nearly_opposed(T, angle, seed=0):
    G = randn(T, 3 * T, dtype=F64, seed=seed)
    a = G[0] / G[0].norm()
    b = G[1] - (G[1] @ a) * a
    G[1] = 2 * (-math.cos(angle) * a + math.sin(angle) * b / b.norm())
    return G


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("T", [1, 2, 3, 10, 40, 128])
def test_random_gradients(T, power):
    for seed in range(3):
        M = gram(randn(T, 3 * T + 2, dtype=F64, seed=seed))
        alpha, residual = solve(M, power)
        assert (alpha > 0).all()
        assert residual <= 1e-12
        assert equation(M, alpha, power) <= 1e-12


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("T", [2, 5, 20])
def test_spread_norms(T, power):
    G = randn(T, 3 * T, dtype=F64, seed=T) * torch.logspace(0, 6, T, dtype=F64)[:, None].flip(0)
    alpha, residual = solve(gram(G), power)
    assert residual <= 1e-9
    assert backward_error(gram(G), alpha, power) <= 16


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("kappa", [1e2, 1e4, 1e6, 1e7])
def test_ill_conditioned(kappa, power):
    for seed in range(3):
        M = gram(conditioned(20, 60, kappa, dtype=F64, seed=seed))
        alpha, residual = solve(M, power)
        assert residual <= 1e-8
        assert backward_error(M, alpha, power) <= 32


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("angle", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("T", [2, 3, 12])
def test_nearly_opposed_gradients(T, angle, power):
    M = gram(nearly_opposed(T, angle))
    alpha, residual = solve(M, power)
    assert (alpha > 0).all()
    assert residual <= 1e-8
    assert backward_error(M, alpha, power) <= 32


@pytest.mark.parametrize("power", POWERS)
def test_no_solution(power):
    G = randn(6, 20, dtype=F64)
    opposed, hull = G.clone(), G.clone()
    opposed[4] = -3 * G[1]
    hull[5] = -(torch.rand(5, 1, dtype=F64) * G[:5]).sum(0)
    flat = torch.tensor([[1.0], [2.0], [-3.0]], dtype=F64)
    for X in (opposed, hull, flat):
        alpha, residual = solve(gram(X), power)
        assert residual == math.inf
        assert torch.equal(alpha, torch.zeros(len(X), dtype=F64))


@pytest.mark.parametrize("power", POWERS)
def test_singular_but_solvable(power):
    """Duplicates share: k copies of one gradient are one whose weight times k^(1/(1+p)) solves it."""
    G = randn(4, 12, dtype=F64).abs()
    M = gram(G.repeat_interleave(3, 0))
    alpha, residual = solve(M, power)
    assert residual <= 1e-12
    assert torch.allclose(alpha.view(4, 3), alpha[::3, None], rtol=1e-9)
    assert equation(M, alpha, power) <= 1e-12
    line = torch.tensor([[1.0], [2.0], [0.5]], dtype=F64)  # rank 1
    alpha, residual = solve(gram(line), power)
    assert residual <= 1e-12
    assert equation(gram(line), alpha, power) <= 1e-12


def test_closed_forms():
    for power in POWERS:
        alpha, _ = solve(torch.tensor([[7.0]], dtype=F64), power)
        assert alpha.item() == pytest.approx(7 ** (-1 / (1 + power)), rel=1e-14)
        d = torch.tensor([1.0, 4.0, 1e4], dtype=F64)
        alpha, _ = solve(torch.diag(d), power)
        assert torch.allclose(alpha, d ** (-1 / (1 + power)), rtol=1e-13)
        # Unit gradients at a right or other angle share alike: α^(1+p) = 1 / (1 + cos).
        alpha, _ = solve(torch.tensor([[1.0, -0.75], [-0.75, 1.0]], dtype=F64), power)
        assert torch.allclose(alpha, torch.full((2,), 4 ** (1 / (1 + power)), dtype=F64), rtol=1e-13)
    # p = 1, T = 2: α_t = 1 / (‖g_t‖ sqrt(1 + cos)).
    M = torch.tensor([[4.0, 1.5], [1.5, 9.0]], dtype=F64)
    assert solve(M)[0].tolist() == pytest.approx([1 / (2 * math.sqrt(1.25)), 1 / (3 * math.sqrt(1.25))], rel=1e-14)


@pytest.mark.parametrize("power", POWERS)
def test_against_scipy(power):
    for seed in range(5):
        M = gram(randn(6, 15, dtype=F64, seed=seed))
        alpha, _ = solve(M, power)
        A = M.numpy()
        start = np.log(alpha.numpy()) + 0.1 * np.sin(np.arange(6))
        theirs = root(lambda x: A @ np.exp(x) - np.exp(-power * x), start, tol=1e-13)  # noqa: B023
        assert np.allclose(np.exp(theirs.x), alpha.numpy(), rtol=1e-8)


@pytest.mark.parametrize("power", [0.5, 10.0])
def test_weights_where_the_equation_cancels(power):
    """Spread norms and large powers leave (Mα)_t below rounding errors; the weights themselves are right."""
    G = randn(4, 9, dtype=F64, seed=2) * torch.tensor([[1.0], [1e3], [30.0], [1e5]], dtype=F64)
    M = gram(G)
    alpha, residual = solve(M, power)
    assert residual <= 1e-8
    with mpmath.workdps(80):
        A = mpmath.matrix(M.tolist())
        x = mpmath.matrix([mpmath.log(a) for a in alpha.tolist()])
        for _ in range(30):
            e = x.apply(mpmath.exp)
            q = e.apply(lambda a: a**-power)
            J = A * mpmath.diag(list(e)) + power * mpmath.diag(list(q))
            x = x - mpmath.lu_solve(J, A * e - q)
        exact = torch.tensor([float(mpmath.exp(v)) for v in x], dtype=F64)
    assert torch.allclose(alpha, exact, rtol=1e-9, atol=0)


@pytest.mark.parametrize("power", POWERS)
def test_equals_the_reference(power):
    families = [randn(7, 30, dtype=F64, seed=s) for s in range(3)]
    families += [randn(7, 7, dtype=F64).abs(), nearly_opposed(7, 0.1), conditioned(7, 20, 1e3, 1e2, dtype=F64)]
    M = torch.stack([gram(G) for G in families])
    alpha, residual = ops.nash(M, power)
    expected, expected_residual = reference.nash(M, power)
    assert torch.allclose(alpha, expected, rtol=1e-8, atol=0)
    assert (residual <= 1e-8).all()
    assert (expected_residual <= 1e-8).all()


@pytest.mark.parametrize("power", POWERS)
def test_permutation_and_scale(power):
    M = gram(randn(8, 20, dtype=F64, seed=4))
    alpha, _ = solve(M, power)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(solve(M[order][:, order], power)[0], alpha[order], rtol=1e-11)
    for exponent in (-50, -3, 50):  # of M = s² M: α / s^(2/(1+p))
        scaled, residual = solve(M * 10.0**exponent, power)
        assert residual <= 1e-12
        assert torch.allclose(scaled, alpha * 10.0 ** (-exponent / (1 + power)), rtol=1e-11, atol=0)


def test_nash_gradient_has_the_norm_of_its_tasks_number():
    """αᵀMα = Σ α_t / α_t = T: whatever the gradients, the bargaining step has length √T."""
    for seed in range(5):
        M = gram(randn(9, 12, dtype=F64, seed=seed) * 10.0 ** (seed - 2))
        alpha, _ = solve(M)
        assert (alpha @ M @ alpha).item() == pytest.approx(9, rel=1e-10)


def test_batched_is_single():
    M = torch.stack([gram(randn(5, 9, dtype=F64, seed=s)) for s in range(40)])
    M[7] = 0
    M[11, 2, 3] = torch.nan
    alpha, residual = ops.nash(M, 1.0)
    for b in range(40):
        single, r = ops.nash(M[b], 1.0)
        assert torch.equal(alpha[b].nan_to_num(7.0), single.nan_to_num(7.0))
        assert torch.equal(residual[b].nan_to_num(7.0), r.nan_to_num(7.0))
    assert alpha[11].isnan().all()
    assert residual[11].isnan()
    assert residual[7] == 0
    assert residual.isfinite().sum() == 39


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_non_finite(value):
    M = gram(randn(4, 9, dtype=F64))
    M[1, 2] = value
    alpha, residual = ops.nash(M, 0.5)
    assert alpha.isnan().all()
    assert residual.isnan()


def test_many_tasks():
    M = gram(randn(300, 700, dtype=F64))
    alpha, residual = solve(M)
    assert residual <= 1e-12
    assert equation(M, alpha, 1.0) <= 1e-12


@pytest.mark.parametrize("fairness", [0.5, 1.0, 2.0])
def test_parity_with_torchjd_fairgrad(fairness):
    aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
    for seed in range(3):
        M = gram(randn(5, 20, dtype=F64, seed=seed)) / 20
        theirs = aggregation.FairGradWeighting(alpha=fairness)(M)
        alpha, _ = solve(M, 1 / fairness)
        assert torch.allclose(alpha, theirs, rtol=1e-4)
        assert equation(M, alpha, 1 / fairness) <= equation(M, theirs, 1 / fairness) + 1e-13


@needs_ecos
def test_parity_with_torchjd_nash():
    """Theirs stops at 1e-3 of its equation."""
    aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
    for seed in range(3):
        G = randn(4, 20, dtype=F64, seed=seed)
        M = gram(G)
        theirs = aggregation.NashMTL(n_tasks=4, max_norm=0.0)(G)
        alpha, _ = solve(M)
        assert (theirs - alpha @ G).norm() <= 5e-3 * theirs.norm()


def test_the_method_by_its_equation():
    """Mα = 1/α (Eq. 2 of the paper), then shortened to `max_norm`."""
    G = randn(5, 60, dtype=F64, seed=4) + 0.3
    M = G @ G.T
    alpha = fastmtl.NashMTL(max_norm=0).weighting(M)
    assert (alpha * (M @ alpha) - 1).abs().max().item() <= 1e-12
    assert (alpha @ G).norm().item() == pytest.approx(5**0.5, rel=1e-12)
    shortened = fastmtl.NashMTL().weighting(M)
    assert (shortened @ G).norm().item() == pytest.approx(1.0, rel=1e-12)
    assert torch.allclose(shortened / shortened.sum(), alpha / alpha.sum(), rtol=1e-12)


@needs_ecos
def test_torchjd_finds_the_same_nash_point():
    G = randn(5, 60, dtype=F64, seed=4) + 0.3
    alpha = fastmtl.NashMTL(max_norm=0).weighting(G @ G.T)
    theirs = pytest.importorskip("torchjd.aggregation").NashMTL(5, max_norm=0.0)
    assert torch.allclose(theirs(G), alpha @ G, rtol=1e-2, atol=1e-2)
