"""`attach`: a fan-out between an encoder and heads that stay as they are."""

import gc
import weakref

import pytest
import torch
from helpers import flat, randn, relative, svd_align
from models import MLP, MTAN, encoder_gradients, losses_of, shortest, upper_bound
from torch import nn

import fastmtl
from fastmtl import AlignedMTL, attach, fan_out

METHODS = {"aligned": (AlignedMTL(), svd_align), "mgda": (fastmtl.MGDA(), shortest)}
MODELS = {"mlp": lambda: MLP(3), "mtan": lambda: MTAN(3)}


def loop(model):
    """The user's training step, which knows nothing of fastmtl."""
    h = model.encoder(model.x)
    sum(losses_of(model, h)).backward()


def hooks_of(module):
    return [
        len(hooks)
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._forward_pre_hooks_with_kwargs,
            module._forward_hooks_with_kwargs,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    ]


class Named(nn.Module):
    """A head that takes its input by name, among others."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 1)

    def forward(self, scale, *, features, mask=None):
        h = features["h"] if isinstance(features, dict) else features
        return scale * self.out(h).squeeze(-1) * (1 if mask is None else mask)


class Pyramid(nn.Module):
    """An encoder with a structured output: an integer, two maps, one within a dict."""

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Linear(5, 6), nn.Linear(5, 6)

    def forward(self, x):
        return {"size": 6, "maps": [self.low(x).tanh(), {"h": self.high(x).sin()}]}


# ------------------------------------------------------------------------------------------------ the result


@pytest.mark.parametrize("via", ["node", "hooks"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_equals_a_model_edited_for_fan_out(name, method, via):
    model, edited = MODELS[name](), MODELS[name]()
    method, reference = METHODS[method]
    handle = attach(model.encoder, model.heads, method, via=via)
    loop(model)
    hs = fan_out(edited.encoder(edited.x), 3, method, via=via)
    sum(edited.loss(t, h) for t, h in enumerate(hs)).backward()
    for p, q in zip(model.parameters(), edited.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert torch.equal(handle.info.alpha, hs.info.alpha)
    assert torch.equal(handle.info.gram, hs.info.gram)
    for a, b in zip(handle.gradients, hs.gradients, strict=True):
        for g, e in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (a, b)), strict=True):
            assert torch.equal(g, e)
    assert relative(flat(encoder_gradients(model)), flat(upper_bound(MODELS[name](), reference))) <= 1e-5


def test_the_forward_is_the_same():
    model = MTAN()
    plain = [head(model.encoder(model.x)) for head in model.heads]
    attach(model.encoder, model.heads, AlignedMTL())
    h = model.encoder(model.x)
    for head, expected in zip(model.heads, plain, strict=True):
        assert torch.equal(head(h), expected)


def test_info_and_gradients_are_those_of_the_last_forward():
    model = MLP(3)
    handle = attach(model.encoder, model.heads, AlignedMTL())
    assert handle.info is None
    assert handle.gradients is None
    loop(model)
    first = handle.info
    assert first.rank == 3
    model.x = model.x * 2
    h = model.encoder(model.x)
    assert handle.info is None
    sum(losses_of(model, h)).backward()
    assert not torch.equal(handle.info.gram, first.gram)
    buffers = fastmtl.Info(3)
    handle.remove()
    handle = attach(model.encoder, model.heads, AlignedMTL(), info=buffers)
    loop(model)
    assert handle.info is buffers
    assert buffers.rank == 3


def test_total_is_the_sum():
    model = MLP(3)
    handle = attach(model.encoder, model.heads, AlignedMTL())
    with pytest.raises(RuntimeError, match="encoder has not been called"):
        handle.total([])
    losses = losses_of(model, model.encoder(model.x))
    assert torch.equal(handle.total(losses), sum(losses))


def test_a_training_run():
    model = MLP(3)
    attach(model.encoder, model.heads, AlignedMTL())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = losses_of(model, model.encoder(model.x))
    for _ in range(60):
        optimizer.zero_grad()
        loop(model)
        optimizer.step()
    for now, then in zip(losses_of(model, model.encoder(model.x)), before, strict=True):
        assert now < then


# ------------------------------------------------------------------------------------------------ how heads are called


@pytest.mark.parametrize("wrap", [lambda h: h, lambda h: {"h": h}], ids=["tensor", "dict"])
def test_a_head_given_keyword_arguments(wrap):
    encoder, heads = nn.Linear(5, 6), [Named(), Named()]
    x, mask = randn(4, 5), torch.tensor([1, 0, 1, 1])
    parameters = list(encoder.parameters())

    def losses(aliases):
        return [
            head(2.0 + t, features=wrap(h), mask=mask).sin().sum()
            for t, (head, h) in enumerate(zip(heads, aliases, strict=True))
        ]

    expected = torch.autograd.grad(sum(losses(fan_out(encoder(x), 2, AlignedMTL()))), parameters)
    handle = attach(encoder, heads, AlignedMTL())
    h = encoder(x)
    sum(losses([h, h])).backward()
    for p, g in zip(parameters, expected, strict=True):
        assert torch.equal(p.grad, g)
    assert handle.info.rank == 2


def test_a_head_fed_by_a_part_of_a_structured_output():
    encoder, heads = Pyramid(), [nn.Linear(6, 1), Named(), nn.Linear(6, 1)]
    x = randn(4, 5)
    parameters = list(encoder.parameters())

    def losses(a, b, c):
        first = heads[0](a["maps"][0]).square().sum()
        second = heads[1](3.0, features=b["maps"][1]).sum()
        third = (heads[2](c["maps"][0]) * heads[2](c["maps"][1]["h"])).sum()
        return first + second + third

    expected = torch.autograd.grad(losses(*fan_out(encoder(x), 3, AlignedMTL())), parameters)
    handle = attach(encoder, heads, AlignedMTL())
    h = encoder(x)
    losses(h, h, h).backward()
    for p, g in zip(parameters, expected, strict=True):
        assert torch.equal(p.grad, g)
    assert handle.gradients[0]["maps"][1]["h"] is None
    assert handle.gradients[2]["maps"][1]["h"] is not None
    assert handle.gradients[0]["size"] == 6


def test_other_arguments_of_a_head_are_the_very_objects():
    class Head(nn.Module):
        def forward(self, h, cache, *, state):
            cache["seen"] = h.detach()
            state.append(len(h))
            return h.sum()

    encoder, head = nn.Linear(5, 6), Head()
    attach(encoder, [head], AlignedMTL())
    cache, state = {"other": torch.ones(2)}, []
    h = encoder(randn(4, 5))
    head(h, cache, state=state)
    assert torch.equal(cache["seen"], h)
    assert state == [4]


def test_a_head_that_is_not_called_is_a_zero_row():
    model = MLP(3)
    handle = attach(model.encoder, model.heads, AlignedMTL())
    h = model.encoder(model.x)
    handle.total([model.loss(0, h), None, model.loss(2, h)]).backward()
    assert handle.info.rank == 2
    assert handle.info.alpha[1] == 0
    assert handle.gradients[1] is None


def test_a_head_called_twice_is_summed():
    model, once = MLP(2), MLP(2)
    attach(model.encoder, model.heads, AlignedMTL())
    h = model.encoder(model.x)
    sum(losses_of(model, h) + losses_of(model, h)).backward()
    attach(once.encoder, once.heads, AlignedMTL())
    sum(2 * loss for loss in losses_of(once, once.encoder(once.x))).backward()
    for p, q in zip(model.parameters(), once.parameters(), strict=True):
        assert relative(p.grad, q.grad.double()) <= 1e-6


def test_evaluation():
    model = MLP(3)
    with torch.no_grad():
        expected = losses_of(model, model.encoder(model.x))
    handle = attach(model.encoder, model.heads, AlignedMTL())
    model.eval()
    with torch.no_grad():
        h = model.encoder(model.x)
        losses = losses_of(model, h)
    for loss, e in zip(losses, expected, strict=True):
        assert torch.equal(loss, e)
        assert not loss.requires_grad
    assert handle.info is None
    model.train()
    loop(model)
    assert handle.info.rank == 3


def test_a_frozen_encoder_is_passed_by():
    model = MLP(3)
    model.encoder.requires_grad_(False)
    handle = attach(model.encoder, model.heads, AlignedMTL())
    loop(model)
    assert handle.info is None
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.heads.parameters())


# ------------------------------------------------------------------------------------------------ remove


def test_remove_leaves_no_trace():
    model, plain = MLP(3), MLP(3)
    modules = [model.encoder, *model.heads]
    before = [hooks_of(module) for module in modules]
    state = set(model.state_dict())
    handle = attach(model.encoder, model.heads, AlignedMTL())
    assert [hooks_of(module) for module in modules] != before
    assert set(model.state_dict()) == state
    loop(model)
    handle.remove()
    handle.remove()
    assert [hooks_of(module) for module in modules] == before
    assert handle.info is None
    assert handle.gradients is None
    with pytest.raises(RuntimeError, match="encoder has not been called"):
        handle.total([])
    model.zero_grad()
    loop(model)
    loop(plain)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_outputs_and_inputs_are_the_very_objects_again_after_remove():
    h = randn(3, 6).requires_grad_() * 1

    class Constant(nn.Module):
        def forward(self):
            return [h]

    seen = []

    class Look(nn.Module):
        def forward(self, maps):
            seen.append(maps)
            return maps[0].sum()

    encoder, head = Constant(), Look()
    handle = attach(encoder, [head], AlignedMTL())
    output = encoder()
    assert output[0] is h  # the encoder's caller gets what the encoder returned: only heads get an alias
    head(output)
    assert seen[0][0] is not h
    handle.remove()
    output = encoder()
    head(output)
    assert seen[1] is output
    assert seen[1][0] is h


def test_other_hooks_survive_remove():
    model = MLP(2)
    calls = []
    model.heads[0].register_forward_pre_hook(lambda *_: calls.append("head"))
    handle = attach(model.encoder, model.heads, AlignedMTL())
    model.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    loop(model)
    handle.remove()
    loop(model)
    assert calls == ["encoder", "head"] * 2


@pytest.mark.parametrize("via", ["node", "hooks"])
def test_remove_keeps_no_tensor_alive(via):
    model = MTAN()
    handle = attach(model.encoder, model.heads, AlignedMTL(), via=via)
    gc.collect()
    gc.disable()
    try:
        h = model.encoder(model.x)
        losses = losses_of(model, h)
        sum(losses).backward(retain_graph=True)
        kept = [weakref.ref(h[0]), weakref.ref(handle._last.fan._capture), weakref.ref(handle.gradients[0][0])]
        del h, losses
        assert all(ref() is not None for ref in kept)  # until the next forward, or
        handle.remove()
        assert [ref() for ref in kept] == [None] * 3
    finally:
        gc.enable()


def test_the_next_forward_lets_go_of_the_last():
    model = MLP(2)
    handle = attach(model.encoder, model.heads, AlignedMTL())
    h = model.encoder(model.x)
    sum(losses_of(model, h)).backward()
    info, kept = handle.info, weakref.ref(handle._last)
    with torch.no_grad():
        model.encoder(model.x)
    assert handle.info is info  # an evaluation does not
    model.encoder(model.x)
    assert kept() is None


def test_attaching_again_after_remove():
    model, once = MLP(3), MLP(3)
    attach(model.encoder, model.heads, fastmtl.MGDA()).remove()
    attach(model.encoder, model.heads, AlignedMTL())
    attach(once.encoder, once.heads, AlignedMTL())
    loop(model)
    loop(once)
    for p, q in zip(model.parameters(), once.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


# ------------------------------------------------------------------------------------------------ what cannot work


@pytest.mark.parametrize(
    "between",
    [torch.tanh, torch.detach, torch.clone, lambda h: h[:4], lambda h: h.view_as(h), lambda h: 3.0],
    ids=["tanh", "detach", "clone", "part", "view", "no tensor"],
)
def test_something_between_encoder_and_head_raises(between):
    model = MLP(2)
    attach(model.encoder, model.heads, AlignedMTL())
    h = model.encoder(model.x)
    model.heads[0](h)
    with pytest.raises(RuntimeError, match=r"attach: heads\[1\].*no tensor of the encoder's last output"):
        model.heads[1](between(h))


def test_a_head_before_the_encoder_raises():
    model = MLP(2)
    h = model.encoder(model.x)
    attach(model.encoder, model.heads, AlignedMTL())
    with pytest.raises(RuntimeError, match=r"attach: heads\[1\] was called before the encoder"):
        model.heads[1](h)


def test_the_output_of_an_earlier_forward_raises():
    model = MLP(2)
    attach(model.encoder, model.heads, AlignedMTL())
    h = model.encoder(model.x)
    model.encoder(model.x)
    with pytest.raises(RuntimeError, match="no tensor of the encoder's last output"):
        model.heads[0](h)


def test_a_failed_attach_leaves_no_hook():
    model = MLP(2)
    modules = [model.encoder, *model.heads]
    before = [hooks_of(module) for module in modules]
    for heads, method in (
        ([model.heads[0], "head"], AlignedMTL()),
        ([model.heads[0], model.heads[0]], AlignedMTL()),
        (model.heads, "aligned"),
        (model.heads, AlignedMTL(weights=[1.0, 2.0, 3.0])),
    ):
        with pytest.raises((TypeError, ValueError)):
            attach(model.encoder, heads, method)
    assert [hooks_of(module) for module in modules] == before
