"""One meaning a word: what `losses`, `tasks`, `shared`, `groups` and `grad_scale` may be is the same in every call."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import fastmtl
from fastmtl import AlignedMTL, NashMTL

NAMES = ("seg", "depth", "normals")


class Model(nn.Module):
    """A trunk with a frozen layer, and heads of three tasks, as an encoder-decoder network has them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).double()
        self.trunk[2].requires_grad_(False)
        self.heads = nn.ModuleDict({name: nn.Linear(4, 2).double() for name in NAMES})
        self.x = torch.randn(7, 5, dtype=torch.float64)

    def losses(self, hs):
        return [head(h).square().mean() * (t + 1) for t, (head, h) in enumerate(zip(self.heads.values(), hs))]  # noqa: B905

    def grads(self):
        return [None if p.grad is None else p.grad.clone() for p in self.parameters()]


FORMS = {
    "list": list,
    "tuple": tuple,
    "dict": lambda losses: dict(zip(NAMES, losses, strict=True)),
    "tensor": torch.stack,
    "entries": lambda losses: list(torch.stack(losses)),
    "entries from the end": lambda losses: [torch.stack(losses)[t - 3] for t in range(3)],
}
WAYS = {
    "default": lambda model, h: {},
    "module": lambda model, h: {"shared": model.trunk},
    "representation": lambda model, h: {"representation": h},
    "features": lambda model, h: {"features": h},
    "batched": lambda model, h: {"features": h, "batched": True},
    "groups": lambda model, h: {"groups": [model.trunk[:2], model.trunk[2:]]},
    "gramian": lambda model, h: {"engine": "gramian"},
    "auto": lambda model, h: {"engine": "auto"},
    "scaled heads": lambda model, h: {"scale_heads": True},
}


def step(form, way, method=None):
    model = Model()
    h = model.trunk(model.x)
    info = (method or AlignedMTL()).backward(FORMS[form](model.losses([h] * 3)), **WAYS[way](model, h))
    return model.grads(), info


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


ORDERS = {"as before": NAMES, "turned": NAMES[1:] + NAMES[:1], "reversed": NAMES[::-1]}
ORDERED = {
    "weights": lambda: AlignedMTL(weights=[1, 2, 5]),
    "NashMTL": lambda: NashMTL(every=2),
    "GradVac": lambda: fastmtl.GradVac(generator=torch.Generator().manual_seed(0)),
    "DWA": lambda: fastmtl.scalarization.DWA(3, window=1),
    "FAMO": lambda: fastmtl.scalarization.FAMO(3),
}


@pytest.mark.parametrize("make", ORDERED.values(), ids=ORDERED)
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_names_in_another_order_are_the_same_tasks(make, order):
    def steps(order):
        model, method, seen = Model(), make(), []
        for n in range(3):
            losses = dict(zip(NAMES, model.losses([model.trunk(model.x * (n + 1))] * 3), strict=True))
            info = method.backward({name: losses[name] for name in (order if n else NAMES)}, model.trunk)
            assert info.names == NAMES
            seen.append(info.alpha)
        return model.grads(), seen

    (expected, alphas), (found, others) = steps(NAMES), steps(order)
    assert_close(found, expected)
    for a, b in zip(alphas, others, strict=True):
        assert torch.equal(a, b)


def test_other_names_are_other_tasks():
    model, method, stateful = Model(), AlignedMTL(), NashMTL(every=2)
    for one in (method, stateful):
        one.backward(dict(zip(NAMES, model.losses([model.trunk(model.x)] * 3), strict=True)), model.trunk)
    others = ("a", "b", "c")

    def losses():
        return dict(zip(others, model.losses([model.trunk(model.x)] * 3), strict=True))

    assert method.backward(losses(), model.trunk).names == others  # remembers nothing
    with pytest.raises(ValueError, match=r"^losses: expected one for each of 'seg', 'depth', 'normals' .*reset"):
        stateful.backward(losses(), model.trunk)
    with pytest.raises(ValueError, match=r"^tasks: expected the names in the order that NashMTL"):
        fastmtl.fan_out(model.trunk(model.x), NAMES[::-1], stateful)
    fastmtl.fan_out(model.trunk(model.x), NAMES[::-1], method)
    stateful.reset()
    assert stateful.backward(losses(), model.trunk).names == others


@pytest.mark.parametrize("name", ["dwa", "uncertainty", "imtl-l", "famo"])
def test_reset_forgets_names_of_methods_on_losses(name):
    method = fastmtl.catalog.make(name, tasks=2)
    for names in (("a", "b"), ("c", "d")):
        method.reset()
        assert method.backward({n: torch.ones((), requires_grad=True) for n in names}).names == names


@pytest.mark.parametrize("name", ["aligned", "dwa", "stch"])
@pytest.mark.parametrize("entry", ["backward", "fan_out"])
def test_an_entry_that_was_constant_before_the_stack_is_absent(name, entry, recwarn):
    def run(form):
        model, method = Model(), fastmtl.catalog.make(name, tasks=3)
        h = model.trunk(model.x)
        hs = fastmtl.fan_out(h, 3, method) if entry == "fan_out" else [h] * 3
        losses = model.losses(hs)
        losses[1] = losses[1].detach()
        if entry == "fan_out":
            hs.total(FORMS[form](losses)).backward()
            return model.grads(), hs.info, method
        return model.grads(), method.backward(FORMS[form](losses), model.trunk), method

    (expected, plain, one), (found, info, other) = run("list"), run("tensor")
    assert plain.alpha[1] == 0
    assert torch.equal(info.alpha, plain.alpha)
    assert_close(found, expected)
    for key, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=0, atol=0, equal_nan=True)
    assert not recwarn.list


@pytest.mark.parametrize("name", ["uncertainty", "dwa", "imtl-l", "rlw", "uniform"])
def test_a_method_on_losses_behind_a_frozen_encoder(name):
    model, method = Model(), fastmtl.catalog.make(name, tasks=3)
    with torch.no_grad():
        for p in method.parameters():
            p.fill_(0.7)
    hs = fastmtl.fan_out(model.trunk(model.x).detach(), NAMES, method)
    torch.manual_seed(1)
    total = hs.total(model.losses(hs))
    total.backward()
    assert hs.info.names == NAMES
    found, learned = model.grads(), [p.grad.clone() for p in method.parameters()]
    other = Model()
    for p in method.parameters():
        p.grad = None
    method.reset()
    with torch.no_grad():
        for p in method.parameters():
            p.fill_(0.7)
    torch.manual_seed(1)
    value = method(other.losses([other.trunk(other.x).detach()] * 3))
    value.backward()
    torch.testing.assert_close(total, value, rtol=0, atol=0)
    assert_close(found, other.grads())
    assert_close(learned, [p.grad for p in method.parameters()])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", [form for form in FORMS if form != "list"])
def test_losses_in_every_form(form, way):
    expected, plain = step("list", way)
    found, info = step(form, way)
    assert_close(found, expected)
    assert torch.equal(info.alpha, plain.alpha)
    assert plain.names is None
    assert info.names == (NAMES if form == "dict" else None)


def test_heads_of_stacked_losses_are_not_shared():
    """Each entry of a stack reaches, by zeros, all heads."""
    model = Model()
    method = AlignedMTL()
    method.backward(torch.stack(model.losses([model.trunk(model.x)] * 3)))
    found = model.grads()
    model = Model()
    sum(model.losses([model.trunk(model.x)] * 3)).backward()
    heads = {id(p) for p in model.heads.parameters()}
    for p, g in zip(model.parameters(), found, strict=True):
        if id(p) in heads:
            torch.testing.assert_close(g, p.grad)


def test_a_representation_that_is_a_stack():
    """Losses read entries of it, and it is where gradients are aggregated all the same."""
    torch.manual_seed(0)
    trunk = nn.Linear(3, 3).double()

    def forward():
        h = torch.stack([x.square() for x in trunk(torch.ones(3, dtype=torch.float64))])
        return h, [h[0] * 2, h[1] - h[2], *h[:1]]

    h, losses = forward()
    G = torch.stack([torch.autograd.grad(loss, h, retain_graph=True)[0] for loss in losses])
    expected = torch.autograd.grad(h, trunk.weight, AlignedMTL()(G))[0]
    h, losses = forward()
    info = AlignedMTL().backward(losses, representation=h)
    torch.testing.assert_close(info.gram, G @ G.T)
    torch.testing.assert_close(trunk.weight.grad, expected)


def test_a_column_of_losses_of_one_head():
    """What all entries really have in common is shared: here, everything."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    AlignedMTL().backward(net(x).square().mean(0))
    found = net.weight.grad
    net.weight.grad = None
    AlignedMTL().backward([net(x).square().mean(0)[t] for t in range(2)], shared=net)
    torch.testing.assert_close(net.weight.grad, found)


def test_aliases_by_name():
    def run(tasks):
        model = Model()
        hs = fastmtl.fan_out(model.trunk(model.x), tasks, AlignedMTL())
        named = len(model.heads) if hs.names is None else hs.names
        if hs.names is None:
            hs.total(model.losses(hs)).backward()
        else:
            losses = dict(zip(named, model.losses([hs[name] for name in named]), strict=True))
            hs.total(dict(reversed(losses.items()))).backward()
        return model.grads(), hs

    expected, plain = run(3)
    found, hs = run(NAMES)
    assert_close(found, expected)
    assert hs.names == hs.info.names == NAMES
    assert plain.names is None
    assert all(hs[name] is alias for name, alias in zip(NAMES, hs, strict=True))


@pytest.mark.parametrize("make", [dict, nn.ModuleDict])
def test_attached_heads_by_name(make):
    def run(heads, form):
        model = Model()
        with fastmtl.attach(model.trunk, heads(model), AlignedMTL()) as handle:
            handle.total(FORMS[form](model.losses([model.trunk(model.x)] * 3))).backward()
            return model.grads(), handle.info, handle.names

    expected, _, names = run(lambda model: model.heads.values(), "list")
    assert names is None
    found, info, names = run(lambda model: make(model.heads), "dict")
    assert_close(found, expected)
    assert info.names == names == NAMES


def test_absent_tasks_by_name():
    model = Model()
    seg, _, normals = model.losses([model.trunk(model.x)] * 3)
    info = AlignedMTL().backward({"seg": seg, "depth": None, "normals": normals}, shared=model.trunk)
    assert info.alpha[1] == 0
    assert model.heads["depth"].weight.grad is None


WRONG = {
    "a missing name": (lambda hs, L: hs.total({"seg": L, "depth": L}), ValueError, "none for 'normals' (None says"),
    "an unknown name": (
        lambda hs, L: hs.total({"seg": L, "depth": L, "normals": L, "edges": L}),
        ValueError,
        "losses: expected one for each of 'seg', 'depth', 'normals', got an unknown 'edges'",
    ),
    "an unknown alias": (lambda hs, L: hs["edges"], KeyError, "expected one of ('seg', 'depth', 'normals')"),
    "an alias where there are no names": (
        lambda hs, L: fastmtl.fan_out(L.detach(), 2, AlignedMTL())["seg"],
        KeyError,
        "the tasks have no names",
    ),
    "losses by name where there are none": (
        lambda hs, L: fastmtl.fan_out(L.clone(), 2, AlignedMTL()).total({"seg": L, "depth": L}),
        TypeError,
        "losses: expected a list, tuple or tensor [T] for tasks without names, got dict",
    ),
    "no losses": (lambda hs, L: AlignedMTL().backward({}), ValueError, "losses: expected at least one loss"),
    "a sparse tensor": (
        lambda hs, L: AlignedMTL().backward(torch.stack([L, L]).to_sparse()),
        TypeError,
        "losses: expected a dense tensor of shape [T], got float64 sparse_coo tensor of shape [2]",
    ),
    "a sparse loss": (
        lambda hs, L: AlignedMTL().backward([L, L.reshape(1).to_sparse()]),
        TypeError,
        "losses[1]: expected a floating scalar tensor, or None, got float64 sparse_coo",
    ),
    "sparse losses of a method that needs them": (
        lambda hs, L: fastmtl.MGDA(normalization="loss")(torch.ones(2, 3), losses=torch.ones(2).to_sparse()),
        TypeError,
        "losses: expected a dense tensor of shape [T], got float32 sparse_coo tensor of shape [2]",
    ),
    "sparse losses of a method on losses": (
        lambda hs, L: fastmtl.scalarization.LS()(torch.ones(2).to_sparse()),
        TypeError,
        "losses: expected a dense tensor of shape [T], got float32 sparse_coo tensor of shape [2]",
    ),
    "a name twice": (
        lambda hs, L: fastmtl.fan_out(L, ("seg", "seg"), AlignedMTL()),
        ValueError,
        "tasks: expected different names, got 'seg', 'seg'",
    ),
    "names that are none": (
        lambda hs, L: fastmtl.fan_out(L, ("seg", 1), AlignedMTL()),
        ValueError,
        "tasks: expected an integer >= 1 or T names, got ('seg', 1)",
    ),
    "a word": (lambda hs, L: fastmtl.fan_out(L, "seg", AlignedMTL()), ValueError, "or T names, got 'seg'"),
    "a bool": (lambda hs, L: fastmtl.fan_out(L, True, AlignedMTL()), ValueError, "tasks: expected an integer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_names(name):
    call, kind, message = WRONG[name]
    model = Model()
    hs = fastmtl.fan_out(model.trunk(model.x), NAMES, AlignedMTL())
    with pytest.raises(kind, match=re.escape(message)):
        call(hs, model.losses(hs)[0])


@pytest.mark.parametrize(
    "shared",
    [lambda trunk: list(trunk.parameters()), lambda trunk: trunk.parameters(), lambda trunk: [*trunk.parameters()] * 2],
    ids=["list", "generator", "twice"],
)
def test_frozen_parameters_are_passed_over(shared):
    expected, _ = step("list", "module")
    model = Model()
    AlignedMTL().backward(model.losses([model.trunk(model.x)] * 3), shared=shared(model.trunk))
    assert_close(model.grads(), expected)
    assert model.trunk[2].weight.grad is None


def test_groups_are_modules_or_parameters_too():
    expected, _ = step("list", "groups")
    model = Model()
    groups = [model.trunk[:2].parameters(), list(model.trunk[2:].parameters())]
    AlignedMTL().backward(model.losses([model.trunk(model.x)] * 3), groups=groups)
    assert_close(model.grads(), expected)


CALLS = {
    "matrix": lambda model, S: NashMTL()(torch.eye(2, 3), grad_scale=S),
    "weighting": lambda model, S: NashMTL().weighting(torch.eye(2), grad_scale=S),
    "backward": lambda model, S: NashMTL().backward(model.losses([model.trunk(model.x)] * 3), grad_scale=S),
    "fan_out": lambda model, S: fastmtl.fan_out(model.trunk(model.x), 3, NashMTL(), grad_scale=S),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("S", "kind"),
    [
        (0.0, ValueError),
        (-1, ValueError),
        (math.inf, ValueError),
        (torch.ones(2), ValueError),
        ("2", TypeError),
        (True, TypeError),
        (torch.tensor(2), TypeError),
        (2j, TypeError),
    ],
    ids=str,
)
def test_a_wrong_grad_scale(call, S, kind):
    with pytest.raises(kind, match=r"^grad_scale: expected"):
        CALLS[call](Model(), S)


@pytest.mark.parametrize(
    "S", [np.float32(8), np.int64(8), np.array([8.0]), 8, torch.tensor(8.0), torch.tensor([8.0])], ids=repr
)
def test_numbers_of_any_kind(S):
    def run(S, tasks):
        model = Model()
        hs = fastmtl.fan_out(model.trunk(model.x), tasks, NashMTL(), grad_scale=S)
        (hs.total(model.losses(hs)) * 8.0).backward()
        return model.grads()

    assert_close(run(S, np.int64(3)), run(8.0, 3))


MEMORIES = {
    "NashMTL": lambda: NashMTL(every=3),
    "GradVac": lambda: fastmtl.GradVac(beta=0.5),
    "DWA": lambda: fastmtl.scalarization.DWA(3, window=1),
    "FAMO": lambda: fastmtl.scalarization.FAMO(3),
    "Uncertainty": lambda: fastmtl.scalarization.Uncertainty(3),
}


@pytest.mark.parametrize("name", MEMORIES)
def test_names_are_saved_with_the_state(name):
    """A run that goes on from a checkpoint with a dict in another order gives each task its own weight."""
    once, again = MEMORIES[name](), MEMORIES[name]()

    def backward(method, order):
        model = Model()
        losses = dict(zip(NAMES, model.losses([model.trunk(model.x)] * 3), strict=True))
        info = method.backward({key: losses[key] for key in order}, shared=model.trunk)
        return dict(zip(info.names, info.alpha.tolist(), strict=True))

    torch.manual_seed(0)
    backward(once, NAMES)
    saved = once.state_dict()
    again.load_state_dict(saved)
    assert again.names == NAMES
    torch.manual_seed(1)
    wanted = backward(once, NAMES)
    torch.manual_seed(1)
    assert backward(again, NAMES[::-1]) == wanted

    # A state without names, as before there were any, and as part of a model.
    model, other = nn.ModuleDict({"method": once}), nn.ModuleDict({"method": again})
    other.load_state_dict(model.state_dict())
    assert again.names == NAMES
    other.load_state_dict({key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)})
    assert again.names is None


def test_a_method_without_state_saves_no_names():
    method = AlignedMTL()
    model = Model()
    method.backward(dict(zip(NAMES, model.losses([model.trunk(model.x)] * 3), strict=True)), shared=model.trunk)
    assert method.names == NAMES
    assert not method.state_dict()


@pytest.mark.parametrize("scaled", [lambda L: L * torch.tensor([1.0, 2.0, 3.0]), lambda L: (L + 1).log()])
def test_losses_that_were_computed_with_in_a_stack(scaled):
    """Autograd cannot tell them apart: a warning says so, and naming the shared parameters is right."""
    model = Model()
    h = model.trunk(model.x)
    with pytest.warns(UserWarning, match="losses: autograd cannot tell these losses apart"):
        AlignedMTL().backward(scaled(torch.stack(model.losses([h] * 3))))
    named, listed = Model(), Model()
    AlignedMTL().backward(scaled(torch.stack(named.losses([named.trunk(named.x)] * 3))), shared=named.trunk)
    AlignedMTL().backward(list(scaled(torch.stack(listed.losses([listed.trunk(listed.x)] * 3)))), shared=listed.trunk)
    for p, q in zip(named.trunk.parameters(), listed.trunk.parameters(), strict=True):
        assert p.grad is None if q.grad is None else torch.allclose(p.grad, q.grad)
