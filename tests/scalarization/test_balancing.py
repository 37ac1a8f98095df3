"""COSMOS, PBI, SoftAdapt, ReLoBRaLo, GO4Align, NTK weights and PiKE, each against its formula written down."""

import itertools

import pytest
import torch
from helpers import F64, randn, relative
from torch import nn

from fastmtl.scalarization import COSMOS, NTK, PBI, GO4Align, PiKE, ReLoBRaLo, SoftAdapt

T = 4


def losses(n=6):
    return [torch.rand(T, dtype=F64, generator=torch.Generator().manual_seed(k)) + 0.2 for k in range(n)]


def slope(method, L):
    L = L.clone().requires_grad_()
    value = method(L)
    (g,) = torch.autograd.grad(value, L)
    assert torch.allclose(method.last_weights, g)
    return value.item(), g


@pytest.mark.parametrize("absent", [False, True])
def test_cosmos(absent):
    w = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    L = losses(1)[0].requires_grad_()
    keep = [0, 1, 3] if absent else [0, 1, 2, 3]
    parts = [L[t] if t in keep else None for t in range(T)]
    method = COSMOS(weights=w, lam=2.0)
    value = method(parts)
    v, K = w[keep], L[keep]
    expected = v @ K - 2 * (v @ K) / (v.norm() * K.norm())
    assert value.item() == pytest.approx(expected.item())
    got, wanted = (torch.autograd.grad(x, L, retain_graph=True)[0] for x in (value, expected))
    assert relative(got, wanted) <= 1e-12
    assert relative(method.last_weights, wanted) <= 1e-12


@pytest.mark.parametrize("reference", [None, [-0.1, 0.0, -0.2, 0.1]])
def test_pbi(reference):
    w = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    L = losses(1)[0].requires_grad_()
    method = PBI(weights=w, theta=3.0, reference=reference)
    u = w / w.norm()
    F = L if reference is None else L - torch.tensor(reference, dtype=F64)
    expected = F @ u + 3 * (F - (F @ u) * u).norm()
    (wanted,) = torch.autograd.grad(expected, L)
    value, got = slope(method, L.detach())
    assert value == pytest.approx(expected.item())
    assert relative(got, wanted) <= 1e-12
    on_it = PBI(weights=w)
    assert slope(on_it, 2 * w)[1].isfinite().all()
    with pytest.raises(ValueError, match="reference: expected length 4"):
        PBI(reference=[0.0, 0.0])(L)


@pytest.mark.parametrize("variant", ["plain", "normalized", "loss-weighted"])
def test_softadapt(variant):
    method, L = SoftAdapt(T, beta=0.7, variant=variant), losses()
    for k in range(6):
        if k < 2:
            expected = torch.full((T,), 1 / T, dtype=F64)
        else:
            s = L[k - 1] - L[k - 2]
            if variant == "normalized":
                s = s / s.abs().sum()
            expected = (0.7 * s).exp() * (L[k - 1] if variant == "loss-weighted" else 1)
            expected = expected / expected.sum()
        assert relative(slope(method, L[k])[1], expected) <= 1e-12, k


def test_softadapt_of_absent_tasks_and_zeros():
    method = SoftAdapt(2, variant="loss-weighted")
    for _ in range(4):
        assert slope(method, torch.zeros(2, dtype=F64))[1].tolist() == [0.5, 0.5]
    method = SoftAdapt(3)
    L = losses()
    for k in range(4):
        method([L[k][0], L[k][1], None])
    s = torch.stack([L[3][0] - L[2][0], L[3][1] - L[2][1], torch.zeros((), dtype=F64)])
    method([*L[4][:3]])
    assert relative(method.last_weights, (0.1 * s).softmax(0)) <= 1e-12


def test_relobralo():
    method = ReLoBRaLo(T, alpha=0.6, temperature=0.5, lookback=0.5)
    L, w = losses(12), torch.ones(T, dtype=F64)

    def relative_to(k, j):
        return T * (L[k] / (0.5 * L[j])).softmax(0)

    looked_back = 0
    for k in range(12):
        torch.manual_seed(k)
        rho = float(torch.rand((), dtype=F64) < 0.5)
        if k == 1:
            w = relative_to(1, 0)
        elif k > 1:
            w = 0.6 * (rho * w + (1 - rho) * relative_to(k, 0)) + 0.4 * relative_to(k, k - 1)
            looked_back += rho == 0
        torch.manual_seed(k)
        assert relative(slope(method, L[k])[1], w) <= 1e-12, k
    assert 0 < looked_back < 10
    with pytest.raises(ValueError, match=r"losses\[1\]: expected a loss > 0"):
        method(torch.tensor([1.0, 0.0, 1.0, 1.0]))


def clustered(x, groups):
    """The best of all ways to cut the sorted numbers."""
    y, order = x.sort()
    best = None
    for cuts in itertools.combinations(range(1, len(x)), groups - 1):
        ends = [0, *cuts, len(x)]
        means = torch.cat([y[i:j].mean().expand(j - i) for i, j in itertools.pairwise(ends)])
        cost = (y - means).square().sum()
        if best is None or cost < best[0]:
            best = cost, means
    return torch.empty_like(x).scatter(0, order, best[1])


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("tasks", [4, 7])
def test_go4align(groups, tasks):
    method, p = GO4Align(tasks, groups=groups, step_size=0.5), torch.full((tasks,), 1 / tasks, dtype=F64)
    for k in range(8):
        L = torch.rand(tasks, dtype=F64, generator=torch.Generator().manual_seed(k)) + 0.1
        p = p * (-0.5 * L).exp()
        p = p / p.sum()
        expected = clustered(p * L.sum() / L, groups)
        assert relative(slope(method, L)[1], expected) <= 1e-10
    if tasks == 4:
        method([L[0], None, L[2], L[3]])
        q = p[[0, 2, 3]] * (-0.5 * L[[0, 2, 3]]).exp()
        rest = L[[0, 2, 3]]
        expected = clustered(q / q.sum() * rest.sum() / rest, min(groups, 3))
        assert relative(method.last_weights[[0, 2, 3]], expected) <= 1e-10
        assert method.last_weights[1] == 0


def test_ntk(monkeypatch):
    """The traces of the kernels, from Jacobians row by row; estimates by random signs come near them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    x, y = randn(12, 2, dtype=F64), randn(20, 2, dtype=F64, seed=1)

    def residuals():
        inner = y.clone().requires_grad_()
        u = net(inner)
        (du,) = torch.autograd.grad(u.sum(), inner, create_graph=True)
        return [net(x).squeeze(1) - 1, 3 * du.sum(1)]

    traces = []
    for r in residuals():
        rows = [torch.autograd.grad(e, list(net.parameters()), retain_graph=True, allow_unused=True) for e in r]
        traces.append(sum(g.square().sum() for row in rows for g in row if g is not None))
    expected = sum(traces) / torch.stack(traces)
    exact, few = NTK(2, probes=None), NTK(2, probes=10)
    assert slope(exact, torch.ones(2, dtype=F64))[1].tolist() == [1.0, 1.0]
    passes = []
    plain = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (passes.append(1), plain(*a, **k))[1])
    found = residuals()
    passes.clear()
    exact.update(found, net)
    assert len(passes) < 12  # not one for each of 32 residuals
    monkeypatch.undo()
    assert all(p.grad is None for p in net.parameters())
    assert relative(exact.traces, torch.stack(traces)) <= 1e-12
    assert relative(slope(exact, torch.ones(2, dtype=F64))[1], expected) <= 1e-12
    estimates = []
    for _ in range(60):
        few.update(residuals(), net)
        estimates.append(few.traces.clone())
    found = torch.stack(estimates)
    error = found.std(0) / 60**0.5
    assert ((found.mean(0) - torch.stack(traces)).abs() <= 4 * error).all()
    exact.update([None, residuals()[1] * 0], net)
    assert relative(exact.traces[:1], traces[0][None]) <= 1e-12
    assert exact.traces[1] == 0
    assert slope(exact, torch.ones(2, dtype=F64))[1].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda n, p: n.update([p], [p]), ValueError, r"residuals: expected 2 \(the number of tasks\), got 1"),
        (lambda n, p: n.update([p, 3], [p]), TypeError, r"residuals\[1\]: expected a floating tensor or None, got int"),
        (lambda n, p: n.update([p, p], [p.detach()]), ValueError, "parameters: expected at least one that requires"),
        (lambda n, p: (n.update({"a": p, "b": p}, [p]), n.update({"a": p}, [p])), ValueError, "residuals: expected"),
    ],
)
def test_ntk_checks(call, error, message):
    with pytest.raises(error, match=message):
        call(NTK(2), torch.ones(3, requires_grad=True))


def estimates(losses, parameters):
    """‖∇L‖² and σ² without bias, from a gradient an example."""
    rows = [torch.autograd.grad(x, parameters, retain_graph=True) for x in losses]
    G = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    variance = G.var(0).sum()
    return G.mean(0).square().sum() - variance / len(G), variance


@pytest.mark.parametrize("tau", [None, 1.5])
def test_pike(tau):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    prior = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    method = PiKE(3, zeta1=1e-3, zeta2=0.02, batch_size=10, tau=tau, weights=5 * prior)
    w, y = prior, torch.ones(3, dtype=F64)
    for k in range(3):
        x = [randn(6 + t, 3, dtype=F64, seed=9 * k + t) for t in range(3)]
        parts = [(net(one)[:, t] - 2 * t - 3).square() for t, one in enumerate(x)]
        there = [0, 2] if k == 2 else [0, 1, 2]
        found = [estimates(part, list(net.parameters())) for part in parts]
        assert min(square for square, _ in found) > 0  # no estimate is cut off
        if tau is not None:
            y = y.clone()
            y[there] = tau * (tau * torch.stack([parts[t].mean() for t in there]).detach()).softmax(0)
        step = torch.stack(
            [y[t] ** 2 * (1e-3 * square - 0.02 / 20 * variance) for t, (square, variance) in enumerate(found)]
        )
        new = w * step.exp()
        w = w.clone()
        w[there] = new[there] / new[there].sum() * w[there].sum()
        named = {name: parts[t] if t in there else None for t, name in enumerate("abc")}
        method.update(dict(reversed(named.items())) if k else named, net)
        assert relative(method.logits.exp(), w) <= 1e-10
        assert all(p.grad is None for p in net.parameters())
        L = torch.rand(3, dtype=F64) + 0.2
        value, g = slope(method, L)
        assert relative(g, w * y) <= 1e-10
        assert value == pytest.approx((w * y * L).sum().item())
    method([L[0], None, L[2]])
    assert relative(method.last_weights[[0, 2]], (w * y)[[0, 2]] / (w[0] + w[2])) <= 1e-10
    sizes = method.sizes(1000)
    assert sum(sizes) == 1000
    assert all(abs(n - 1000 * share) < 1 for n, share in zip(sizes, w.tolist(), strict=True))
    before = method.state_dict()["logits"].clone()
    broken = parts[0] * torch.nan
    method.update([broken, parts[1], parts[2]], net)
    assert torch.equal(method.logits, before)
    method.reset()
    assert relative(method.logits.exp(), prior) <= 1e-14


def test_pike_on_the_papers_example():
    """Example 2.1: losses ½ (θ·e_t)² + x·θ of known gradients and variances, of which estimates are unbiased."""
    theta = torch.tensor([1.5, -0.5], dtype=F64, requires_grad=True)
    noise = (0.5, 2.0)
    method, found = PiKE(2, zeta1=0.0, zeta2=0.0), []
    for k in range(60):
        parts = []
        for t, sigma in enumerate(noise):
            x = sigma * randn(20, 2, dtype=F64, seed=2 * k + t)
            parts.append(0.5 * theta[t] ** 2 + x @ theta)
        method.update(parts, [theta])
        found.append(torch.stack([method.squares, method.variances]))
    found = torch.stack(found)
    expected = torch.tensor([[1.5**2, 0.5**2], [2 * s**2 for s in noise]], dtype=F64)
    error = found.std(0) / len(found) ** 0.5
    miss = (found.mean(0) - expected).abs() / error
    miss[0, 1] = 0  # a square that is often cut off at 0: an estimate that is too large
    assert (miss <= 4).all()
    assert method.sizes() == [128, 128]
    method.zeta1 = method.zeta2 = 1.0
    method.batch_size = 4
    method.update(parts, [theta])
    assert method.sizes(100)[0] > 70  # more to gain, less noise


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, p: m.update([p * 1], [p]), ValueError, r"losses: expected 2 \(the number of tasks\), got 1"),
        (lambda m, p: m.update([p * 1, 3], [p]), TypeError, r"losses\[1\]: expected a floating tensor or None, got"),
        (lambda m, p: m.update([p.sum()[None], None], [p]), ValueError, r"losses\[0\]: expected the losses \[n\]"),
        (lambda m, p: m.update([p.detach(), None], [p]), ValueError, r"losses\[0\]: .* which require grad"),
        (lambda m, p: m.update([p * 1, p * 2], [p.detach()]), ValueError, "parameters: expected at least one"),
        (lambda m, p: m.update([(randn(4, 3) @ p).softmax(0), None], [p]), ValueError, "example"),
        (lambda m, p: m.sizes(0), ValueError, "batch_size: expected an integer >= 1"),
        (lambda m, p: PiKE(3, weights=[1.0, 2.0]), ValueError, "weights: expected length 3"),
    ],
)
def test_pike_checks(call, error, message):
    with pytest.raises(error, match=message):
        call(PiKE(2), torch.ones(3, requires_grad=True))
