"""What an info computes only when it is read."""

import pytest
import torch
from helpers import F64, conditioned, randn, relative
from torch.utils._python_dispatch import TorchDispatchMode

import fastmtl
from fastmtl import ops
from fastmtl.info import Info
from fastmtl.pipeline import aggregate_rows


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


def a_step(T, path):
    """The info of a step of T tasks, by one of the ways to it."""
    method, W, x = fastmtl.AlignedMTL(), randn(40, 6).requires_grad_(), randn(9, 40)
    losses = [(x @ W @ randn(6, seed=t)).square().mean() for t in range(T)]
    if path == "rows":
        return aggregate_rows(method, [[g] for g in randn(T, 300)])[1]
    if path == "a Gram matrix":
        G = randn(T, 300, dtype=F64)
        return method.solve(G @ G.T, F64)
    return method.backward(losses, [W], engine=path)


@pytest.mark.parametrize("path", ["rows", "a Gram matrix", "full", "gramian"])
@pytest.mark.parametrize("T", [3, 40])
def test_eigenvalues_are_computed_when_they_are_read(T, path):
    with Calls() as calls:
        info = a_step(T, path)
        repr(info)
    assert "balance" not in calls.ops
    assert "eigh" not in calls.ops
    assert 0 < info.rank <= T
    with Calls() as calls:
        lam = info.eigenvalues
    assert calls.ops.count("balance") == 1
    assert lam.dtype is F64
    assert (lam[:-1] >= lam[1:]).all()
    want = torch.linalg.eigvalsh(info.gram).flip(-1).clamp_min(0)
    assert (lam - want).abs().max() <= 1e-13 * T * want[0]
    with Calls() as calls:
        assert info.eigenvalues is lam
    assert calls.ops == []


def test_eigenvalues_of_groups():
    W, V, x = randn(5, 4).requires_grad_(), randn(4, 3, seed=1).requires_grad_(), randn(8, 5)
    h = (x @ W).tanh() @ V
    info = fastmtl.AlignedMTL().backward([h.square().sum(), h.sin().sum()], groups=[[W], [V]])
    assert relative(info.eigenvalues, torch.linalg.eigvalsh(info.gram).flip(-1)) <= 1e-10


def test_a_method_without_a_rank_rule_has_no_eigenvalues():
    assert aggregate_rows(fastmtl.MGDA(), [[g] for g in randn(3, 50)])[1].eigenvalues is None
    assert Info.of(gram=torch.eye(2, dtype=F64)).eigenvalues is None


@pytest.mark.parametrize("T", [5, 33, 120])
def test_the_condition_number_is_that_of_the_gradients(T):
    G = conditioned(T, 4 * T, 30.0, dtype=F64)
    info = aggregate_rows(fastmtl.AlignedMTL(), [[g] for g in G])[1]
    assert abs(info.condition_number / torch.linalg.cond(G) - 1) <= 1e-6
    assert torch.equal(info.eigenvalues, ops.balance(info.gram, None, "rmse", 1e-2, 1e-3, "normalized")[1])
