"""UPGrad and DualProj of more than 64 tasks, whose projections share one C and start from each other's supports."""

import pytest
import torch
from helpers import F32, F64, needs_extension, randn
from test_qp import FAMILIES, check_projection, lengths_of

from fastmtl import ops
from fastmtl.ops import reference
from fastmtl.scaling.digits import per_example


def real(T, steps):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    return torch.linalg.qr(per_example(T, steps=steps).to(F64).T).R.T  # turned into a space of T dimensions


def common(T, seed):
    """Four directions that all want to go in some way, and noise."""
    return randn(T, 4, dtype=F64, seed=seed) @ randn(4, 2 * T, dtype=F64, seed=seed + 1) + randn(
        T, 2 * T, dtype=F64, seed=seed + 2
    )


# name: T -> G
GRADIENTS = {
    "real, untrained": lambda T: real(T, 0),
    "real, trained": lambda T: real(T, 300),
    "common part": lambda T: common(T, 1),
    "common part, spread": lambda T: common(T, 1) * torch.logspace(-4, 4, T, dtype=F64)[:, None],
    **{
        name: lambda T, name=name: FAMILIES[name](T, 1)[:T]
        for name in ("alike", "half the rank", "half the rank, alike", "opposed", "conflict, spread", "kappa 1e7")
    },
    "duplicates": lambda T: FAMILIES["duplicates"](T // 2, 1),
    "all opposed": lambda T: FAMILIES["all opposed"](T // 2, 1),
}


@pytest.mark.parametrize("T", [66, 150])
@pytest.mark.parametrize("name", GRADIENTS)
def test_each_is_a_projection(name, T):
    """The sum is that of T problems which know nothing of each other; those fulfil the conditions of optimality."""
    G = GRADIENTS[name](T)
    M, n = G @ G.T, G.shape[0]
    weights = randn(n, dtype=F64, seed=2).abs()
    weights[3] = 0.0
    alpha, residual = ops.dual_cone(M, weights, True)
    expected = torch.zeros(n, dtype=F64)
    for u in torch.diag(weights):
        v, one = ops.dual_cone(M, u, False)
        check_projection(M, u, v, one)
        expected += v
    assert residual <= 1e-10
    limit = 1e-7 if name == "kappa 1e7" else 1e-10
    assert ((alpha - expected) @ G).norm() <= limit * (alpha @ lengths_of(M))
    even = M.new_full((n,), 1 / n)
    check_projection(M, even, *ops.dual_cone(M, None, False))


@pytest.mark.parametrize("name", ["real, trained", "common part", "half the rank", "all opposed"])
def test_reference(name):
    G = GRADIENTS[name](70)
    M = G @ G.T
    for u in (torch.eye(70, dtype=F64)[7], randn(70, dtype=F64, seed=3)):
        (v, _), (expected, _) = ops.dual_cone(M, u, False), reference.dual_cone(M, u, False)
        assert ((v - expected) @ G).norm() <= 1e-10 * (v.abs() @ lengths_of(M))
    eye = torch.zeros(70, dtype=F64)
    eye[11] = 1.0
    (v, _), (expected, _) = ops.dual_cone(M, eye, True), reference.dual_cone(M, eye, False)
    assert ((v - expected) @ G).norm() <= 1e-10 * (v @ lengths_of(M))


def test_signed_weights():
    """What a task wants least: no start for one that wants the opposite."""
    G = common(70, 5)
    M, weights = G @ G.T, randn(70, dtype=F64, seed=1)
    alpha, residual = ops.dual_cone(M, weights, True)
    assert residual <= 1e-10
    expected = sum(ops.dual_cone(M, u, False)[0] for u in torch.diag(weights))
    assert ((alpha - expected) @ G).norm() <= 1e-12 * (alpha.abs() @ lengths_of(M))


@pytest.mark.parametrize("each", [True, False])
def test_absent_tasks(each):
    G = common(90, 3)
    there = torch.arange(90) % 7 != 3
    G[~there] = 0
    M, weights = G @ G.T, randn(90, dtype=F64, seed=2).abs()
    alpha, residual = ops.dual_cone(M, weights, each)
    assert not alpha[~there].any()
    some, other = ops.dual_cone(M[there][:, there], weights[there], each)
    assert torch.equal(alpha[there], some)
    assert torch.equal(residual, other)


@pytest.mark.parametrize("name", ["half the rank", "common part", "all opposed"])
def test_gram_in_float32(name):
    """Indefinite by rounding: solved for a matrix that M is to its own precision."""
    G = GRADIENTS[name](100).to(F32)
    M = G @ G.T
    for each in (True, False):
        v, residual = ops.dual_cone(M, None, each)
        assert residual <= 1e-10
        lengths = lengths_of(M.to(F64))
        assert (M.to(F64) @ v >= -2e-6 * lengths * (v @ lengths)).all()


@pytest.mark.parametrize("scale", [1e-120, 1e120])
def test_scale_does_not_matter(scale):
    G = common(80, 1)
    power = 2.0 ** round(torch.tensor(scale, dtype=F64).log2().item())
    M = G @ G.T
    for each in (True, False):
        assert torch.equal(ops.dual_cone(M * power * power, None, each)[0], ops.dual_cone(M, None, each)[0])


@needs_extension
@pytest.mark.parametrize("name", ["real, trained", "half the rank", "common part, spread"])
def test_threads_and_batches_change_no_bit(name):
    G = GRADIENTS[name](140)
    M = torch.stack([G @ G.T] * 17)
    M[1:] *= 4.0
    expected = None
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        got = torch.stack([ops.dual_cone(M[0], None, each)[0] for each in (True, False)])
        expected = got if expected is None else expected
        assert torch.equal(got, expected), threads
        if threads == 2:
            assert torch.equal(ops.dual_cone(M, None, True)[0][-1], expected[0])
