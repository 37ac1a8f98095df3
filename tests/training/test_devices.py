"""Shared parameters on several devices: Gram matrices of each device, summed; results where their parameters are.

Without a second device the columns are split as two would split them; with a GPU (marker `cuda`), half of the model is
on the CPU.
"""

import pytest
import torch
from helpers import F64, flat, randn, relative, svd_align
from torch import nn

import fastmtl
from fastmtl import pipeline

T = 3


class Model(nn.Module):
    """Two stages, each on a device of its own, and heads on the last; float64."""

    def __init__(self, first="cpu", second="cpu"):
        super().__init__()
        torch.manual_seed(3)
        self.bottom = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.top = nn.Sequential(nn.Linear(8, 6), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(T))
        self.x, self.y = randn(16, 5, seed=1, dtype=F64), randn(T, 16, 2, seed=2, dtype=F64)
        self.to(F64)
        self.bottom.to(first)
        for part in (self.top, self.heads):
            part.to(second)
        self.first, self.second = first, second

    def encoder(self):
        return [*self.bottom.parameters(), *self.top.parameters()]

    def forward(self):
        """What both stages return."""
        a = self.bottom(self.x.to(self.first))
        return a, self.top(a.to(self.second))

    def losses(self, h):
        outputs = [head(h) for head in self.heads]
        return [
            10.0**t * (out - y.to(h)).square().mean() for t, (out, y) in enumerate(zip(outputs, self.y, strict=True))
        ]


def columns_of_two_devices(x):
    """Every other size: a stage has columns on both."""
    return x.numel() % 16 < 8


def real_devices():
    return ("cpu", "cuda"), ("cuda", "cpu")


@pytest.fixture(
    params=[
        "columns split as by two devices",
        *(
            pytest.param(
                devices,
                marks=[
                    pytest.mark.cuda,
                    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
                ],
            )
            for devices in real_devices()
        ),
    ],
    ids=str,
)
def model(request, monkeypatch):
    if isinstance(request.param, tuple):
        return Model(*request.param)
    monkeypatch.setattr(pipeline, "_device_of", columns_of_two_devices)
    model = Model()
    assert len(set(map(columns_of_two_devices, model.encoder()))) == 2
    return model


def rows_of(tensors, losses):
    grads = [torch.autograd.grad(loss, tensors, retain_graph=True) for loss in losses]
    return torch.stack([flat([g.cpu() for g in row]) for row in grads])


def got(parameters):
    return flat([p.grad.cpu() for p in parameters])


WAYS = {
    "shared": lambda method, model, a, h: method.backward(model.losses(h), shared=model.encoder()),
    "found": lambda method, model, a, h: method.backward(model.losses(h)),
    "features": lambda method, model, a, h: method.backward(model.losses(h), features=h),
    "gramian": lambda method, model, a, h: method.backward(model.losses(h), shared=model.encoder(), engine="gramian"),
    "accumulate": lambda method, model, a, h: accumulated(method, model, h),
}


def accumulated(method, model, h):
    accumulator = method.accumulate(shared=model.encoder())
    accumulator.add(model.losses(h))
    return accumulator.backward()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [fastmtl.AlignedMTL, fastmtl.MGDA, lambda: fastmtl.MGDA(normalization="loss")])
def test_parameters(model, way, make):
    G = rows_of(model.encoder(), model.losses(model()[1]))
    info = WAYS[way](make(), model, *model())
    assert relative(info.gram.cpu(), G @ G.T) <= 1e-9
    expected = svd_align(G) if isinstance(make(), fastmtl.AlignedMTL) else info.alpha.cpu() @ G
    assert relative(got(model.encoder()), expected) <= 1e-9
    for p in model.parameters():
        assert p.grad.device == p.device
    own = flat([p.grad.cpu() for p in model.heads.parameters()])
    model.zero_grad()
    sum(model.losses(model()[1])).backward()
    assert relative(own, got(model.heads.parameters())) <= 1e-12


def test_groups_that_span_devices(model):
    groups = [[*model.bottom.parameters(), model.top[0].weight], [model.top[0].bias]]
    expected = []
    for group in groups:
        expected.append(svd_align(rows_of(group, model.losses(model()[1]))))
    info = fastmtl.AlignedMTL().backward(model.losses(model()[1]), groups=groups)
    assert info.alpha.shape == (2, T)
    assert relative(got([p for group in groups for p in group]), torch.cat(expected)) <= 1e-9


@pytest.mark.parametrize("way", ["representation", "fan_out"])
def test_a_representation_on_both(model, way):
    """The outputs of two stages, which heads read together."""
    method = fastmtl.AlignedMTL()

    def losses(structures):
        return [
            10.0**t * ((model.heads[t](h) - model.y[t].to(h)).square().mean() + a.to(h.device).sin().mean() * t)
            for t, (a, h) in enumerate(structures)
        ]

    a = model.bottom(model.x.to(model.first))
    b = model.top(model.bottom(model.x.to(model.first)).to(model.second))
    Z = rows_of([a, b], losses([(a, b)] * T))
    z = [part.view_as(x).to(x) for part, x in zip(svd_align(Z).split([a.numel(), b.numel()]), (a, b), strict=True)]
    expected = flat([g.cpu() for g in torch.autograd.grad([a, b], model.encoder(), z)])
    a = model.bottom(model.x.to(model.first))
    b = model.top(model.bottom(model.x.to(model.first)).to(model.second))
    if way == "fan_out":
        hs = fastmtl.fan_out((a, b), T, method)
        hs.total(losses(hs)).backward()
    else:
        method.backward(losses([(a, b)] * T), representation=(a, b))
    assert relative(got(model.encoder()), expected) <= 1e-9


def test_between_solutions(model):
    method = fastmtl.NashMTL(max_norm=0.1)
    first = method.backward(model.losses(model()[1]), shared=model.encoder(), every=2)
    model.zero_grad()
    G = rows_of(model.encoder(), model.losses(model()[1]))
    assert method.backward(model.losses(model()[1]), shared=model.encoder(), every=2).age == 1
    g = (first.alpha if first.lasting is None else first.lasting).cpu() @ G
    assert relative(got(model.encoder()), g * (0.1 / g.norm().clamp_min(0.1))) <= 1e-9


def test_rows_given_by_hand_and_what_needs_more_than_their_products(model):
    rows = [torch.autograd.grad(loss, model.encoder(), retain_graph=True) for loss in model.losses(model()[1])]
    results = fastmtl.AlignedMTL()(rows)
    assert [g.device for g in results] == [p.device for p in model.encoder()]
    assert (
        relative(flat([g.cpu() for g in results]), svd_align(torch.stack([flat([g.cpu() for g in r]) for r in rows])))
        <= 1e-9
    )
    with pytest.raises(ValueError, match=r"rows: expected gradients on one device for GradDrop\(.*got them on"):
        fastmtl.GradDrop().backward(model.losses(model()[1]), shared=model.encoder())
    assert all(p.grad is None for p in model.parameters())
