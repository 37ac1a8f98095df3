"""`every=`: in between, one pass brings Σ α_t g_t with weights of an earlier step, and each head its own gradient."""

import io

import pytest
import torch
from helpers import F64, Fail, flat, randn, relative
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastmtl


class Model(nn.Module):
    """A trunk, three heads, and a way to read them; float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(3))
        self.scales = nn.Parameter(torch.randn(3))
        self.to(F64)
        self.x = randn(16, 5, dtype=F64, seed=1)
        self.y = [randn(16, 2, dtype=F64, seed=2 + t) for t in range(3)]

    def losses(self, h=None):
        h = self.trunk(self.x) if h is None else h
        return [
            10.0**t * (head(h) - y).square().mean() for t, (head, y) in enumerate(zip(self.heads, self.y, strict=True))
        ]


def plain(model):
    return model.losses()


def one_loss_is_part_of_another(model):
    a, b, c = model.losses()
    return [a, a.exp() + b, c]


def the_same_loss_twice(model):
    a, b, _ = model.losses()
    return [a, a, b]


def stacked(model):
    return torch.stack(model.losses()).unbind()


def stacked_and_common(model):
    a, b, c = model.losses()
    return torch.stack([a, a * b, c]).unbind()


def checkpointed(model):
    return model.losses(checkpoint(model.trunk, model.x, use_reentrant=False))


def learned_scales(model):
    return [model.scales[t].exp() * loss for t, loss in enumerate(model.losses())]


def a_head_reads_a_weight_of_the_trunk(model):
    a, b, c = model.losses()
    return [a + model.trunk[0].weight.square().sum(), b, c * model.trunk[2].weight.t().sin().sum()]


def a_penalty_alone(model):
    a, b, _ = model.losses()
    return [a, b, model.trunk[2].weight.square().sum()]


def views_and_parts(model):
    h = model.trunk(model.x)
    return [head(h[t::3]).square().mean() for t, head in enumerate(model.heads)]


def two_stages(model):
    h = model.trunk[:2](model.x)
    deep = model.trunk[2:](h)
    return [model.heads[0](h).square().mean(), model.heads[1](deep).sin().mean(), (h * deep).sum()]


WAYS = [
    plain,
    stacked,
    checkpointed,
    learned_scales,
    a_head_reads_a_weight_of_the_trunk,
    a_penalty_alone,
    views_and_parts,
    two_stages,
]
# One pass brings these only where the heads are to be weighted as well.
COMMON = [one_loss_is_part_of_another, the_same_loss_twice, stacked_and_common]


def expected(model, losses, alpha, scale_heads=False):
    """By T passes of torch's own: the trunk's parameters weighted, all others not."""
    shared = {id(p) for p in model.trunk.parameters()}
    found = {}
    for name, p in model.named_parameters():
        total = None
        for t, loss in enumerate(losses):
            if loss is None:
                continue
            (g,) = torch.autograd.grad(loss, [p], retain_graph=True, allow_unused=True)
            if g is not None:
                g = g * alpha[t] if id(p) in shared or scale_heads else g
                total = g if total is None else total + g
        found[name] = total
    return found


def close(model, wanted):
    for name, p in model.named_parameters():
        assert (p.grad is None) == (wanted[name] is None), name
        if p.grad is not None:
            assert relative(p.grad, wanted[name]) <= 1e-12, name


@pytest.mark.parametrize(
    ("way", "scale_heads"),
    [(way, False) for way in WAYS] + [(way, True) for way in (*WAYS, *COMMON)],
    ids=lambda x: "scaled heads" if x is True else x.__name__ if x else "",
)
def test_between_solutions_one_pass_brings_the_weighted_sum(way, scale_heads):
    model, method = Model(), fastmtl.AlignedMTL()
    first = method.backward(way(model), shared=model.trunk, every=3, scale_heads=scale_heads)
    assert first.age == 0
    for age in (1, 2):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn_like(p))
        model.zero_grad()
        wanted = expected(model, way(model), first.alpha, scale_heads)
        info = method.backward(way(model), shared=model.trunk, every=3, scale_heads=scale_heads)
        assert info.age == age
        assert torch.equal(info.alpha, first.alpha)
        close(model, wanted)
    again = method.backward(way(model), shared=model.trunk, every=3, scale_heads=scale_heads)
    assert again.age == 0
    assert not torch.equal(again.alpha, first.alpha)


@pytest.mark.parametrize("engine", ["full", "gramian"])
def test_every_engine_keeps_its_weights(engine):
    model, method = Model(), fastmtl.AlignedMTL()
    alone = fastmtl.AlignedMTL().backward(model.losses(), shared=model.trunk, engine=engine)
    model.zero_grad()
    first = method.backward(model.losses(), shared=model.trunk, every=2, engine=engine)
    assert torch.equal(first.alpha, alone.alpha)
    model.zero_grad()
    wanted = expected(model, model.losses(), first.alpha)
    method.backward(model.losses(), every=2, engine=engine)  # the shared ones are found
    close(model, wanted)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_it_trains(optimizer):
    """A loss of each task goes down as with weights in every step."""
    model, method = Model(), fastmtl.AlignedMTL()
    optimizer = optimizer(model.parameters(), lr=0.01)
    before = [loss.item() for loss in model.losses()]
    for _ in range(60):
        optimizer.zero_grad()
        method.backward(model.losses(), shared=model.trunk, every=8)
        optimizer.step()
    assert all(loss.item() < was for loss, was in zip(model.losses(), before, strict=True))


def test_a_new_task_brings_new_weights_and_an_absent_one_does_not():
    model, method = Model(), fastmtl.AlignedMTL()

    def step(*there):
        losses = [loss if t in there else None for t, loss in enumerate(model.losses())]
        model.zero_grad()
        wanted = None if method.kept is None else expected(model, losses, method.kept.alpha)
        info = method.backward(losses, shared=model.trunk, every=10)
        if info.age:
            close(model, wanted)
        return info.age

    assert [step(0, 1), step(1), step(0, 1), step(0, 1, 2), step(0, 2), step(0, 1, 2)] == [0, 1, 2, 0, 1, 2]


def test_a_run_goes_on_from_its_state():
    model, method = Model(), fastmtl.AlignedMTL()
    for _ in range(3):
        method.backward(model.losses(), shared=model.trunk, every=5)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    other = fastmtl.AlignedMTL()
    other.load_state_dict(torch.load(file, weights_only=True))
    ages = [m.backward(model.losses(), shared=model.trunk, every=5).age for m in (method, other)]
    assert ages == [3, 3]
    assert torch.equal(method.kept.alpha, other.kept.alpha)
    method.reset()
    assert method.kept is None
    assert not method.state_dict()


@pytest.mark.parametrize("every", [3, "auto"])
@pytest.mark.parametrize("make", [fastmtl.AlignedMTL, fastmtl.GradVac], ids=["AlignedMTL", "GradVac"])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(every, make):
    """Between two solutions, through a file, with an optimizer's state and a method's own."""

    def parts():
        torch.manual_seed(5)
        model, method = Model(), make()
        return {"model": model, "method": method, "optimizer": torch.optim.Adam(model.parameters(), lr=0.02)}

    def train(model, method, optimizer, steps):
        for i in steps:
            optimizer.zero_grad()
            torch.manual_seed(i)
            model.x = randn(16, 5, dtype=F64, seed=i)
            method.backward(model.losses(), shared=model.trunk, every=every)
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    whole, stopped, resumed = parts(), parts(), parts()
    expected = train(**whole, steps=range(11))
    train(**stopped, steps=range(5))
    file = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in stopped.items()}, file)
    file.seek(0)
    for name, state in torch.load(file, weights_only=True).items():
        resumed[name].load_state_dict(state)
    for p, q in zip(train(**resumed, steps=range(5, 11)), expected, strict=True):
        assert torch.equal(p, q)


def test_auto_stretches_while_weights_stay_and_shortens_when_they_turn():
    """The same losses again and again; then another task is the hard one in every step."""
    model, method = Model(), fastmtl.AlignedMTL()
    ages = [method.backward(model.losses(), shared=model.trunk, every="auto").age for _ in range(70)]
    longest = max(ages)
    assert 16 <= longest < 64
    periods = []
    for t in range(400):
        losses = [1e3 * loss if i == (t // 2) % 3 else loss for i, loss in enumerate(model.losses())]
        if method.backward(losses, shared=model.trunk, every="auto").age == 0:
            periods.append(method.kept.period)
    assert periods[-1] <= 4 < max(periods)


def test_weights_that_are_not_finite_are_not_kept():
    model, method = Model(), fastmtl.AlignedMTL()
    first = method.backward(model.losses(), shared=model.trunk, every=2)
    method.backward(model.losses(), shared=model.trunk, every=2)
    bad = method.backward([loss * float("inf") for loss in model.losses()], shared=model.trunk, every=2)
    assert bad.age == 0
    assert bad.alpha.isnan().all()
    model.zero_grad()
    assert torch.equal(method.backward(model.losses(), shared=model.trunk, every=2).alpha, first.alpha)


def test_a_failure_leaves_gradients_and_age():
    model, method = Model(), fastmtl.AlignedMTL()
    method.backward(model.losses(), shared=model.trunk, every=4)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    h = Fail.apply(model.trunk(model.x))
    with pytest.raises(ArithmeticError):
        method.backward(model.losses(h), shared=model.trunk, every=4)
    assert method.kept.age == 0
    for name, p in model.named_parameters():
        assert p.grad is None if name not in before else torch.equal(p.grad, before[name]), name


def test_hooks_of_parameters_run_once_on_what_is_committed():
    model, method = Model(), fastmtl.AlignedMTL()
    method.backward(model.losses(), shared=model.trunk, every=2)
    model.zero_grad()
    seen = []
    model.trunk[0].weight.register_hook(lambda g: seen.append(g.clone()))
    method.backward(model.losses(), shared=model.trunk, every=2)
    assert len(seen) == 1
    assert torch.equal(seen[0], model.trunk[0].weight.grad)


@pytest.mark.parametrize("way", COMMON, ids=lambda way: way.__name__)
def test_where_one_pass_cannot_bring_both_weights_come_in_every_step(way):
    """A head that two losses reach has the plain sum of their gradients, which the same pass cannot bring."""
    model, method = Model(), fastmtl.AlignedMTL()
    with pytest.warns(UserWarning, match="every: several losses reach parameters that are not shared"):
        ages = [method.backward(way(model), shared=model.trunk, every=4).age for _ in range(3)]
    assert ages == [0, 0, 0]
    model.zero_grad()
    method.backward(way(model), shared=model.trunk, every=4)
    got = [p.grad for p in model.parameters()]
    model.zero_grad()
    fastmtl.AlignedMTL().backward(way(model), shared=model.trunk)
    for p, g in zip(model.parameters(), got, strict=True):
        assert (p.grad is None) == (g is None)
        assert g is None or torch.equal(p.grad, g)


def test_a_part_of_the_trunk_alone():
    """What lies between the shared part and the heads belongs to all, and is not weighted."""
    model, method = Model(), fastmtl.AlignedMTL()
    with pytest.warns(UserWarning, match="every: several losses reach parameters that are not shared"):
        ages = [method.backward(model.losses(), shared=model.trunk[0], every=4).age for _ in range(2)]
    assert ages == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": 0}, ValueError, "every: expected"),
        ({"every": 2.5}, TypeError, "every: expected"),
        ({"every": "often"}, TypeError, "every: expected"),
        ({"every": 2, "groups": True}, ValueError, "every: expected 1 with groups, got 2"),
    ],
)
def test_what_does_not_go_is_refused(arguments, error, message):
    model = Model()
    where = {"shared": model.trunk}
    if arguments.pop("groups", None):
        where = {"groups": [[p] for p in model.trunk.parameters()]}
    with pytest.raises(error, match=message):
        fastmtl.AlignedMTL().backward(model.losses(), **where, **arguments)
    assert all(p.grad is None for p in model.parameters())


def test_methods_without_weights_and_the_upper_bound_are_refused():
    model = Model()
    with pytest.raises(ValueError, match="every: expected 1 for GradDrop"):
        fastmtl.GradDrop().backward(model.losses(), shared=model.trunk, every=2)
    h = model.trunk(model.x)
    with pytest.raises(ValueError, match="every: expected 1 with representation, got 2"):
        fastmtl.AlignedMTL().backward(model.losses(h), representation=h, every=2)


def test_heads_may_be_named_where_they_are_scaled():
    """As they have to be of `fully_shard`: the same as True, also in between."""
    expected = None
    for heads in (True, Model().heads, None):
        model, method = Model(), fastmtl.AlignedMTL()
        heads = [list(head.parameters()) for head in model.heads] if heads is None else heads
        for _ in range(2):
            method.backward(model.losses(), shared=model.trunk, every=2, scale_heads=heads)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        expected = expected or grads
        assert all(torch.equal(g, e) for g, e in zip(grads, expected, strict=True))
    model = Model()
    for heads, error, message in (
        (list(model.heads)[:2], ValueError, "a head for each of the 3 tasks, got 2"),
        (model.heads[0].weight, TypeError, "a bool, or a head for each task, got float64 tensor"),
        ([None] * 3, TypeError, r"scale_heads\[0\]: expected a module"),
        (1, TypeError, "a bool, or a head for each task, got int"),
    ):
        with pytest.raises(error, match=message):
            fastmtl.AlignedMTL().backward(model.losses(), shared=model.trunk, scale_heads=heads)


def test_a_step_in_between_costs_one_pass():
    """Counted: how often a backward comes by the trunk."""
    model, method, passes = Model(), fastmtl.AlignedMTL(), []

    def step():
        h = model.trunk(model.x)
        h.grad_fn.register_hook(lambda *_: passes.append(1))
        passes.clear()
        method.backward(model.losses(h), shared=model.trunk, every=3)
        return len(passes)

    assert [step() for _ in range(4)] == [3, 1, 1, 3]
    assert flat([p.grad for p in model.trunk.parameters()]).isfinite().all()


# ------------------------------------------------------------------------------------------------ a period of its own


def nash_by_hand(model, alpha, max_norm, losses=None):
    """Σ α_t g_t of the trunk, clipped to `max_norm`, as the authors' code clips it after one backward pass."""
    wanted = expected(model, losses or model.losses(), alpha)
    trunk = [f"trunk.{name}" for name, _ in model.trunk.named_parameters()]
    norm = flat([wanted[name] for name in trunk]).norm()
    factor = max_norm / norm.clamp_min(max_norm) if max_norm else 1.0
    return wanted | {name: wanted[name] * factor for name in trunk}


@pytest.mark.parametrize("max_norm", [0.0, 0.2, 1e3])
def test_nash_takes_one_pass_in_between_and_the_authors_step(max_norm):
    model, method, passes = Model(), fastmtl.NashMTL(max_norm=max_norm, every=3), []
    solver = fastmtl.NashMTL(max_norm=0)  # the weights before they are shortened
    for step in range(7):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.03 * randn(*p.shape, dtype=F64, seed=step))
        model.zero_grad()
        if step % 3 == 0:
            alpha = solver.backward(model.losses(), shared=model.trunk).alpha
            model.zero_grad()
        wanted = nash_by_hand(model, alpha, max_norm)
        h = model.trunk(model.x)
        h.grad_fn.register_hook(lambda *_: passes.append(1))
        passes.clear()
        info = method.backward(model.losses(h), shared=model.trunk)
        assert (info.age, len(passes)) == ((0, 3), (1, 1), (2, 1))[step % 3]
        close(model, wanted)
        if max_norm == 0.2:
            assert flat([p.grad for p in model.trunk.parameters()]).norm() == pytest.approx(0.2)


def test_nash_elsewhere_holds_its_weights_as_ever():
    """Ways that take one pass anyway, and methods in evaluation, which change nothing."""
    model, method = Model(), fastmtl.NashMTL(every=3)
    for step in range(4):
        h = model.trunk(model.x)
        info = method.backward(model.losses(h), representation=h)
        assert info.age is None
        assert method.steps == step + 1
    method.reset()
    method.eval()
    for _ in range(2):
        assert method.backward(model.losses(), shared=model.trunk).age is None
    assert method.kept is None
    assert not method.state_dict()
    aligned = fastmtl.AlignedMTL()
    aligned.backward(model.losses(), shared=model.trunk, every=3)
    kept = aligned.kept
    aligned.eval()
    assert [aligned.backward(model.losses(), shared=model.trunk, every=3).age for _ in range(2)] == [1, 1]
    assert aligned.kept is kept


def test_nash_holds_its_weights_where_one_pass_cannot_bring_both():
    """Losses written into one tensor, as LibMTL's trainer does: T passes, and weights of every third step."""
    model, method, other = Model(), fastmtl.NashMTL(every=3), fastmtl.NashMTL(every=3)
    for step in range(5):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.03 * randn(*p.shape, dtype=F64, seed=step))
        written = torch.zeros(3, dtype=F64)
        for t, loss in enumerate(model.losses()):
            written[t] = loss
        info = method.backward(written, shared=model.trunk)
        expected = other.backward(model.losses(), shared=model.trunk)
        assert info.age is None
        assert expected.age == step % 3
        assert relative(info.alpha, expected.alpha) <= 1e-9


def test_nash_with_a_loss_scaler_and_scaled_heads():
    """The limit is one on the gradient as it is without a scaler, and heads have the weights of `info`."""
    model, method = Model(), fastmtl.NashMTL(max_norm=0.1, every=2)
    for step in range(2):
        model.zero_grad()
        losses = [1024.0 * loss for loss in model.losses()]
        info = method.backward(losses, shared=model.trunk, grad_scale=1024.0, scale_heads=True)
        assert info.age == step
    assert flat([p.grad for p in model.trunk.parameters()]).norm() == pytest.approx(102.4)
    for t, head in enumerate(model.heads):
        (g,) = torch.autograd.grad(1024.0 * model.losses()[t], [head.weight])
        assert relative(head.weight.grad, info.alpha[t] * g) <= 1e-12


def test_nash_goes_on_from_its_state():
    model, method = Model(), fastmtl.NashMTL(every=4)
    for _ in range(3):
        method.backward(model.losses(), shared=model.trunk)
    other = fastmtl.NashMTL(every=4)
    other.load_state_dict(method.state_dict())
    for age in (3, 0, 1):
        infos = [m.backward(model.losses(), shared=model.trunk) for m in (method, other)]
        assert [info.age for info in infos] == [age, age]
        assert torch.equal(infos[0].alpha, infos[1].alpha)


def test_a_first_step_that_overflows_costs_one_step():
    """A loss scaler begins too high: steps until the next solution are those of the sum, not lost as well."""
    model, method = Model(), fastmtl.AlignedMTL()
    first = method.backward([loss * float("inf") for loss in model.losses()], shared=model.trunk, every=3)
    assert first.alpha.isnan().all()
    model.zero_grad()
    wanted = expected(model, model.losses(), torch.ones(3, dtype=F64))
    assert method.backward(model.losses(), shared=model.trunk, every=3).age == 1
    close(model, wanted)
