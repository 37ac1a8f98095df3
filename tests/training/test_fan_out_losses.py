"""Methods on losses in a fan-out: the total is the method's, and everything else that of the plain backward."""

import copy

import pytest
import torch
from helpers import F64, randn
from models import MLP

import fastmtl
from fastmtl import scalarization

T = 3
MAKE = {
    "LS": scalarization.LS,
    "LS numbers": lambda: scalarization.LS([0.2, 0.5, 0.3]),
    "RLW": scalarization.RLW,
    "DWA": lambda: scalarization.DWA(T, window=1),
    "Uncertainty": lambda: scalarization.Uncertainty(T),
    "GLS": scalarization.GLS,
    "STCH": scalarization.STCH,
    "FAMO": lambda: scalarization.FAMO(T),
    "IMTLL": lambda: scalarization.IMTLL(T),
}
methods = pytest.mark.parametrize("name", MAKE)
vias = pytest.mark.parametrize("via", ["node", "hooks"])


def gradients(*modules):
    return [p.grad.clone() for module in modules for p in module.parameters()]


@methods
@vias
def test_is_the_backward_of_the_scalar(name, via):
    ours, theirs, method = MLP(T, F64), MLP(T, F64), MAKE[name]()
    twin = copy.deepcopy(method)
    for step in range(3):
        for model in (ours, theirs):
            model.zero_grad()
        hs = fastmtl.fan_out(ours.encoder(ours.x), T, method, via=via)
        torch.manual_seed(step)
        total = hs.total([ours.loss(t, h) for t, h in enumerate(hs)])
        total.backward()
        h = theirs.encoder(theirs.x)
        torch.manual_seed(step)
        value = twin([theirs.loss(t, h) for t in range(T)])
        value.backward()
        torch.testing.assert_close(total, value)
        torch.testing.assert_close(gradients(ours), gradients(theirs))
        torch.testing.assert_close(hs.info.alpha, twin.last_weights.to(F64))
        assert hs.info.gram is None
        torch.testing.assert_close(method.state_dict(), twin.state_dict(), equal_nan=True)
    assert hs.gradients[0].shape == h.shape


@methods
def test_absent_and_named_tasks(name):
    model, method = MLP(T, F64), MAKE[name]()
    info = fastmtl.Info(T)
    hs = fastmtl.fan_out(model.encoder(model.x), ("a", "b", "c"), method, info=info)
    hs.total({"a": model.loss(0, hs["a"]), "c": model.loss(2, hs["c"]), "b": None}).backward()
    assert info.alpha[1] == 0
    assert info.alpha[[0, 2]].isfinite().all()
    assert set(info.as_dict()) >= {"alpha/a", "alpha/b", "alpha/c"}
    assert all(p.grad is None for p in model.heads[1].parameters())


@methods
@vias
def test_a_plain_sum_is_refused_and_leaves_nothing(name, via):
    model, method = MLP(T, F64), MAKE[name]()
    hs = fastmtl.fan_out(model.encoder(model.x), T, method, via=via)
    losses = [model.loss(t, h) for t, h in enumerate(hs)]
    hs.total(losses)
    with pytest.raises(RuntimeError, match=r"fan_out: .* works on the losses: .*total\(losses\)"):
        sum(losses).backward()
    assert all(p.grad is None for p in model.encoder.parameters())


def test_a_derivative_is_one():
    model = MLP(T, F64)
    h = model.encoder(model.x)
    hs = fastmtl.fan_out(h, T, scalarization.LS())
    (got,) = torch.autograd.grad(model.loss(1, hs[1]), h, retain_graph=True)
    (expected,) = torch.autograd.grad(model.loss(1, h), h)
    torch.testing.assert_close(got, expected)


def test_a_loss_scaler_scales_the_total():
    ours, theirs, method = MLP(T, F64), MLP(T, F64), scalarization.STCH()
    for model, S in ((ours, 1024.0), (theirs, 1.0)):
        hs = fastmtl.fan_out(model.encoder(model.x), T, method, grad_scale=S)
        (S * hs.total([model.loss(t, h) for t, h in enumerate(hs)])).backward()
    for x, y in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(x / 1024, y)


def test_by_attach():
    ours, theirs, method = MLP(T, F64), MLP(T, F64), scalarization.LS("sum")
    with fastmtl.attach(ours.encoder, ours.heads, method) as handle:
        h = ours.encoder(ours.x)
        handle.total([ours.loss(t, h) for t in range(T)]).backward()
        torch.testing.assert_close(handle.info.alpha, torch.ones(T, dtype=F64))
    h = theirs.encoder(theirs.x)
    sum(theirs.loss(t, h) for t in range(T)).backward()
    torch.testing.assert_close(gradients(ours), gradients(theirs))


def test_what_does_not_go_together():
    h = randn(4, 5).requires_grad_() * 1.0
    with pytest.raises(ValueError, match="process_group: expected a method that works on the Gram matrix"):
        fastmtl.fan_out(h, T, scalarization.LS(), process_group=True)
    with pytest.raises(ValueError, match=r"expected 2 \(the number of tasks\), got 3"):
        fastmtl.fan_out(h, T, scalarization.DWA(2))
    model = MLP(T, F64)
    hs = fastmtl.fan_out(model.encoder(model.x), T, scalarization.GradNorm(T))
    with pytest.raises(ValueError, match="layer: expected the weight of the last shared layer"):
        hs.total([model.loss(t, x) for t, x in enumerate(hs)])
    with torch.no_grad():  # nothing is trained, and nothing remembered
        method = scalarization.FAMO(T)
        hs = fastmtl.fan_out(model.encoder(model.x), T, method)
        total = hs.total([model.loss(t, x) for t, x in enumerate(hs)])
    assert total == sum(model.loss(t, model.encoder(model.x)) for t in range(T))
    assert method.previous.isnan().all()
