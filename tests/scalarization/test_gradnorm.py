"""GradNorm against the paper's Algorithm 1 written down naively, and whether it balances the gradients."""

import math

import pytest
import torch
from helpers import F32, F64, randn
from torch import nn

from fastmtl.scalarization import GradNorm


class Model(nn.Module):
    """A trunk whose last layer all tasks share; task t has losses of scale 10^t."""

    def __init__(self, T=3, dtype=F64, scales=None):
        super().__init__()
        torch.manual_seed(4)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 7)
        self.heads = nn.ModuleList(nn.Linear(7, 3) for _ in range(T))
        self.scales = [10.0**t for t in range(T)] if scales is None else scales
        self.to(dtype)

    def losses(self, k=0):
        h = self.last(self.first(randn(20, 6, dtype=self.last.weight.dtype, seed=k)).tanh()).tanh()
        return [
            s * (head(h) - t).square().mean() for t, (head, s) in enumerate(zip(self.heads, self.scales, strict=True))
        ]


class Naive:
    """Algorithm 1 by autograd through the norms, with torch's Adam."""

    def __init__(self, T, alpha, lr, initial=None):
        self.w = torch.ones(T, dtype=F64, requires_grad=True)
        self.adam, self.alpha, self.initial = torch.optim.Adam([self.w], lr=lr), alpha, initial

    def backward(self, losses, layer):
        L = torch.stack(losses)
        if self.initial is None:
            self.initial = L.detach()
        G = torch.stack([
            torch.cat([
                g.reshape(-1) for g in torch.autograd.grad(w * loss, layer, create_graph=True, retain_graph=True)
            ]).norm()
            for w, loss in zip(self.w, losses, strict=True)
        ])  # fmt: skip
        ratio = L.detach() / self.initial
        target = (G.mean() * (ratio / ratio.mean()) ** self.alpha).detach()
        (gradient,) = torch.autograd.grad((G - target).abs().sum(), self.w, retain_graph=True)
        (self.w.detach() * L).sum().backward()
        self.w.grad = gradient
        self.adam.step()
        with torch.no_grad():
            self.w *= len(losses) / self.w.sum()


def norms(model, losses, w):
    return torch.stack([
        w[t] * torch.autograd.grad(loss, model.last.weight, retain_graph=True)[0].norm()
        for t, loss in enumerate(losses)
    ])  # fmt: skip


@pytest.mark.parametrize("initial", [None, [1.0, 2.0, 50.0]])
@pytest.mark.parametrize(("alpha", "lr"), [(1.5, 0.025), (0.12, 0.1), (0.0, 0.01)])
@pytest.mark.parametrize("bias", [False, True])
def test_is_algorithm_1(alpha, lr, initial, bias):
    ours, theirs = Model(), Model()
    method = GradNorm(3, alpha=alpha, lr=lr, initial_losses=initial)
    naive = Naive(3, alpha, lr, None if initial is None else torch.tensor(initial, dtype=F64))
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (ours, theirs)]
    for k in range(25):
        for optimizer in optimizers:
            optimizer.zero_grad()
        w = naive.w.detach().clone()
        if bias:
            method(ours.losses(k), ours.last.parameters()).backward()
        else:
            method.backward(ours.losses(k), ours.last)
        naive.backward(theirs.losses(k), list(theirs.last.parameters()) if bias else [theirs.last.weight])
        torch.testing.assert_close(method.last_weights, w, rtol=1e-9, atol=0)  # those from before the step
        torch.testing.assert_close(method.w, naive.w.detach(), rtol=1e-9, atol=0)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
    assert method.w.sum().item() == pytest.approx(3.0)
    assert (method.w - 1).abs().max() > 0.1  # it did learn


def test_balances_the_norms():
    """With α = 0 on a model that does not move, the norms become equal whatever the scales of the losses."""
    model = Model(scales=[1.0, 4.0, 0.5])
    method = GradNorm(3, alpha=0.0, lr=0.01)
    before = norms(model, model.losses(), method.w)
    for _ in range(600):
        method(model.losses(), model.last.weight)
    after = norms(model, model.losses(), method.w)
    assert before.max() > 2 * before.min()
    assert after.max() < 1.05 * after.min()


def test_favours_the_task_that_trains_slowly():
    model = Model(scales=[1.0, 1.0, 1.0])
    initial = torch.stack(model.losses()) * torch.tensor([1.0, 1.0, 0.5])
    method = GradNorm(3, alpha=1.0, lr=0.01, initial_losses=initial)
    for _ in range(600):
        method(model.losses(), model.last.weight)
    G = norms(model, model.losses(), method.w)
    torch.testing.assert_close(G / G.mean(), torch.tensor([0.75, 0.75, 1.5], dtype=F64), rtol=0.05, atol=0)


def test_layer():
    model = Model()
    alone, split = GradNorm(3), GradNorm(3)
    alone(model.losses(), model.last.weight)
    for layer in ([model.last.weight], (p for p in [model.last.weight])):
        split.reset()
        split(model.losses(), layer)
        assert torch.equal(split.w, alone.w)


def test_only_the_way_down_to_the_layer():
    """No gradient is computed behind the layer, in the first one."""
    model, reached = Model(), []
    model.first.weight.register_hook(lambda g: reached.append(g))
    result = GradNorm(3)(model.losses(), model.last.weight)
    assert not reached
    result.backward()
    assert len(reached) == 1


def test_every_loss_is_walked_alone():
    """T backward passes through T heads, not T²: the heads' gradients of other tasks are not even zeros."""
    model, passes = Model(), []
    for t, head in enumerate(model.heads):
        head.register_full_backward_hook(lambda module, gi, go, t=t: passes.append(t))
    GradNorm(3)(model.losses(), model.last.weight)
    assert sorted(passes) == [0, 1, 2]


def test_a_task_that_does_not_reach_the_layer():
    model, other = Model(2), torch.ones((), dtype=F64, requires_grad=True)
    method = GradNorm(3, alpha=0.0)
    result = method([*model.losses(), other * 2], model.last.weight)
    result.backward()
    assert other.grad == 2
    assert method.w.isfinite().all()
    assert not torch.equal(method.w, torch.ones(3, dtype=F64))
    constant = GradNorm(3, alpha=0.0)
    constant([*model.losses(), torch.tensor(2.0, dtype=F64)], model.last.weight)  # which is absent
    two = GradNorm(2, alpha=0.0)
    two(model.losses(), model.last.weight)
    assert constant.w[2] == 1
    torch.testing.assert_close(constant.w[:2], two.w, rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_gradients_that_overflow_leave_the_state(alpha):
    """Finite losses with infinite gradients, as under a loss scaler that is too large."""
    x = torch.zeros(2, dtype=F64, requires_grad=True)
    method = GradNorm(2, alpha=alpha, initial_losses=[1.0, 1.0])
    state = {key: value.clone() for key, value in method.state_dict().items()}
    method([1 + x[0].sqrt(), 1 + x[1]], x)
    for key, value in method.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_infinite_losses_with_finite_gradients_leave_the_state(bad):
    """With α = 0 the losses do not enter the targets."""
    model, method = Model(), GradNorm(3, alpha=0.0, initial_losses=[1.0, 1.0, 1.0])
    losses = model.losses()
    result = method([losses[0] + bad, *losses[1:]], model.last.weight)
    assert result.isnan()
    assert torch.equal(method.w, torch.ones(3, dtype=F64))
    assert not method.adam.steps.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_initial_losses_are_the_first_that_are_finite(bad):
    model, method = Model(), GradNorm(3)
    losses = model.losses()
    method([losses[0] * bad, *losses[1:]], model.last.weight)
    assert method.initial.isnan().all()
    method(losses, model.last.weight)
    torch.testing.assert_close(method.initial, torch.stack(losses).detach())
    method(model.losses(1), model.last.weight)
    torch.testing.assert_close(method.initial, torch.stack(losses).detach())


def test_errors():
    model, method = Model(), GradNorm(3)
    with pytest.raises(ValueError, match="layer: expected the weight of the last shared layer"):
        method(model.losses())
    with pytest.raises(TypeError, match="layer: expected a tensor or an iterable of tensors, got int"):
        method(model.losses(), 3)
    with pytest.raises(ValueError, match="layer: expected at least one tensor"):
        method(model.losses(), [])
    with pytest.raises(TypeError, match=r"layer\[0\]: expected a tensor, got str"):
        method(model.losses(), ["last"])
    with pytest.raises(ValueError, match=r"layer\[0\]: expected a tensor that requires grad"):
        method(model.losses(), model.last.weight.detach())
    with pytest.raises(ValueError, match="losses: expected losses that require grad"):
        method(torch.ones(3), model.last.weight)
    with pytest.raises(ValueError, match=r"losses: expected 3 .*, got 2"):
        method(model.losses()[:2], model.last.weight)
    assert torch.equal(method.w, torch.ones(3, dtype=F64))
    model.eval()
    method.eval()
    assert method(torch.ones(3)).dtype is F32
