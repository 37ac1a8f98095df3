"""What the paper states about its method (Senushkin et al., CVPR 2023, Sec. 4 and 5, App. A and B)."""

import itertools
import math

import pytest
import torch
from helpers import F32, F64, conditioned, dtype_id, randn, relative

import fastmtl

CASES = {
    "random": randn(5, 300, dtype=F64),
    "ill-conditioned": conditioned(6, 300, 1e3, dtype=F64),
    "dominated": conditioned(4, 300, 10.0, spread=1e3, dtype=F64),
    "conflicting": torch.stack([randn(300, dtype=F64), -randn(300, dtype=F64) + 0.05 * randn(300, dtype=F64, seed=1)]),
    "two tasks": randn(2, 3, dtype=F64),
    "square": randn(4, 4, dtype=F64),
    "many": randn(30, 400, dtype=F64),
}
DEPENDENT = {
    "duplicate": randn(5, 300, dtype=F64)[[0, 1, 2, 3, 4, 0]],
    "opposed": torch.cat([randn(3, 300, dtype=F64), -randn(3, 300, dtype=F64)[:1]]),
    "zero task": torch.cat([randn(3, 300, dtype=F64), torch.zeros(1, 300, dtype=F64)]),
    "T > P": randn(9, 4, dtype=F64),
}


def aligned_system(G, **options):
    """Ĝ: row t is the aligned gradient of task t, that is the result for weights e_t."""
    return torch.stack([fastmtl.AlignedMTL(weights=e, **options)(G) for e in torch.eye(G.shape[0])])


@pytest.mark.parametrize("name", CASES)
def test_the_aligned_system_is_orthogonal_with_equal_norms(name):
    """Eq. (3): the Gram of Ĝ is σ² I, σ = σ_min(G), so no task conflicts with or dominates another, and κ(Ĝ) = 1."""
    G = CASES[name]
    A = aligned_system(G)
    sigma = torch.linalg.svdvals(G)[-1]
    assert relative(A @ A.T, sigma**2 * torch.eye(G.shape[0], dtype=F64)) <= 1e-8
    s = torch.linalg.svdvals(A)
    assert float(s[0] / s[-1]) == pytest.approx(1.0, abs=1e-8)
    assert relative(A.norm(dim=1), sigma.expand(G.shape[0])) <= 1e-8


@pytest.mark.parametrize("scale", ["median", "rmse"])
def test_other_scales_are_multiples_of_the_same_system(scale):
    for G in CASES.values():
        A, B = aligned_system(G), aligned_system(G, scale=scale)
        factor = float(B.norm() / A.norm())
        assert factor >= 1.0 - 1e-9
        assert relative(B, factor * A) <= 1e-8


@pytest.mark.parametrize("name", DEPENDENT)
def test_dependent_gradients_are_aligned_on_the_space_they_span(name):
    """Remark in Sec. 5.1: the smallest singular value above zero is the scale; Ĝ Ĝᵀ is σ² times a projector."""
    G = DEPENDENT[name]
    A = aligned_system(G)
    U, s, _ = torch.linalg.svd(G, full_matrices=False)
    R = int((s > 1e-6 * s[0]).sum())
    assert G.shape[0] > R
    assert relative(A @ A.T, s[R - 1] ** 2 * U[:, :R] @ U[:, :R].T) <= 1e-9
    nonzero = torch.linalg.svdvals(A)[:R]
    assert relative(nonzero, s[R - 1].expand(R)) <= 1e-9


@pytest.mark.parametrize("name", CASES)
def test_closest_orthogonal_system(name):
    """Eq. (4): up to its scale, Ĝ minimises ‖G - Q‖ over all Q with orthonormal rows."""
    G = CASES[name]
    T, P = G.shape
    Q = aligned_system(G) / torch.linalg.svdvals(G)[-1]
    best = (G - Q).norm()
    gen = torch.Generator().manual_seed(1)
    for step in (1e-3, 1e-2, 0.1, 1.0, 10.0):
        for _ in range(20):
            near = Q + step * torch.randn(T, P, dtype=F64, generator=gen) / math.sqrt(P)
            candidate = torch.linalg.qr(near.T)[0].T
            candidate = candidate * (candidate * near).sum(1, keepdim=True).sign()
            assert (candidate @ candidate.T - torch.eye(T, dtype=F64)).abs().max() < 1e-12
            assert (G - candidate).norm() >= best - 1e-9
    rotation = torch.linalg.qr(torch.randn(T, T, dtype=F64, generator=gen))[0]
    assert (G - rotation @ Q).norm() > best


@pytest.mark.parametrize("name", CASES)
def test_task_space_and_parameter_space_agree(name):
    """Eq. (5): σ (G Gᵀ)^(-1/2) G and σ G (Gᵀ G)^(-1/2), the inverse on the range of G, are the same system."""
    G = CASES[name]
    _, s, Vh = torch.linalg.svd(G, full_matrices=False)
    parameter_space = s[-1] * (G @ (Vh.T / s)) @ Vh
    assert relative(aligned_system(G), parameter_space) <= 1e-8


@pytest.mark.parametrize("name", {**CASES, **DEPENDENT})
def test_descends_the_weighted_objective(name):
    """App. A: ⟨g0, ĝ0⟩ = Σ σ_R σ_r (w·v_r)² > 0, and at least ‖ĝ0‖², which the convergence proof needs."""
    G = {**CASES, **DEPENDENT}[name]
    U, s, _ = torch.linalg.svd(G, full_matrices=False)
    R = int((s > 1e-6 * s[0]).sum())
    gen = torch.Generator().manual_seed(2)
    for _ in range(10):
        w = torch.rand(G.shape[0], dtype=F64, generator=gen)
        g0, aligned = w @ G, fastmtl.AlignedMTL(weights=w)(G)
        product = float(g0 @ aligned)
        expected = float((s[R - 1] * s[:R] * (w @ U[:, :R]).square()).sum())
        assert product > 0
        assert product == pytest.approx(expected, rel=1e-8)
        assert product >= float(aligned @ aligned) * (1 - 1e-9)


def test_converges_to_the_optimum_of_the_weighted_objective():
    """Theorem 1 on two quadratics: gradient descent with steps <= 1/Λ ends where ∇L0 = 0, for the given weights."""
    centres = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.5, 0.2]], dtype=F64)
    curvature = torch.tensor([[1.0, 0.3, 0.6], [0.2, 1.0, 0.5]], dtype=F64)
    for w in (torch.tensor([0.5, 0.5], dtype=F64), torch.tensor([0.8, 0.2], dtype=F64)):
        x = torch.tensor([2.0, -3.0, 1.0], dtype=F64)
        method = fastmtl.AlignedMTL(weights=w)
        losses = []
        for _ in range(2000):
            losses.append(float(w @ (curvature * (x - centres).square()).sum(1) / 2))
            x = x - method(curvature * (x - centres))
        optimum = (w[:, None] * curvature * centres).sum(0) / (w[:, None] * curvature).sum(0)
        assert all(b <= a + 1e-12 for a, b in itertools.pairwise(losses))
        assert relative(x, optimum) <= 1e-3


def condition_number(G):
    """κ(G) as a user gets it: from the eigenvalues that `fastmtl.eigh` finds in the Gram."""
    lam, _ = fastmtl.eigh(fastmtl.ops.gram(G))
    return math.sqrt(lam[-1].item() / lam[0].item())


@pytest.mark.parametrize("ratio", [1.0, 1.5, 10.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [F32, F64], ids=dtype_id)
def test_corollary_1_condition_number_of_orthogonal_gradients(ratio, dtype):
    """κ = max(‖g1‖/‖g2‖, ‖g2‖/‖g1‖) where g1 ⊥ g2."""
    g = torch.zeros(2, 64, dtype=dtype)
    g[0, ::2], g[1, 1::2] = 1.0, 1.0
    for G in (g * torch.tensor([ratio, 1.0])[:, None].to(dtype), g * torch.tensor([1.0, ratio])[:, None].to(dtype)):
        assert condition_number(G) == pytest.approx(ratio, rel=1e-6)


@pytest.mark.parametrize("degrees", [0.1, 1.0, 30.0, 89.0, 90.0, 91.0, 120.0, 179.0, 179.9])
def test_corollary_2_condition_number_of_gradients_of_equal_length(degrees):
    """κ = tan(α/2) for obtuse angles α between g1 and g2, cot(α/2) for acute ones."""
    half = math.radians(degrees) / 2
    u, v = torch.linalg.qr(randn(50, 2, dtype=F64))[0].T
    G = 3.0 * torch.stack([math.cos(half) * u + math.sin(half) * v, math.cos(half) * u - math.sin(half) * v])
    expected = math.tan(half) if half > math.pi / 4 else 1 / math.tan(half)
    assert condition_number(G) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", {**CASES, **DEPENDENT})
def test_the_order_of_tasks_does_not_matter(name):
    G = {**CASES, **DEPENDENT}[name]
    T = G.shape[0]
    w = torch.rand(T, dtype=F64)
    order = torch.randperm(T)
    permuted = fastmtl.AlignedMTL(weights=w[order])(G[order])
    assert relative(permuted, fastmtl.AlignedMTL(weights=w)(G)) <= 1e-8


@pytest.mark.parametrize("name", {**CASES, **DEPENDENT})
@pytest.mark.parametrize("factor", [2.0, 1e-3, 1e10])
def test_homogeneous(name, factor):
    """A loss scaler multiplies every gradient by one factor: the result is multiplied by it, too."""
    G = {**CASES, **DEPENDENT}[name]
    assert relative(fastmtl.AlignedMTL()(factor * G), factor * fastmtl.AlignedMTL()(G)) <= 1e-8


@pytest.mark.parametrize("name", {**CASES, **DEPENDENT})
def test_linear_in_the_weights(name):
    G = {**CASES, **DEPENDENT}[name]
    T = G.shape[0]
    a, b = torch.rand(T, dtype=F64), torch.rand(T, dtype=F64) - 0.5
    both = fastmtl.AlignedMTL(weights=2 * a - 3 * b)(G)
    separate = 2 * fastmtl.AlignedMTL(weights=a)(G) - 3 * fastmtl.AlignedMTL(weights=b)(G)
    assert relative(both, separate) <= 1e-9


@pytest.mark.parametrize("name", CASES)
def test_invariant_under_rotation_of_the_parameters(name):
    G = CASES[name]
    Q = torch.linalg.qr(randn(G.shape[1], G.shape[1], dtype=F64, seed=9))[0]
    assert relative(fastmtl.AlignedMTL()(G @ Q), fastmtl.AlignedMTL()(G) @ Q) <= 1e-8
