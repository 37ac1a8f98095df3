"""Use that goes by `fan_out`, `attach` or `representation=` raises or warns, once; right use does neither."""

import copy
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import F64, randn, relative, svd_align
from models import MLP, MTAN, losses_of
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastmtl
from fastmtl import AlignedMTL, attach, fan_out
from fastmtl.training.running import running_call

both = pytest.mark.parametrize("via", ["node", "hooks"])


def losses_from(model, read):
    """Task t's loss where its head reads `read(t)`."""
    return [model.loss(t, read(t)) for t in range(len(model.heads))]


# name: (tasks for three heads, what head t reads of h and its aliases, what the warnings name). The first three are
# also an error or a warning of `total`, before any backward.
MISUSES = {
    "more tasks than heads": (5, lambda t, h, hs: hs[t], [r"hs\[3\], hs\[4\] of 5 aliases have got no gradient"]),
    "every head reads the same alias": (3, lambda t, h, hs: hs[0], [r"hs\[1\], hs\[2\] of 3 aliases have got no"]),
    "every head reads h": (3, lambda t, h, hs: h, [r"the heads read h itself"]),
    "one head reads h": (
        3,
        lambda t, h, hs: hs[t] if t else h,
        [r"hs\[0\] of 3 aliases has got no gradient", r"beside the aliases hs\[0\] ... hs\[2\]"],
    ),
    "a head reads h beside its alias": (
        3,
        lambda t, h, hs: (h + hs[t]) / 2 if t == 1 else hs[t],
        [r"beside the aliases hs\[0\] ... hs\[2\]"],
    ),
}


def recorded(step, times=4):
    """The texts of the warnings of so many calls at one place, under the filter that lets all through."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            step()
    mine = [w for w in caught if str(w.message).startswith(("fan_out:", "attach:", "representation:", "backward:"))]
    assert all(w.category is UserWarning and w.filename == __file__ for w in mine)
    return [str(w.message) for w in mine]


@both
@pytest.mark.parametrize("name", MISUSES)
def test_a_plain_sum_warns_once_and_names_the_alias(name, via):
    tasks, read, expected = MISUSES[name]
    model = MLP(3)

    def step():
        h = model.encoder(model.x)
        hs = fan_out(h, tasks, AlignedMTL(), via=via)
        sum(losses_from(model, lambda t: read(t, h, hs))).backward()

    got = recorded(step)
    assert len(got) == len(expected)
    for pattern in expected:
        assert sum(bool(re.search(pattern, text)) for text in got) == 1


@both
@pytest.mark.parametrize("name", MISUSES)
def test_total_says_it_before_the_backward(name, via):
    tasks, read, _ = MISUSES[name]
    model = MLP(3)

    def step():
        h = model.encoder(model.x)
        hs = fan_out(h, tasks, AlignedMTL(), via=via)
        hs.total(losses_from(model, lambda t: read(t, h, hs)))

    if name == "more tasks than heads":
        with pytest.raises(ValueError, match=r"losses: expected 5, one for each task .*, got 3"):
            step()
        return
    got = recorded(step)
    assert got
    if name == "every head reads the same alias":
        assert re.search(r"losses\[1\] depends on hs\[0\] and not on its alias hs\[1\]", got[0])
        assert re.search(r"losses\[2\] depends on hs\[0\] and not on its alias hs\[2\]", got[1])
    else:
        beside = r" depends on h, .* beside the aliases"
        patterns = {"every head reads h": r"the heads read h itself", "one head reads h": r"losses\[0\]" + beside}
        pattern = patterns.get(name, r"losses\[1\]" + beside)
        assert sum(bool(re.search(pattern, text)) for text in got) == 1


FORGOTTEN = {
    "plain sum": lambda hs, losses: sum(losses),
    "total": lambda hs, losses: hs.total(losses),
    "total without a task": lambda hs, losses: hs.total([losses[0], None, losses[2]]),
}


@both
@pytest.mark.parametrize("name", FORGOTTEN)
def test_forgotten_aliases_are_one_warning_with_the_way_out(name, via):
    """Whatever sums the losses, before the backward and in it; and the advice is right."""
    model = MLP(3)

    def step(read=lambda t, h, hs: h):
        h = model.encoder(model.x)
        hs = fan_out(h, 3, AlignedMTL(), via=via)
        FORGOTTEN[name](hs, losses_from(model, lambda t: read(t, h, hs))).backward()

    (text,) = recorded(step)
    assert text == (
        "fan_out: the heads read h itself, or another tensor, not hs[0] ... hs[2], so nothing is aligned. Call "
        "heads[t](hs[t])"
    )
    assert not recorded(lambda: step(lambda t, h, hs: hs[t]))


@both
def test_two_heads_that_read_h_are_named_together(via):
    """Before the backward and in it."""
    model = MLP(3)

    def step():
        h = model.encoder(model.x)
        hs = fan_out(h, 3, AlignedMTL(), via=via)
        hs.total(losses_from(model, lambda t: h if t else hs[0])).backward()

    missing, beside = recorded(step)
    assert missing.startswith("fan_out: hs[1], hs[2] of 3 aliases have got no gradient. Head t has to read hs[t]: a ")
    assert "a gradient that reaches h another way is only added, not aligned" in missing
    assert missing.endswith("pass None to hs.total for that task and add its loss to what total returns")
    assert "losses[1], losses[2] depend on h" in beside


@both
def test_heads_that_read_each_others_aliases(via):
    model = MLP(2)

    def step():
        hs = fan_out(model.encoder(model.x), 2, AlignedMTL(weights=[1.0, 2.0]), via=via)
        hs.total(losses_from(model, lambda t: hs[1 - t]))

    first, second = recorded(step)
    assert re.search(r"losses\[0\] depends on hs\[1\] and not on its alias hs\[0\]", first)
    assert re.search(r"losses\[1\] depends on hs\[0\] and not on its alias hs\[1\]", second)


MEANS = {
    "stack": lambda losses: torch.stack(losses).mean(),
    "cat": lambda losses: torch.cat([loss[None] for loss in losses]).mean(0),
    "scaled": lambda losses: torch.stack(losses).mean() * torch.tensor(1024.0),
    "accumulated": lambda losses: torch.stack(losses).mean() / 4,
}


@both
@pytest.mark.parametrize("name", MEANS)
def test_the_mean_of_the_losses(name, via):
    model = MLP(3)

    def step(total=MEANS[name]):
        hs = fan_out(model.encoder(model.x), 3, AlignedMTL(), via=via)
        total(losses_from(model, lambda t: hs[t])).backward()

    (text,) = recorded(step)
    assert text.startswith("fan_out: the 3 losses are averaged, not summed")
    assert not recorded(lambda: step(lambda losses: torch.stack(losses).sum() / 4))  # what accumulation does


def test_a_backward_is_found_from_another_thread():
    """Autograd runs what lies on a GPU in a thread of its own: the call waits in the one that made it."""
    found = []

    def look(_):
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(running_call).result())

    x = torch.ones(2, requires_grad=True)
    x.register_hook(look)
    losses = [x.sum(), x.square().sum()]
    mean = torch.stack(losses).mean()
    mean.backward()
    torch.autograd.grad(losses[0], x)
    assert [(name, roots[0] is root) for (name, roots), root in zip(found, (mean, losses[0]), strict=True)] == [
        ("backward", True),
        ("grad", True),
    ]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(running_call).result() is None


@both
def test_what_the_encoder_sends_heads_by_another_way(via):
    """Skip connections, as in a U-Net: most of a task's gradient may not pass through h."""
    model, skip = MLP(2), nn.Linear(7, 2)

    def losses_of_unet(first, hs):
        losses = losses_from(model, lambda t: hs[t])
        losses[1] = losses[1] + skip(first).square().mean()
        return losses

    def summed():
        first = model.encoder[:2](model.x)
        hs = fan_out(model.encoder[2:](first), 2, AlignedMTL(), via=via)
        sum(losses_of_unet(first, hs)).backward()

    def by_total():
        first = model.encoder[:2](model.x)
        hs = fan_out(model.encoder[2:](first), 2, AlignedMTL(), via=via)
        hs.total(losses_of_unet(first, hs)).backward()

    def with_both():
        first = model.encoder[:2](model.x)
        hs = fan_out([first, model.encoder[2:](first)], 2, AlignedMTL(), via=via)
        losses = losses_from(model, lambda t: hs[t][1])
        losses[1] = losses[1] + skip(hs[1][0]).square().mean()
        hs.total(losses).backward()

    (text,) = recorded(summed)
    assert "a loss depends on h, or on what h is made of, beside the aliases" in text
    (text,) = recorded(by_total)
    assert "losses[1] depends on h, or on what h is made of, beside the aliases" in text
    assert not recorded(with_both)


@both
def test_a_loop_in_which_tasks_come_and_go_is_not_flooded(via):
    model = MLP(5)
    draw = torch.Generator().manual_seed(0)

    def step():
        hs = fan_out(model.encoder(model.x), 5, AlignedMTL(), via=via)
        losses = losses_from(model, lambda t: hs[t])
        sum(losses[t] for t in torch.randperm(5, generator=draw)[:2].tolist()).backward()

    assert 1 <= len(recorded(step, times=60)) <= 4


@both
def test_as_errors_warnings_leave_the_encoder_as_it_was(via):
    model = MLP(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # each time
            hs = fan_out(model.encoder(model.x), 3, AlignedMTL(), via=via)
            loss = sum(losses_from(model, hs.__getitem__)[:2])
            with pytest.raises(UserWarning, match=r"hs\[2\] of 3"):
                loss.backward()
            assert all(p.grad is None for p in model.encoder.parameters())


# ------------------------------------------------------------------------------------------------ right use is silent


class Tied(nn.Module):
    """An embedding whose weight is also the output layer of both heads."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(randn(7, 5, seed=1))
        self.middle = nn.Linear(5, 5)

    def encode(self):
        return self.middle(self.table[torch.tensor([0, 2, 2, 6])]).tanh()

    def losses(self, aliases):
        return [(t + 1.0) * (h @ self.table.T).square().mean() for t, h in enumerate(aliases)]


def tied(total, via):
    model = Tied()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # whose casts of the table are shared
        hs = fan_out(model.encode(), 2, AlignedMTL(), via=via)
        losses = [loss.float() for loss in model.losses(hs)]
    total(hs, losses).backward()


def penalised(total, via):
    model = MLP(3)
    hs = fan_out(model.encoder(model.x), 3, AlignedMTL(), via=via)
    penalty = sum(p.square().sum() for p in model.encoder.parameters())
    (total(hs, losses_from(model, lambda t: hs[t])) + 1e-3 * penalty).backward()


def feature_maps(total, via):
    """The second map is made from the first: what that brings the first is no use of h beside its aliases."""
    model = MTAN()
    hs = fan_out(model.encoder(model.x), 3, AlignedMTL(), via=via)
    total(hs, losses_from(model, lambda t: hs[t])).backward()


def hooked(total, via):
    """A hook of the user changes what h gets; another looks at it; h keeps its gradient."""
    model = MLP(3)
    h = model.encoder(model.x)
    h.register_hook(lambda g: g / 2)
    h.retain_grad()
    hs = fan_out(h, 3, AlignedMTL(), via=via)
    h.register_hook(lambda g: g * 2)
    total(hs, losses_from(model, lambda t: hs[t])).backward()


def nested(total, via):
    model = MLP(4)
    outer = fan_out(model.encoder(model.x), 2, AlignedMTL(), via=via)
    inner = [fan_out(h * 2, 2, AlignedMTL(), via=via) for h in outer]
    sums = [total(hs, [model.loss(2 * g + t, hs[t]) for t in range(2)]) for g, hs in enumerate(inner)]
    total(outer, sums).backward()


def checkpointed(total, via):
    model = MLP(3)
    x = model.x.clone().requires_grad_()
    for reentrant in (True, False):
        hs = fan_out(checkpoint(model.encoder, x, use_reentrant=reentrant), 3, AlignedMTL(), via=via)
        total(hs, [checkpoint(model.loss, t, hs[t], use_reentrant=reentrant) for t in range(3)]).backward()


def repeated(total, via):
    """An alias that is used twice, two backwards over one graph, gradients of parameters by `autograd.grad`."""
    model = MLP(3)
    hs = fan_out(model.encoder(model.x), 3, AlignedMTL(), via=via)
    loss = total(hs, [model.loss(t, hs[t]) + hs[t].square().mean() for t in range(3)])
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward(inputs=list(model.encoder.parameters()), retain_graph=True)
    torch.autograd.grad(loss, list(model.encoder.parameters()))


def hooks_on_modules(total, via):
    class Model(MLP):
        def forward(self):
            h = self.encoder(self.x)
            hs = fan_out(h, 3, AlignedMTL(), via=via)
            return h, hs, *(head(a) for head, a in zip(self.heads, hs, strict=True))

    class Outputs(nn.Module):
        def forward(self, *tensors):
            return tensors

    model = Model(3)
    joined = Outputs()
    joined.register_full_backward_hook(lambda *_: None)  # one node for all that comes out
    h, hs, *outputs = model()
    h, *outputs = joined(h, *outputs)
    total(hs, [out.square().mean() for out in outputs]).backward()


def frozen_heads(total, via):
    model = MLP(3)
    model.heads[1].requires_grad_(False)
    hs = fan_out(model.encoder(model.x), 3, AlignedMTL(), via=via)
    total(hs, losses_from(model, lambda t: hs[t])).backward()


def helper(total, via):
    """A helper splits two tensors side by side, and then two of which one is made from the other."""
    x, first, second = randn(4, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def step(h):
        hs = fan_out(h, 2, AlignedMTL(), via=via)
        total(hs, [y.square().sum() + ((t + 1) * z).sum() for t, (y, z) in enumerate(hs)]).backward()

    step((first(x), second(x)))
    h = first(x)
    step((h, second(h)))


RIGHT = [tied, penalised, feature_maps, hooked, nested, checkpointed, repeated, hooks_on_modules, frozen_heads, helper]


@both
@pytest.mark.parametrize("said", [True, False], ids=["total", "sum"])
@pytest.mark.parametrize("use", RIGHT, ids=lambda use: use.__name__)
def test_right_use_is_silent(use, said, via):
    def total(hs, losses):
        return hs.total(losses) if said else sum(losses)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(total, via)


@both
def test_many_fan_outs_of_a_leaf_leave_nothing_on_it(via):
    weight = nn.Parameter(randn(5))
    for _ in range(3):
        hs = fan_out(weight, 2, AlignedMTL(), via=via)
        hs.total([hs[0].sum(), hs[1].square().sum()]).backward()
    assert not weight._backward_hooks


# ------------------------------------------------------------------------------------------------ total


def step_by(total, tasks=3, via="node", method=None):
    model = MLP(tasks)
    hs = fan_out(model.encoder(model.x), tasks, method or AlignedMTL(), via=via)
    loss = total(hs, losses_from(model, lambda t: hs[t]))
    loss.backward()
    return model, hs, loss.detach()


@both
@pytest.mark.parametrize("tasks", [1, 3, 20])
def test_total_is_the_sum(tasks, via):
    model, hs, loss = step_by(lambda hs, losses: hs.total(losses), tasks, via)
    other, plain, expected = step_by(lambda hs, losses: sum(losses), tasks, via)
    assert torch.equal(loss, expected)
    assert torch.equal(hs.info.alpha, plain.info.alpha)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize(
    "form", [tuple, torch.stack, lambda losses: [x.reshape(1, 1) for x in losses]], ids=["tuple", "tensor", "shaped"]
)
def test_forms_of_the_losses(form):
    model, _, _ = step_by(lambda hs, losses: hs.total(losses))
    other, _, loss = step_by(lambda hs, losses: hs.total(form(losses)))
    assert loss.shape == ()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


ABSENT = {
    "None": lambda loss: None,
    "a constant": lambda loss: loss.detach(),
    "a constant that is NaN": lambda loss: loss.detach() * torch.nan,
    "zero": lambda loss: torch.zeros(1),
}


@both
@pytest.mark.parametrize("absent", [[0], [1], [2], [0, 2]])
@pytest.mark.parametrize("name", ABSENT)
def test_an_absent_task(name, absent, via):
    """Whatever stands for its loss, the others are aggregated with a row of zeros, and its head is left alone."""
    model, hs, loss = step_by(
        lambda hs, losses: hs.total([ABSENT[name](x) if t in absent else x for t, x in enumerate(losses)]), via=via
    )
    assert loss.isfinite() == (name != "a constant that is NaN")
    plain = MLP(3)
    h = plain.encoder(plain.x)
    rows = [
        None if t in absent else [g]
        for t, g in enumerate(torch.autograd.grad(x, h, retain_graph=True)[0] for x in losses_of(plain, h))
    ]
    expected = torch.autograd.grad(h, list(plain.encoder.parameters()), AlignedMTL()(rows))
    for p, g in zip(model.encoder.parameters(), expected, strict=True):
        assert relative(p.grad, g.to(F64)) <= 1e-6
    for t, head in enumerate(model.heads):
        assert all((p.grad is None) == (t in absent) for p in head.parameters())
        assert (hs.info.alpha[t] == 0) == (t in absent)


def test_an_absent_task_of_a_method_that_needs_the_losses():
    method = fastmtl.MGDA(normalization="loss+")
    for nothing in (None, torch.tensor(torch.nan)):
        _, hs, _ = step_by(lambda hs, losses, x=nothing: hs.total([losses[0], x, losses[2]]), method=method)
        assert hs.info.alpha.isfinite().all()
        assert hs.info.alpha[1] == 0
    model = MLP(3)
    hs = fan_out(model.encoder(model.x), 3, fastmtl.MGDA(normalization="loss"))
    with pytest.raises(RuntimeError, match=r"needs the losses: sum them by the fan-out's total"):
        sum(losses_from(model, lambda t: hs[t])).backward()


@pytest.mark.parametrize(
    ("losses", "kind", "match"),
    [
        (lambda losses: losses[:2], ValueError, r"losses: expected 3, one for each task .*None.* got 2"),
        (lambda losses: [*losses, losses[0]], ValueError, r"losses: expected 3, .* got 4"),
        (lambda losses: [], ValueError, r"losses: expected at least one loss \(T >= 1\)"),
        (lambda losses: [None] * 3, ValueError, r"losses: expected at least one loss that requires grad, got none"),
        (lambda losses: [x.detach() for x in losses], ValueError, r"losses: expected at least one loss that requires"),
        (
            lambda losses: [losses[0], 0.0, losses[2]],
            TypeError,
            r"losses\[1\]: expected a floating scalar tensor, or None",
        ),
        (lambda losses: [losses[0], losses[1].expand(2), losses[2]], ValueError, r"losses\[1\]: expected a scalar"),
        (lambda losses: iter(losses), TypeError, r"losses: expected a sequence of T scalar tensors"),
        (lambda losses: losses[0], ValueError, r"losses: expected T scalars or a tensor of shape \[T\]"),
        (lambda losses: torch.stack(losses)[:2], ValueError, r"losses: expected 3, .* got 2"),
    ],
)
def test_losses_that_do_not_fit(losses, kind, match):
    model = MLP(3)
    hs = fan_out(model.encoder(model.x), 3, AlignedMTL())
    with pytest.raises(kind, match=match):
        hs.total(losses(losses_from(model, lambda t: hs[t])))
    assert all(p.grad is None for p in model.parameters())


def test_total_without_gradients():
    model = MLP(3).eval()
    with torch.no_grad():
        hs = fan_out(model.encoder(model.x), 3, AlignedMTL())
        losses = losses_from(model, lambda t: hs[t])
        assert torch.equal(hs.total(losses), sum(losses))
        assert torch.equal(hs.total([losses[0], None, losses[2]]), losses[0] + losses[2])
        with pytest.raises(ValueError, match="expected 3"):
            hs.total(losses[:2])


# ------------------------------------------------------------------------------------------------ written in place


@both
@pytest.mark.parametrize("tasks", [1, 2, 20])
@pytest.mark.parametrize("structure", ["tensor", "list"])
def test_a_head_that_begins_in_place_is_told_of_fan_out(structure, tasks, via):
    encoder = nn.Linear(5, 8)
    heads = [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 1)) for _ in range(tasks)]
    h = encoder(randn(4, 5))
    hs = fan_out(h if structure == "tensor" else [h, h * 2], tasks, AlignedMTL(), via=via)
    before = h.clone()
    alias = hs[tasks - 1] if structure == "tensor" else hs[tasks - 1][1]
    with pytest.raises(RuntimeError, match=r"Output \d+ of fan_out is a view and is being modified inplace"):
        heads[-1](alias)
    assert torch.equal(h, before)
    copies = [alias.clone() if structure == "tensor" else alias[0].clone() for alias in hs]  # what it says, helps
    hs.total([head(x).square().mean() for head, x in zip(heads, copies, strict=True)]).backward()
    assert hs.info.alpha.isfinite().all()


@both
def test_h_written_in_place_after_its_fan_out(via):
    h = nn.Linear(5, 8)(randn(4, 5))
    hs = fan_out(h, 3, AlignedMTL(), via=via)
    F.relu_(h)
    with pytest.raises(RuntimeError, match=r"of fan_out is a view and its base .* modified inplace"):
        hs[0].sum()


# ------------------------------------------------------------------------------------------------ representation=


def test_a_representation_that_is_not_the_one_the_losses_are_made_of():
    model = MLP(3)
    method = AlignedMTL()
    h, other = model.encoder(model.x), model.encoder(model.x)
    with pytest.raises(ValueError, match="representation: expected tensors that a loss depends on"):
        method.backward(losses_of(model, h), representation=other)
    with pytest.raises(ValueError, match="representation: expected tensors that a loss depends on"):
        method.backward(losses_of(model, h), representation=h.tanh())
    assert all(p.grad is None for p in model.parameters())

    def one_head_elsewhere():
        h, other = model.encoder(model.x), model.encoder(model.x)
        method.backward([model.loss(0, h), model.loss(1, other), model.loss(2, h)], representation=h)

    (text,) = recorded(one_head_elsewhere)
    assert text.startswith("representation: losses[1] does not depend on it")


def test_a_representation_that_is_passed_by():
    model, skip = MLP(2), nn.Linear(7, 2)

    def step():
        first = model.encoder[:2](model.x)
        h = model.encoder[2:](first)
        losses = losses_of(model, h)
        losses[1] = losses[1] + skip(first).square().mean()
        AlignedMTL().backward(losses, representation=h)

    (text,) = recorded(step)
    assert text.startswith("representation: losses[1] reaches the encoder along a path around it")
    both_maps = model.encoder[:2](model.x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        h = model.encoder[2:](both_maps)
        losses = losses_of(model, h)
        losses[1] = losses[1] + skip(both_maps).square().mean()
        AlignedMTL().backward(losses, representation=[both_maps, h])  # as it says


def test_right_representations_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (MLP(3), MTAN()):
            h = model.encoder(model.x)
            AlignedMTL().backward(losses_of(model, h), representation=h)
        model = Tied()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = model.encode()
            losses = [loss.float() + model.middle.weight.square().sum() for loss in model.losses([h, h])]
        AlignedMTL().backward(losses, representation=h)
        model = MLP(3)
        h = model.encoder(model.x)
        AlignedMTL().backward([model.loss(0, h), None, model.loss(2, h)], representation=h)


# ------------------------------------------------------------------------------------------------ attach


def test_an_attached_encoder_whose_heads_are_not_called():
    """They are there, but the model applies their weights by itself."""
    model = MLP(3)
    handle = attach(model.encoder, model.heads, AlignedMTL())

    def step():
        h = model.encoder(model.x)
        sum(F.linear(h, head[0].weight).square().mean() for head in model.heads).backward()

    (text,) = recorded(step)
    assert text.startswith("attach: the encoder got a gradient, but none of heads[0], heads[1], heads[2] was called")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = model.x.clone().requires_grad_()
        torch.autograd.grad(model.encoder(x).sum(), x)  # a derivative of the encoder alone
    handle.remove()


def test_an_attached_model_with_a_head_that_is_skipped():
    model = MLP(3)
    attach(model.encoder, model.heads, AlignedMTL())

    def step():
        h = model.encoder(model.x)
        (model.loss(0, h) + model.loss(2, h)).backward()

    (text,) = recorded(step)
    assert text.startswith("fan_out: hs[1] of 3 aliases has got no gradient")


def test_an_attached_model_with_a_loss_of_the_representation():
    model = MLP(3)
    handle = attach(model.encoder, model.heads, AlignedMTL())
    h = model.encoder(model.x)
    with pytest.warns(UserWarning, match="beside the aliases"):
        (handle.total(losses_of(model, h)) + h.square().mean()).backward()


def test_copies_do_not_share_the_record_of_warnings():
    """A warning belongs to a line of the user's code, not to an object."""
    model = MLP(2)
    texts = []
    for _ in range(2):
        other = copy.deepcopy(model)

        def step(other=other):
            hs = fan_out(other.encoder(other.x), 2, AlignedMTL())
            other.loss(0, hs[0]).backward()

        texts.append(recorded(step))
    assert [len(text) for text in texts] == [1, 0]


def test_one_row_is_what_a_lone_task_gets():
    """The gradient that a warning speaks of: it is that of the row that is there."""
    model = MLP(2, F64)
    hs = fan_out(model.encoder(model.x), 2, AlignedMTL())
    with pytest.warns(UserWarning, match=r"hs\[1\] of 2 aliases has got no gradient"):
        model.loss(0, hs[0]).backward()
    Z = torch.zeros(2, 48, dtype=F64)
    Z[0] = hs.gradients[0].reshape(-1)
    h = model.encoder(model.x)
    expected = torch.autograd.grad(h, list(model.encoder.parameters()), svd_align(Z).view_as(h))
    for p, g in zip(model.encoder.parameters(), expected, strict=True):
        assert relative(p.grad, g) <= 1e-9
