"""`attach`: a fan-out between an encoder and heads that stay as they are."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from helpers import flat, randn, relative, svd_align
from models import MLP, MTAN, encoder_gradients, losses_of, shortest, upper_bound
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import fastmtl
from fastmtl import AlignedMTL, attach, fan_out, once

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


@pytest.mark.parametrize("other", ["encoder", "heads", "both"])
def test_attaching_twice_raises(other):
    model, spare = MLP(2), MLP(2)
    handle = attach(model.encoder, model.heads, AlignedMTL())
    encoder = spare.encoder if other == "heads" else model.encoder
    heads = spare.heads if other == "encoder" else model.heads
    name = r"heads\[0\]" if other == "heads" else "encoder"
    with pytest.raises(ValueError, match=rf"{name}: expected a module with nothing attached; call remove\(\)"):
        attach(encoder, heads, AlignedMTL())
    loop(model)
    assert handle.info.rank == 2
    handle.remove()
    attach(encoder, heads, AlignedMTL())


def test_encoders_within_heads():
    """Two groups of tasks: a head of the outer attachment is the encoder of an inner one."""
    model, trunks = MLP(4), nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
    fanned = copy.deepcopy(model), copy.deepcopy(trunks)
    attach(model.encoder, trunks, AlignedMTL())
    for g, trunk in enumerate(trunks):
        attach(trunk, model.heads[2 * g : 2 * g + 2], AlignedMTL())
    h = model.encoder(model.x)
    inner = [trunk(h) for trunk in trunks]
    sum(model.loss(t, inner[t // 2]) for t in range(4)).backward()
    other, trunks = fanned
    outer = fan_out(other.encoder(other.x), 2, AlignedMTL())
    inner = [fan_out(trunk(h), 2, AlignedMTL()) for trunk, h in zip(trunks, outer, strict=True)]
    sum(other.loss(t, inner[t // 2][t % 2]) for t in range(4)).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("form", [dict, nn.ModuleDict, list, tuple, iter], ids=lambda form: form.__name__)
def test_forms_of_the_heads(form):
    model, plain = MLP(3), MLP(3)
    named = {"seg": model.heads[0], "depth": model.heads[1], "normal": model.heads[2]}
    heads = form(named) if form in (dict, nn.ModuleDict) else form(named.values())
    handle = attach(model.encoder, heads, AlignedMTL(weights=[1.0, 2.0, 3.0]))
    loop(model)
    expected = attach(plain.encoder, plain.heads, AlignedMTL(weights=[1.0, 2.0, 3.0]))
    loop(plain)
    assert torch.equal(handle.info.alpha, expected.info.alpha)
    if form in (dict, nn.ModuleDict):
        model.encoder(model.x)
        with pytest.raises(RuntimeError, match=r"attach: heads\['depth'\] was called with no tensor"):
            model.heads[1](randn(8, 6).requires_grad_())


@pytest.mark.parametrize(
    ("heads", "kind", "match"),
    [
        (nn.Linear(6, 1), TypeError, "heads: expected T modules, one a task, got Linear"),
        ([nn.Linear(6, 1), "head"], TypeError, r"heads\[1\]: expected an nn.Module, got str"),
        ({"seg": None}, TypeError, r"heads\['seg'\]: expected an nn.Module, got NoneType"),
        ({}, ValueError, "heads: expected at least one module"),
    ],
)
def test_heads_that_are_none(heads, kind, match):
    encoder = nn.Linear(5, 6)
    with pytest.raises(kind, match=match):
        attach(encoder, heads, AlignedMTL())
    assert not any(hooks_of(encoder))


def test_as_a_context_manager():
    model, plain = MLP(3), MLP(3)
    before = [hooks_of(module) for module in (model.encoder, *model.heads)]
    with attach(model.encoder, model.heads, AlignedMTL()) as handle:
        loop(model)
        assert handle.info.rank == 3
    assert [hooks_of(module) for module in (model.encoder, *model.heads)] == before
    with pytest.raises(KeyError), attach(model.encoder, model.heads, AlignedMTL()):
        raise KeyError
    assert [hooks_of(module) for module in (model.encoder, *model.heads)] == before
    model.zero_grad()
    loop(model)
    loop(plain)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


# ------------------------------------------------------------------------------------------------ copies


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "averaged": lambda model: AveragedModel(model).module,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "saved": saved,
}


@pytest.mark.parametrize("after", ["attach", "forward", "backward"])
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_an_ordinary_model(name, after):
    model, plain = MLP(3), MLP(3)
    handle = attach(model.encoder, model.heads, AlignedMTL())
    h = model.encoder(model.x) if after != "attach" else None
    if after == "backward":
        sum(losses_of(model, h)).backward(retain_graph=True)
    other = COPIES[name](model)
    other.zero_grad()
    with torch.no_grad():
        losses_of(other, other.encoder(other.x))
    losses_of(other.eval(), other.encoder(other.x))
    other.train()
    with pytest.warns(UserWarning, match="attach: this Sequential is a copy .* nothing is attached to the copy"):
        loop(other)
    loop(other)  # it is said once
    other.zero_grad()
    loop(other)
    loop(plain)
    for p, q in zip(other.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    again = attach(other.encoder, other.heads, AlignedMTL())  # or it is aligned on its own
    other.zero_grad()
    loop(other)
    assert again.info.rank == 3
    again.remove()
    model.zero_grad()
    loop(model)
    assert handle.info.rank == 3
    handle.remove()
    loop(other)


@pytest.mark.parametrize("order", ["before the heads", "before the backward"])
def test_a_teacher_in_between(order):
    """An averaged copy that is called within the student's step, as for self-distillation."""
    model, alone = MLP(3), MLP(3)
    handle = attach(model.encoder, model.heads, AlignedMTL())
    teacher = AveragedModel(model)
    h = model.encoder(model.x)

    def teach():
        with torch.no_grad():
            losses_of(teacher.module, teacher.module.encoder(model.x))

    if order == "before the heads":
        teach()
    losses = losses_of(model, h)
    teach()
    handle.total(losses).backward()
    teacher.update_parameters(model)
    attach(alone.encoder, alone.heads, AlignedMTL())
    loop(alone)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


class Holder(nn.Module):
    """A module that keeps the handle."""

    def __init__(self):
        super().__init__()
        self.model = MLP(2)
        self.handle = attach(self.model.encoder, self.model.heads, AlignedMTL())


def test_a_copy_of_the_handle_holds_nothing():
    module = Holder()
    loop(module.model)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.handle.info is other.handle.gradients is None
        with pytest.raises(RuntimeError, match="encoder has not been called"):
            other.handle.total([])
        other.handle.remove()
        with pytest.warns(UserWarning, match="nothing is attached to the copy"):
            loop(other.model)
        once.forget()
    assert module.handle.info.rank == 2


def test_state_dicts_are_those_of_the_model():
    model, other = MLP(3), MLP(3)
    attach(model.encoder, model.heads, AlignedMTL())
    loop(model)
    other.load_state_dict(model.state_dict())
    model.load_state_dict(other.state_dict())


# ------------------------------------------------------------------------------------------------ several forwards


def test_an_evaluation_in_between():
    """Without gradients, by the very modules: what is under way is not disturbed."""
    model, alone = MLP(3), MLP(3)
    handle = attach(model.encoder, model.heads, AlignedMTL())
    h = model.encoder(model.x)
    first = model.loss(0, h)
    with torch.no_grad():
        losses_of(model, model.encoder(model.x * 2))
        other = model.encoder(model.x * 3)
    assert model.loss(1, other).requires_grad  # a head trained on what has no graph
    handle.total([first, model.loss(1, h), model.loss(2, h)]).backward()
    attach(alone.encoder, alone.heads, AlignedMTL())
    loop(alone)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    info = handle.info
    with torch.no_grad():
        losses_of(model, model.encoder(model.x))
    assert handle.info is info


def test_two_forwards_and_one_backward():
    """Micro-batches whose losses are summed: each is aligned on its own, as in accumulation."""
    model, alone = MLP(3), MLP(3)
    handle = attach(model.encoder, model.heads, AlignedMTL())
    totals = []
    for factor in (1.0, 2.0):
        h = model.encoder(model.x * factor)
        totals.append(handle.total(losses_of(model, h)))
    sum(totals).backward()
    for factor in (1.0, 2.0):
        hs = fan_out(alone.encoder(alone.x * factor), 3, AlignedMTL())
        hs.total([alone.loss(t, hs[t]) for t in range(3)]).backward()
    assert torch.equal(handle.info.gram, hs.info.gram)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert relative(p.grad, q.grad.double()) <= 1e-6


def test_what_is_done_to_the_output_in_place():
    """The fan-out is made of what the first head is called with."""
    model, alone = MLP(3), MLP(3)
    model.encoder, alone.encoder = model.encoder[:3], alone.encoder[:3]
    handle = attach(model.encoder, model.heads, AlignedMTL())
    h = model.encoder(model.x)
    F.relu_(h)
    handle.total(losses_of(model, h)).backward()
    hs = fan_out(alone.encoder(alone.x).relu(), 3, AlignedMTL())
    hs.total([alone.loss(t, hs[t]) for t in range(3)]).backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


# ------------------------------------------------------------------------------------------------ checkpoints


def aligned():
    model = MLP(3)
    attach(model.encoder, model.heads, AlignedMTL())
    loop(model)
    return model


def same(model, other):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert relative(p.grad, q.grad.double()) <= 1e-6


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_encoder(reentrant, early_stop):
    """It runs the encoder again in the backward, hooks and all."""
    model, expected = MLP(3), aligned()
    handle = attach(model.encoder, model.heads, AlignedMTL())
    for _ in range(2):
        model.zero_grad()
        with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
            h = checkpoint(model.encoder, model.x.clone().requires_grad_(), use_reentrant=reentrant)
        handle.total(losses_of(model, h)).backward()
        same(model, expected)
        assert handle.info.rank == 3


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_whole_model(reentrant, early_stop):
    model, expected = MLP(3), aligned()
    handle = attach(model.encoder, model.heads, AlignedMTL())

    def everything(x):
        h = model.encoder(x)
        return torch.stack([model.loss(t, h) for t in range(3)])

    for step in range(2):
        model.zero_grad()
        with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
            losses = checkpoint(everything, model.x.clone().requires_grad_(), use_reentrant=reentrant)
        (losses * torch.tensor([1.0, 1.0, 1.0])).sum().backward()
        same(model, expected)
        assert handle.info.rank == 3, step


def test_a_checkpoint_around_a_head():
    model, expected = MLP(3), aligned()
    handle = attach(model.encoder, model.heads, AlignedMTL())
    h = model.encoder(model.x)
    handle.total([checkpoint(model.loss, t, h, use_reentrant=False) for t in range(3)]).backward()
    same(model, expected)
    h = model.encoder(model.x)
    losses = [checkpoint(model.loss, t, h, use_reentrant=True) for t in range(3)]
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"attach: heads\[2\] .* needs use_reentrant=False"):
        sum(losses).backward()
    assert all(p.grad is None for p in model.encoder.parameters())


@pytest.fixture
def no_compiled_code():
    """Nothing compiled before or within a test is met again: what a graph may free is decided at its first backward."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "parts"])
def test_compiled(whole, no_compiled_code):
    """The hooks run between compiled graphs."""
    expected, model = aligned(), MLP(3)
    handle = attach(model.encoder, model.heads, AlignedMTL())
    if not whole:
        for part in (model.encoder, *model.heads):
            part.compile(backend="aot_eager")

    def forward():
        return losses_of(model, model.encoder(model.x))

    run = torch.compile(forward, backend="aot_eager") if whole else forward
    for _ in range(2):
        model.zero_grad()
        handle.total(run()).backward()
        same(model, expected)
        assert handle.info.rank == 3
