"""PCGrad's and GradVac's task weights against the papers' loops over the gradients themselves."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import F64, randn

from fastmtl import ops
from fastmtl.ops import reference
from fastmtl.ops.reference.philox import permutations

SEEDS = [0, 1, -1, 2**62 + 12345]


def gram(G):
    return G @ G.mT


def orders(seed, T, per_task=True, matrix=0):
    order = permutations(torch.tensor(seed), matrix + 1, T if per_task else 1, T)[matrix]
    return order.expand(T, T).tolist()


def pcgrad_direct(G, order):
    """Σ_i g_i with its conflicting components taken out, on the gradients (Yu et al., Algorithm 1)."""
    total = torch.zeros_like(G[0])
    for i in range(len(G)):
        g = G[i].clone()
        for j in order[i]:
            if j != i and G[j].norm() > 0 and g @ G[j] < 0:
                g -= (g @ G[j]) / (G[j] @ G[j]) * G[j]
        total += g
    return total


def gradvac_direct(G, order, beta, targets):
    """Σ_i g_i with cosines raised to their targets, on the gradients (Wang et al., Algorithm 1); updates `targets`."""
    total = torch.zeros_like(G[0])
    for i in range(len(G)):
        g = G[i].clone()
        for j in order[i]:
            if j == i or G[j].norm() == 0 or g.norm() <= 1e-7 * G[i].norm():
                continue
            phi, hat = float(g @ G[j] / (g.norm() * G[j].norm())), float(targets[i, j])
            if phi < hat:
                rise = hat * math.sqrt(max(1 - phi * phi, 0.0)) - phi * math.sqrt(1 - hat * hat)
                g += g.norm() * rise / (G[j].norm() * math.sqrt(1 - hat * hat)) * G[j]
            targets[i, j] = (1 - beta) * hat + beta * phi
        total += g
    return total


def close(G, alpha, expected, limit=1e-10):
    """‖αᵀG - expected‖, relative to what is summed."""
    assert (alpha @ G - expected).norm() <= limit * float(alpha.abs() @ G.norm(dim=1) + 1e-300)


def family(name, T, seed):
    G = randn(T, 3 if name == "few" else 3 * T, dtype=F64, seed=seed)
    if name == "spread":
        return G * torch.logspace(-3, 3, T, dtype=F64)[:, None]
    if name == "zero row":
        G[T // 2] = 0
    if name == "duplicate":
        G[T - 1] = 2 * G[0]
    if name == "opposed":
        G[T - 1] = -3 * G[0]
    return G


FAMILIES = ["plain", "few", "spread", "zero row", "duplicate"]


@pytest.mark.parametrize("per_task", [True, False])
@pytest.mark.parametrize("name", [*FAMILIES, "opposed"])
@pytest.mark.parametrize("T", [2, 3, 7, 20])
def test_pcgrad_is_the_papers_loop(name, T, per_task):
    for seed in SEEDS:
        G = family(name, T, abs(seed) % 100)
        alpha = ops.pcgrad(gram(G), torch.tensor(seed), per_task)
        close(G, alpha, pcgrad_direct(G, orders(seed, T, per_task)))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("T", [2, 3, 7, 12])
def test_gradvac_is_the_papers_loop(name, T):
    """Twenty steps of one run: the weights, and the targets that they leave."""
    targets = torch.zeros(T, T, dtype=F64)
    expected = targets.clone()
    base = family(name, T, 1)
    for step in range(20):
        G = base + 0.3 * family(name, T, 50 + step)
        alpha = ops.gradvac(gram(G), torch.tensor(step), 0.3, targets)
        close(G, alpha, gradvac_direct(G, orders(step, T), 0.3, expected), 1e-8)
        assert (targets - expected).abs().max() <= 1e-8


@pytest.mark.parametrize("seed", range(5))
def test_two_tasks_in_closed_form(seed):
    G = randn(2, 5, dtype=F64, seed=seed)
    if G[0] @ G[1] > 0:
        G[1] = -G[1]
    M = gram(G)
    # g_1's component along g_2 goes, and the other way round.
    expected = torch.stack([1 - M[0, 1] / M[0, 0], 1 - M[0, 1] / M[1, 1]])
    assert torch.allclose(ops.pcgrad(M, torch.tensor(seed), True), expected, rtol=1e-13, atol=0)
    # With targets 0 GradVac takes the same out.
    targets = torch.zeros(2, 2, dtype=F64)
    assert torch.allclose(ops.gradvac(M, torch.tensor(seed), 0.5, targets), expected, rtol=1e-12, atol=0)
    cosine = M[0, 1] / (M[0, 0] * M[1, 1]).sqrt()
    assert torch.allclose(targets, 0.5 * cosine * (1 - torch.eye(2, dtype=F64)), rtol=1e-13, atol=0)


def test_without_conflicts_it_is_the_sum():
    M = gram(randn(6, 9, dtype=F64).abs())
    ones = torch.ones(6, dtype=F64)
    assert torch.equal(ops.pcgrad(M, torch.tensor(3), True), ones)
    targets = torch.zeros(6, 6, dtype=F64)
    assert torch.equal(ops.gradvac(M, torch.tensor(3), 0.5, targets), ones)
    norms = M.diagonal().sqrt()
    cosines = M / norms / norms[:, None]
    cosines.fill_diagonal_(0.0)
    assert torch.allclose(targets, 0.5 * cosines, rtol=1e-13, atol=0)


def test_gradvac_reaches_its_targets():
    G = randn(2, 20, dtype=F64)
    targets = torch.full((2, 2), 0.9, dtype=F64)
    M = gram(G)
    alpha = ops.gradvac(M, torch.tensor(0), 0.0, targets)
    assert torch.equal(targets, torch.full((2, 2), 0.9, dtype=F64))  # beta = 0
    w = alpha - 1  # g_1 + w_2 g_2 and g_2 + w_1 g_1
    for i, j in ((0, 1), (1, 0)):
        g = G[i] + w[j] * G[j]
        assert (g @ G[j] / (g.norm() * G[j].norm())).item() == pytest.approx(0.9, abs=1e-12)


@pytest.mark.parametrize("name", [*FAMILIES, "opposed"])
@pytest.mark.parametrize("T", [1, 2, 5, 33])
def test_equals_the_reference(name, T):
    M = torch.stack([gram(family(name, T, s)) for s in range(3)])
    targets = 0.5 * randn(3, T, T, dtype=F64, seed=1).tanh()
    for seed in map(torch.tensor, SEEDS):
        for per_task in (True, False):
            expected = reference.pcgrad(M, seed, per_task)
            assert torch.allclose(ops.pcgrad(M, seed, per_task), expected, rtol=1e-9, atol=1e-9)
        ours, theirs = targets.clone(), targets.clone()
        expected = reference.gradvac(M, seed, 0.4, theirs)
        got = ops.gradvac(M, seed, 0.4, ours)
        assert (got - expected).norm() <= 1e-8 * expected.norm()
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-8)


def test_batched():
    """Matrix 0 of a batch is what it is alone; the others draw their own permutations, and see none of one another."""
    M = gram(randn(1, 6, 7, dtype=F64, seed=3)).expand(40, 6, 6).clone()
    seed = torch.tensor([9])
    alpha = ops.pcgrad(M, seed, True)
    targets = torch.zeros(40, 6, 6, dtype=F64)
    vaccinated = ops.gradvac(M, seed, 0.5, targets)
    assert len({tuple(a) for a in alpha.tolist()}) > 20
    assert torch.equal(alpha[0], ops.pcgrad(M[0], seed, True))
    alone = torch.zeros(6, 6, dtype=F64)
    assert torch.equal(vaccinated[0], ops.gradvac(M[0], seed, 0.5, alone))
    assert torch.equal(targets[0], alone)
    M[1:7] = 0
    assert torch.equal(ops.pcgrad(M, seed, True)[7:], alpha[7:])
    assert torch.equal(ops.pcgrad(M, seed, True), ops.pcgrad(M, seed, True))


def test_one_order_for_all_tasks_or_one_each():
    M, seed = gram(randn(8, 3, dtype=F64)), torch.tensor(4)
    assert not torch.allclose(ops.pcgrad(M, seed, True), ops.pcgrad(M, seed, False))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_non_finite_leaves_the_targets(value):
    M = gram(randn(3, 5, 9, dtype=F64))
    M[1, 2, 4] = value
    targets = torch.full((3, 5, 5), 0.25, dtype=F64)
    for alpha in (ops.pcgrad(M, torch.tensor(0), True), ops.gradvac(M, torch.tensor(0), 0.5, targets)):
        assert alpha[1].isnan().all()
        assert alpha[[0, 2]].isfinite().all()
    assert (targets[1] == 0.25).all()
    assert (targets[[0, 2]] != 0.25).any(-1).all()


def test_zero_gradients_take_no_part():
    G = randn(4, 6, dtype=F64)
    G[2] = 0
    rest = [0, 1, 3]
    targets = torch.full((4, 4), 0.6, dtype=F64)
    alpha = ops.gradvac(gram(G), torch.tensor(0), 0.5, targets)
    assert alpha[2] == 0
    assert (targets[2] == 0.6).all()
    assert (targets[:, 2] == 0.6).all()
    assert (targets[rest][:, rest] != 0.6).sum() == 6
    nothing = torch.zeros(4, 4, dtype=F64)
    assert torch.equal(ops.pcgrad(nothing, torch.tensor(0), True), nothing[0])
    assert torch.equal(ops.gradvac(nothing, torch.tensor(0), 0.5, targets), nothing[0])


def test_opposed_gradients_vanish():
    M = torch.tensor([[1.0, -2.0], [-2.0, 4.0]], dtype=F64)
    targets = torch.zeros(2, 2, dtype=F64)
    for alpha in (ops.pcgrad(M, torch.tensor(0), True), ops.gradvac(M, torch.tensor(0), 0.5, targets)):
        assert alpha.tolist() == [3.0, 1.5]  # 1 + 2 and 1 + 1/2: each task's gradient becomes zero
    assert targets.tolist() == [[0.0, -0.5], [-0.5, 0.0]]


def test_gradvac_of_parallel_tasks_stays_still():
    """Their targets go to 1, where rounding errors of the cosine would be amplified."""
    G = randn(1, 50, dtype=F64) * torch.tensor([[1.0], [0.3], [7.7]], dtype=F64)
    targets = torch.zeros(3, 3, dtype=F64)
    for step in range(100):
        assert torch.equal(ops.gradvac(gram(G), torch.tensor(step), 0.5, targets), torch.ones(3, dtype=F64))
    assert targets[0, 1] == 1
    alpha = ops.gradvac(gram(randn(3, 50, dtype=F64, seed=1)), torch.tensor(0), 0.5, targets)
    assert alpha.isfinite().all()


@pytest.mark.parametrize("exponent", [-50, -25, 25, 50])
def test_scales(exponent):
    M, seed = gram(randn(5, 4, dtype=F64)), torch.tensor(2)
    factor = 10.0**exponent
    assert torch.allclose(ops.pcgrad(M * factor, seed, True), ops.pcgrad(M, seed, True), rtol=1e-12)
    a, b = torch.full((2, 5, 5), 0.2, dtype=F64)
    assert torch.allclose(ops.gradvac(M * factor, seed, 0.5, a), ops.gradvac(M, seed, 0.5, b), rtol=1e-11)
    assert torch.allclose(a, b, rtol=1e-11)


def test_float32_and_strided_grams():
    M, seed = gram(randn(5, 4)), torch.tensor(2)
    assert torch.equal(ops.pcgrad(M, seed, True), ops.pcgrad(M.double(), seed, True))
    strided = torch.stack([M.double(), M.double()], -1)[..., 0]
    assert torch.equal(ops.pcgrad(strided, seed, True), ops.pcgrad(M.double(), seed, True))


def test_parity_with_torchjd():
    """T = 2, where the order does not matter; and PCGrad's mean over orders."""
    aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
    for seed in range(5):
        M = gram(randn(2, 4, dtype=F64, seed=seed))
        ours = ops.pcgrad(M, torch.tensor(seed), True)
        assert torch.allclose(ours, aggregation.PCGradWeighting()(M), rtol=1e-12)
        weighting, targets = aggregation.GradVacWeighting(beta=0.3, eps=0.0), torch.zeros(2, 2, dtype=F64)
        for step in range(5):
            M = gram(randn(2, 4, dtype=F64, seed=10 * seed + step))
            ours = ops.gradvac(M, torch.tensor(step), 0.3, targets)
            assert torch.allclose(ours, weighting(M), rtol=1e-10)
    M = gram(randn(4, 4, dtype=F64, seed=8))
    torch.manual_seed(0)
    theirs = torch.stack([aggregation.PCGradWeighting()(M) for _ in range(600)])
    ours = ops.pcgrad(M.expand(2000, 4, 4), torch.tensor(0), True)
    assert ours.std(0).max() > 0.01
    error = (ours.std(0).square() / 2000 + theirs.std(0).square() / 600).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() <= 4.5 * error + 1e-12).all()
