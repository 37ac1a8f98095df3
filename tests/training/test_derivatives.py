"""Derivatives through aliases are derivatives, as without a fan-out; losses made from them are refused, or exact."""

import warnings

import pytest
import torch
from helpers import F64, flat, randn, relative, svd_align
from torch import nn

import fastmtl
from fastmtl import AlignedMTL, attach, fan_out

both = pytest.mark.parametrize("via", ["node", "hooks"])
TASKS = 3


class Network(nn.Module):
    """A smooth network of two inputs, as for a differential equation: u_t(x) for each task."""

    def __init__(self, linear=False):
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
        self.heads = nn.ModuleList(
            nn.Linear(6, 1) if linear else nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
            for _ in range(TASKS)
        )
        self.double()
        self.x = randn(7, 2, dtype=F64, seed=2).requires_grad_()

    def outputs(self, aliases):
        return [head(h).squeeze(-1) for head, h in zip(self.heads, aliases, strict=True)]

    def plain(self):
        return self.outputs([self.encoder(self.x)] * TASKS)


def fanned(network, via="node", method=None):
    hs = fan_out(network.encoder(network.x), TASKS, method or AlignedMTL(), via=via)
    return hs, network.outputs(hs)


def attached(network, via="node"):
    handle = attach(network.encoder, network.heads, AlignedMTL(), via=via)
    h = network.encoder(network.x)
    return handle, network.outputs([h] * TASKS)


ways = pytest.mark.parametrize("way", [fanned, attached], ids=["fan_out", "attach"])


@both
@ways
@pytest.mark.parametrize("task", range(TASKS))
def test_a_task_with_respect_to_the_inputs(task, way, via):
    """Saliency."""
    network = Network()
    (expected,) = torch.autograd.grad(network.plain()[task].sum(), network.x)
    handle, outputs = way(network, via)
    (got,) = torch.autograd.grad(outputs[task].sum(), network.x)
    assert relative(got, expected) <= 1e-14
    assert handle.info is handle.gradients is None
    assert network.encoder[0].weight.grad is None


@both
@ways
def test_all_tasks_with_respect_to_the_inputs(way, via):
    """It is ambiguous, so it is said what comes."""
    network = Network()
    (expected,) = torch.autograd.grad(sum(network.plain()).sum(), network.x)
    _, outputs = way(network, via)
    with pytest.warns(
        UserWarning, match=r"fan_out: torch.autograd.grad .* returns the plain derivative, without aggregation"
    ):
        (got,) = torch.autograd.grad(sum(outputs).sum(), network.x)
    assert relative(got, expected) <= 1e-14


@both
def test_an_attack_and_then_a_step(via):
    """FGSM: the sign of the derivative of a task's loss, and an aligned step on what it makes of the inputs."""
    network, plain = Network(), Network()
    hs, outputs = fanned(network, via)
    (got,) = torch.autograd.grad(outputs[0].square().mean(), network.x)
    (expected,) = torch.autograd.grad(plain.plain()[0].square().mean(), plain.x)
    assert relative(got, expected) <= 1e-14
    network.x = (network.x + 0.1 * got.sign()).detach().requires_grad_()
    hs, outputs = fanned(network, via)
    hs.total([u.square().mean() for u in outputs]).backward()
    h = network.encoder(network.x)
    Z = [torch.autograd.grad(u.square().mean(), h, retain_graph=True)[0] for u in network.outputs([h] * TASKS)]
    aligned = svd_align(torch.stack([z.reshape(-1) for z in Z])).view_as(h)
    expected = torch.autograd.grad(h, list(network.encoder.parameters()), aligned)
    for p, g in zip(network.encoder.parameters(), expected, strict=True):
        assert relative(p.grad, g) <= 1e-9


@both
@ways
def test_a_task_with_respect_to_parameters(way, via):
    """What a monitor or GradNorm looks at, before the one backward that trains."""
    network, plain = Network(), Network()
    parameters = list(network.encoder.parameters())
    expected = [
        torch.autograd.grad(plain.plain()[t].square().mean(), list(plain.encoder.parameters())) for t in range(TASKS)
    ]
    handle, outputs = way(network, via)
    losses = [u.square().mean() for u in outputs]
    for loss, row in zip(losses, expected, strict=True):
        got = torch.autograd.grad(loss, parameters, retain_graph=True)
        assert relative(flat(got), flat(row)) <= 1e-14
    handle.total(losses).backward()
    assert handle.info.rank == TASKS
    other = Network()
    hs, outputs = fanned(other)
    hs.total([u.square().mean() for u in outputs]).backward()
    for p, q in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@both
def test_with_respect_to_an_alias_and_to_h(via):
    network = Network()
    h = network.encoder(network.x)
    hs = fan_out(h, TASKS, AlignedMTL(), via=via)
    u = network.outputs(hs)[1]
    at_alias, at_h = torch.autograd.grad(u.sum(), [hs[1], h])
    assert torch.equal(at_alias, at_h)


@both
def test_a_structure_of_tensors(via):
    x = randn(5, dtype=F64).requires_grad_()

    def derivative(fan):
        a, b = x.sin(), x.exp()
        hs = fan([a, {"b": b}])
        return torch.autograd.grad((hs[1][0] * hs[1][1]["b"]).sum(), x, create_graph=True)[0]

    expected = derivative(lambda h: [h, h])
    got = derivative(lambda h: fan_out(h, 2, AlignedMTL(), via=via))
    assert relative(got, expected) <= 1e-14
    second = [torch.autograd.grad(d.sum(), x)[0] for d in (got, expected)]
    assert relative(*second) <= 1e-14


@both
def test_jacobian_and_hessian(via):
    network = Network()

    def u(x, fan):
        network.x = x
        return (fanned(network, via)[1] if fan else network.plain())[2]

    x = network.x.detach()
    for functional in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
        got, expected = (functional(lambda x, fan=fan: u(x, fan).sin().sum(), x) for fan in (True, False))
        assert relative(got, expected) <= 1e-13


# ------------------------------------------------------------------------------------------------ of higher order


@both
@ways
def test_derivatives_of_second_and_third_order(way, via):
    network = Network()

    def derivatives(u):
        found = []
        for _ in range(3):
            (u,) = torch.autograd.grad(u.sum(), network.x, create_graph=True)
            found.append(u)
        return found

    expected = derivatives(network.plain()[1])
    got = derivatives(way(network, via)[1][1])
    for d, e in zip(got, expected, strict=True):
        assert relative(d.detach(), e.detach()) <= 1e-12


def quietly(function, *arguments):
    """Without the warning that comes before the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


def residuals(network, outputs):
    """Losses of which each contains a derivative of its task's output."""
    losses = []
    for t, u in enumerate(outputs):
        (d,) = torch.autograd.grad(u.sum(), network.x, create_graph=True)
        losses.append((d.sum(1) - u).square().mean() * 3.0**t)
    return losses


@both
@ways
@pytest.mark.parametrize("linear", [False, True], ids=["nonlinear", "linear"])
@pytest.mark.parametrize("said", [True, False], ids=["total", "sum"])
def test_residuals_are_refused(said, linear, way, via):
    network = Network(linear)
    handle, outputs = way(network, via)
    losses = residuals(network, outputs)
    recommended = r"derivative .* through the aliases .*method\.backward\(losses, shared="
    loss = quietly(handle.total, losses) if said else sum(losses)
    with pytest.raises(NotImplementedError, match=recommended):
        quietly(loss.backward)
    assert all(p.grad is None for p in network.encoder.parameters())


@both
@pytest.mark.parametrize("said", [True, False], ids=["total", "sum"])
def test_a_residual_of_the_representation_is_refused(said, via):
    """Its cotangents are constants: no alias gets a gradient, and yet the encoder would."""
    network = Network()
    hs = fan_out(network.encoder(network.x), 2, AlignedMTL(), via=via)
    losses = [torch.autograd.grad(h.sum(), network.x, create_graph=True)[0].square().mean() for h in hs]
    loss = quietly(hs.total, losses) if said else sum(losses)
    with pytest.raises(NotImplementedError, match="derivative"):
        quietly(loss.backward)
    assert all(p.grad is None for p in network.encoder.parameters())


@both
def test_one_residual_among_ordinary_losses_is_refused(via):
    network = Network()
    hs, outputs = fanned(network, via)
    losses = [residuals(network, outputs)[0], *(u.square().mean() for u in outputs[1:])]
    with (
        pytest.warns(UserWarning, match=r"losses\[0\] depends on h"),
        pytest.raises(NotImplementedError, match="derivative"),
    ):
        hs.total(losses).backward()


@both
def test_residuals_through_autograd_grad_are_refused(via):
    network = Network()
    parameters = list(network.encoder.parameters())
    _, outputs = fanned(network, via)
    losses = residuals(network, outputs)
    (expected,) = (torch.autograd.grad(residuals(network, network.plain())[0], parameters),)
    got = torch.autograd.grad(losses[0], parameters, retain_graph=True)  # of one task: a derivative again
    assert relative(flat(got), flat(expected)) <= 1e-12
    with pytest.raises(NotImplementedError, match="derivative"):
        torch.autograd.grad(sum(losses), parameters)


@both
def test_a_derivative_that_is_only_looked_at(via):
    """With `create_graph=True`, but no part of a loss."""
    network, plain = Network(), Network()
    hs, outputs = fanned(network, via)
    (slope,) = torch.autograd.grad(outputs[0].sum(), network.x, create_graph=True)
    hs.total([u.square().mean() for u in outputs]).backward()
    assert slope.requires_grad
    hs, outputs = fanned(plain)
    hs.total([u.square().mean() for u in outputs]).backward()
    for p, q in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


RECOMMENDED = {
    "shared": lambda network, h: {"shared": network.encoder},
    "features": lambda network, h: {"features": h},
    "default": lambda network, h: {},
}


@pytest.mark.parametrize("way", RECOMMENDED)
def test_what_the_error_recommends_is_exact(way):
    """Also where the shared parameters are to be found: the inputs, which require grad here, are none."""
    network, plain = Network(), Network()
    shared = list(plain.encoder.parameters())
    rows = [
        flat(torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True))
        for loss in residuals(plain, plain.plain())
    ]
    h = network.encoder(network.x)
    losses = residuals(network, network.outputs([h] * TASKS))
    AlignedMTL().backward(losses, **RECOMMENDED[way](network, h))
    reached = [p.grad for p in network.encoder.parameters() if p.grad is not None]
    assert relative(flat(reached), svd_align(torch.stack(rows))) <= 1e-9


def test_a_representation_warns_of_residuals():
    network = Network()
    h = network.encoder(network.x)
    losses = residuals(network, network.outputs([h] * TASKS))
    with pytest.warns(UserWarning, match=r"representation: .* along a path around it.* use shared= instead, which is"):
        AlignedMTL().backward(losses, representation=h)


# ------------------------------------------------------------------------------------------------ what trains


def aligned_gradients(method=None):
    network = Network()
    hs, outputs = fanned(network, method=method)
    hs.total([u.square().mean() for u in outputs]).backward()
    return [p.grad for p in network.encoder.parameters()]


@both
def test_autograd_grad_that_trains(via):
    """Of parameters and all losses, or of their total with respect to anything."""
    expected = aligned_gradients()
    network = Network()
    parameters = list(network.encoder.parameters())
    for way in ("sum", "total"):
        hs, outputs = fanned(network, via)
        losses = [u.square().mean() for u in outputs]
        got = torch.autograd.grad(hs.total(losses) if way == "total" else sum(losses), parameters)
        assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@both
def test_backward_to_given_inputs_trains(via):
    expected = aligned_gradients()
    network = Network()
    _, outputs = fanned(network, via)
    first = network.encoder[0].weight
    sum(u.square().mean() for u in outputs).backward(inputs=[first])
    assert torch.equal(first.grad, expected[0])
    assert all(p.grad is None for p in network.parameters() if p is not first)


@both
def test_the_total_with_respect_to_the_inputs(via):
    """What is asked for is what a training backward would bring them; once it is said that this is no derivative."""
    network, other = Network(), Network()
    hs, outputs = fanned(network, via)
    losses = [u.square().mean() for u in outputs]
    with pytest.warns(UserWarning, match=r"fan_out: torch.autograd.grad of total\(losses\) .* is not the derivative"):
        (got,) = torch.autograd.grad(hs.total(losses), network.x)
    hs, outputs = fanned(other)
    hs.total([u.square().mean() for u in outputs]).backward()
    assert torch.equal(got, other.x.grad)


@both
def test_inputs_that_are_trained(via):
    """A leaf that is no parameter, as in optimisation of an input: `backward` brings it the aligned gradient."""
    expected = aligned_gradients()
    network = Network()
    hs, outputs = fanned(network, via)
    hs.total([u.square().mean() for u in outputs]).backward()
    assert network.x.grad is not None
    assert all(torch.equal(p.grad, e) for p, e in zip(network.encoder.parameters(), expected, strict=True))


def test_one_task_alone_is_its_derivative():
    network = Network()
    h = network.encoder(network.x)
    hs = fan_out(h, 1, AlignedMTL(weights=[2.0]))
    (expected,) = torch.autograd.grad(network.heads[0](network.encoder(network.x)).sum(), network.x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (got,) = torch.autograd.grad(network.heads[0](hs[0]).sum(), network.x)
    assert relative(got, expected) <= 1e-14


def test_losses_that_are_needed_are_not_needed_for_a_derivative():
    network = Network()
    (expected,) = torch.autograd.grad(network.plain()[0].sum(), network.x)
    _, outputs = fanned(network, method=fastmtl.MGDA(normalization="loss"))
    (got,) = torch.autograd.grad(outputs[0].sum(), network.x)
    assert relative(got, expected) <= 1e-14
