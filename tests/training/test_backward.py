"""`method.backward`: gradients land where an ordinary loop would put them, and nowhere else."""

import pytest
import torch
from helpers import BF16, EPS, F16, F64, dtype_id, flat, generator, randn, relative, svd_align, svd_rank
from models import MLP, MTAN, encoder_gradients, losses_of, task_gradients, upper_bound
from torch import nn

import fastmtl


class Model(nn.Module):
    """A trunk and one head per task, task t with a loss of its own size."""

    def __init__(self, tasks=3, width=8, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(1)
        self.trunk = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()).to(dtype)
        self.heads = nn.ModuleList([nn.Linear(width, 2) for _ in range(tasks)]).to(dtype)
        self.x = randn(16, 5, dtype=dtype, seed=1)
        self.y = [randn(16, 2, dtype=dtype, seed=2 + t) for t in range(tasks)]

    def losses(self):
        h = self.trunk(self.x)
        return [
            10.0**t * (head(h) - y).square().mean() for t, (head, y) in enumerate(zip(self.heads, self.y, strict=True))
        ]

    def shared(self):
        return list(self.trunk.parameters())


def gradient_rows(losses, parameters):
    """[T][K] by T separate passes; an unreached parameter gets zeros."""
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)])
    return rows


def grads_of(parameters):
    return [None if p.grad is None else p.grad.clone() for p in parameters]


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=dtype_id)
@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
@pytest.mark.parametrize("tasks", [1, 2, 3, 7])
def test_equals_separate_passes_and_an_svd(tasks, scale, dtype):
    model = Model(tasks, dtype=dtype)
    shared = model.shared()
    rows = gradient_rows(model.losses(), shared)
    G = torch.stack([flat(row) for row in rows]).to(dtype)
    w = torch.rand(tasks, dtype=F64)
    method = fastmtl.AlignedMTL(weights=w, scale=scale)
    info = method.backward(model.losses(), shared=shared)
    limit = 1e-9 if dtype is F64 else 2e-6
    assert relative(flat([p.grad for p in shared]), svd_align(G, w, scale)) <= limit
    for t, head in enumerate(model.heads):
        own = torch.autograd.grad(model.losses()[t], list(head.parameters()))
        for p, g in zip(head.parameters(), own, strict=True):
            assert torch.equal(p.grad, g)
    M = G.to(F64) @ G.to(F64).T
    assert relative(info.gram, M) <= 1e-6
    assert relative(info.eigenvalues, torch.linalg.svdvals(G.to(F64)).square()) <= 1e-6
    assert info.rank == svd_rank(G) == tasks
    assert relative(info.alpha @ G.to(F64), svd_align(G, w, scale)) <= limit
    assert info.gram.dtype is info.alpha.dtype is info.eigenvalues.dtype is F64
    assert info.rank.dtype is torch.int64
    assert (info.alpha.shape, info.gram.shape, info.eigenvalues.shape, info.rank.shape) == (
        (tasks,),
        (tasks, tasks),
        (tasks,),
        (),
    )
    assert not any(x.requires_grad for x in vars(info).values() if isinstance(x, torch.Tensor))


def test_equals_the_call_on_rows():
    model = Model()
    rows = gradient_rows(model.losses(), model.shared())
    method = fastmtl.AlignedMTL()
    expected = method(rows)
    method.backward(model.losses(), model.shared())
    for p, g in zip(model.shared(), expected, strict=True):
        assert torch.equal(p.grad, g)


def test_scale_heads():
    model = Model()
    info = fastmtl.AlignedMTL().backward(model.losses(), model.shared(), scale_heads=True)
    for t, head in enumerate(model.heads):
        own = torch.autograd.grad(model.losses()[t], list(head.parameters()))
        for p, g in zip(head.parameters(), own, strict=True):
            assert relative(p.grad, info.alpha[t] * g.to(F64)) <= 1e-6
    plain = Model()
    fastmtl.AlignedMTL().backward(plain.losses(), plain.shared())
    for p, q in zip(model.shared(), plain.shared(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_adds_to_existing_gradients():
    model = Model()
    fastmtl.AlignedMTL().backward(model.losses(), model.shared())
    once = grads_of(model.parameters())
    buffers = [p.grad for p in model.parameters()]
    fastmtl.AlignedMTL().backward(model.losses(), model.shared())
    for p, g, buffer in zip(model.parameters(), once, buffers, strict=True):
        assert p.grad is buffer  # accumulated in place, as loss.backward() does
        assert relative(p.grad, 2 * g.to(F64)) <= 1e-6


def test_a_parameter_no_loss_reaches_is_untouched():
    model = Model()
    unused = nn.Parameter(torch.ones(3))
    kept = nn.Parameter(torch.ones(3))
    kept.grad = before = torch.full((3,), 7.0)
    fastmtl.AlignedMTL().backward(model.losses(), [*model.shared(), unused, kept])
    assert unused.grad is None
    assert kept.grad is before
    assert (before == 7.0).all()


def test_frozen_parameters_and_inputs_are_untouched():
    model = Model()
    model.trunk[0].weight.requires_grad_(False)
    model.heads[1].weight.requires_grad_(False)
    shared = [p for p in model.shared() if p.requires_grad]
    fastmtl.AlignedMTL().backward(model.losses(), shared)
    assert model.trunk[0].weight.grad is None
    assert model.heads[1].weight.grad is None
    assert model.heads[1].bias.grad is not None
    assert model.x.grad is None


def test_tasks_that_miss_some_shared_parameters():
    a, b, c = (nn.Parameter(randn(4, seed=s)) for s in range(3))

    def losses():
        return [(a * b).square().sum(), b.sum() + (b * randn(4, seed=5)).sum(), (c * randn(4, seed=6)).exp().sum()]

    G = torch.stack([flat(row) for row in gradient_rows(losses(), [a, b, c])]).float()
    info = fastmtl.AlignedMTL().backward(losses(), [a, b, c])
    assert relative(flat([a.grad, b.grad, c.grad]), svd_align(G)) <= 2e-6
    assert info.gram[0, 2] == 0.0


def test_a_task_without_any_shared_gradient_counts_as_zero():
    model = Model()
    own = nn.Parameter(torch.tensor([1.0, 2.0]))
    losses = [*model.losses(), own.square().sum()]
    G = torch.stack([flat(row) for row in gradient_rows(losses, model.shared())]).float()
    info = fastmtl.AlignedMTL().backward(losses, model.shared())
    assert info.rank == 3
    assert info.alpha[3] == 0.0
    assert relative(flat([p.grad for p in model.shared()]), svd_align(G)) <= 2e-6
    assert torch.equal(own.grad, torch.tensor([2.0, 4.0]))


def test_a_parameter_outside_shared_that_several_losses_reach_gets_their_sum():
    a, b, c = nn.Parameter(randn(4, seed=1)), nn.Parameter(randn(4, seed=2)), nn.Parameter(randn(4, seed=3))

    def losses():
        return [(a * b).sum(), (a * a * b).sum() + c.sum(), (a.sin() * randn(4, seed=4)).sum()]

    own = [torch.autograd.grad(loss, b, allow_unused=True)[0] for loss in losses()]
    fastmtl.AlignedMTL().backward(losses(), [a])
    assert relative(b.grad, (own[0] + own[1]).to(F64)) <= 1e-6
    assert torch.equal(c.grad, torch.ones(4))

    a.grad = b.grad = c.grad = None
    info = fastmtl.AlignedMTL().backward(losses(), [a], scale_heads=True)
    assert relative(b.grad, info.alpha[0] * own[0] + info.alpha[1] * own[1]) <= 1e-6


def test_parameters_shared_by_some_heads_only():
    """An intermediate trunk between the encoder and two of three heads."""
    x = randn(6, 4)
    encoder, middle = nn.Linear(4, 4), nn.Linear(4, 3)
    heads = [nn.Linear(3, 1), nn.Linear(3, 1), nn.Linear(4, 1)]

    def losses():
        h = encoder(x)
        m = middle(h).tanh()
        return [heads[0](m).square().sum(), heads[1](m).sum(), heads[2](h).sin().sum()]

    both = torch.autograd.grad(sum(losses()[:2]), list(middle.parameters()))
    fastmtl.AlignedMTL().backward(losses(), encoder.parameters())
    for p, g in zip(middle.parameters(), both, strict=True):
        assert relative(p.grad, g.to(F64)) <= 1e-6


def test_tied_and_repeated_parameters():
    """One weight used twice in the trunk and listed twice in `shared` is one parameter."""
    weight = nn.Parameter(randn(4, 4))
    x = randn(3, 4, seed=1)

    def losses():
        h = (x @ weight).tanh() @ weight.T
        return [h.square().sum(), (h * randn(3, 4, seed=2)).sum()]

    G = torch.stack([flat(row) for row in gradient_rows(losses(), [weight])]).float()
    info = fastmtl.AlignedMTL().backward(losses(), [weight, weight])
    assert relative(weight.grad.reshape(-1), svd_align(G)) <= 2e-6
    assert relative(info.gram, G.to(F64) @ G.to(F64).T) <= 1e-6


def test_retain_graph():
    model = Model()
    losses = model.losses()
    method = fastmtl.AlignedMTL()
    method.backward(losses, model.shared(), retain_graph=True)
    once = grads_of(model.parameters())
    method.backward(losses, model.shared())
    for p, g in zip(model.parameters(), once, strict=True):
        assert torch.equal(p.grad, 2 * g)
    with pytest.raises(RuntimeError, match="second time"):
        method.backward(losses, model.shared())
    for p, g in zip(model.parameters(), once, strict=True):
        assert torch.equal(p.grad, 2 * g)


def test_the_graph_is_freed():
    freed = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, g):
            freed.append(ctx)
            return g * 2

    a = nn.Parameter(randn(3))
    h = Watch.apply(a)
    fastmtl.AlignedMTL().backward([h.sum(), h.square().sum()], [a])
    assert len(freed) == 2
    with pytest.raises(RuntimeError):
        _ = freed[-1].saved_tensors


def test_losses_without_a_common_trunk_graph():
    """Each loss from a forward pass of its own: the graphs are separate and all are freed."""
    model = Model()
    G = torch.stack([flat(row) for row in gradient_rows(model.losses(), model.shared())]).float()
    fastmtl.AlignedMTL().backward([model.losses()[t] for t in range(3)], model.shared())
    assert relative(flat([p.grad for p in model.shared()]), svd_align(G)) <= 2e-6


def test_a_loss_that_is_itself_a_parameter():
    a, b = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(3.0))
    fastmtl.AlignedMTL().backward([a, a * b], [a])  # gradients 1 and 3: rank one
    expected = svd_align(torch.tensor([[1.0], [3.0]]))
    assert a.grad.item() == pytest.approx(expected.item(), rel=1e-6)
    assert b.grad.item() == 2.0

    a.grad = b.grad = None
    fastmtl.AlignedMTL().backward([a, b * b], [b])  # the first loss is a head of its own
    assert a.grad.item() == 1.0
    assert b.grad.item() == pytest.approx(svd_align(torch.tensor([[0.0], [6.0]])).item(), rel=1e-6)


def test_one_element_losses_of_any_shape():
    a = nn.Parameter(randn(4))
    method = fastmtl.AlignedMTL()
    method.backward([a.square().sum(), a.sin().sum()], [a])
    expected, a.grad = a.grad, None
    method.backward([a.square().sum()[None], a.sin().sum().reshape(1, 1)], (p for p in [a]))
    assert torch.equal(a.grad, expected)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=dtype_id)
def test_shared_parameters_of_different_dtypes(dtype):
    a, b = nn.Parameter(randn(6)), nn.Parameter(randn(5, dtype=dtype, seed=1))

    def losses():
        return [
            (a * randn(6, seed=2)).sum() + b.float().square().sum(),
            a.square().sum() + (b.float() * randn(5, seed=3)).sum(),
        ]

    rows = gradient_rows(losses(), [a, b])
    G = torch.stack([flat(row) for row in rows])
    fastmtl.AlignedMTL().backward(losses(), [a, b])
    assert a.grad.dtype is torch.float32
    assert b.grad.dtype is dtype
    expected = svd_align(G, rtol=EPS[dtype])
    assert relative(a.grad, expected[:6]) <= 2e-6
    assert relative(b.grad, expected[6:]) <= EPS[dtype]


def test_low_precision_model():
    model = Model(dtype=BF16)
    G = torch.stack([flat(row) for row in gradient_rows(model.losses(), model.shared())]).to(BF16)
    fastmtl.AlignedMTL().backward(model.losses(), model.shared())
    assert relative(flat([p.grad for p in model.shared()]), svd_align(G)) <= 2 * EPS[BF16]


def test_non_finite_losses_reach_the_gradients():
    """A loss scaler finds the overflow in `.grad` and skips the step."""
    model = Model()
    losses = model.losses()
    info = fastmtl.AlignedMTL().backward([losses[0], losses[1] * torch.inf, losses[2]], model.shared())
    assert not any(p.grad.isfinite().any() for p in model.shared())
    assert info.alpha.isnan().all()
    assert info.rank == 0
    assert all(p.grad.isfinite().all() for p in model.heads[0].parameters())
    assert not any(p.grad.isfinite().all() for p in model.heads[1].parameters())


def test_grad_scaler_unscales_the_result():
    plain, scaled = Model(), Model()
    fastmtl.AlignedMTL().backward(plain.losses(), plain.shared())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(scaled.parameters(), lr=0.1)
    fastmtl.AlignedMTL().backward([scaler.scale(loss) for loss in scaled.losses()], scaled.shared())
    scaler.unscale_(optimizer)
    for p, q in zip(scaled.parameters(), plain.parameters(), strict=True):
        assert relative(p.grad, q.grad.to(F64)) <= 1e-6


def test_layout_of_the_parameter_is_kept():
    weight = nn.Parameter(randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last))
    x = randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)

    def losses():
        h = nn.functional.conv2d(x, weight)
        return [h.square().sum(), (h * randn(2, 4, 6, 6, seed=1)).sum(), weight.abs().sum()]

    G = torch.stack([flat(row) for row in gradient_rows(losses(), [weight])]).float()
    fastmtl.AlignedMTL().backward(losses(), [weight])
    assert relative(weight.grad.reshape(-1), svd_align(G)) <= 5e-6
    assert weight.grad.stride() == weight.stride()


def test_grad_mode_does_not_matter_for_the_commit():
    model, plain = Model(), Model()
    fastmtl.AlignedMTL().backward(plain.losses(), plain.shared())
    losses = model.losses()
    with torch.no_grad():
        fastmtl.AlignedMTL().backward(losses, model.shared())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
        assert not p.grad.requires_grad


# ------------------------------------------------------------------------------------------------ hooks


def test_post_accumulate_hooks_fire_once_for_every_parameter():
    model = Model()
    fired = {}
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: fired.setdefault(name, []).append(p.grad.clone()))
    fastmtl.AlignedMTL().backward(model.losses(), model.shared())
    assert set(fired) == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        assert len(fired[name]) == 1, name
        assert torch.equal(fired[name][0], p.grad)


def test_post_accumulate_hooks_can_step_the_optimizer():
    """The optimizer-in-backward pattern: step and free each gradient as soon as it is there."""
    model, plain = Model(), Model()
    for p in model.parameters():
        optimizer = torch.optim.SGD([p], lr=0.1)

        def step(p, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(step)
    fastmtl.AlignedMTL().backward(model.losses(), model.shared())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    fastmtl.AlignedMTL().backward(plain.losses(), plain.shared())
    optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.grad is None


def test_tensor_hooks_act_once_on_what_is_committed():
    """As in an ordinary backward: a hook that halves a gradient halves it once, on heads and on shared parameters."""
    model, plain = Model(), Model()
    seen = {}
    for name, p in model.named_parameters():
        p.register_hook(lambda g, name=name: (seen.setdefault(name, []).append(g.clone()), g / 2)[1])
    fastmtl.AlignedMTL().backward(model.losses(), model.shared())
    fastmtl.AlignedMTL().backward(plain.losses(), plain.shared())
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert len(seen[name]) == 1, f"{name}: the hook ran {len(seen[name])} times"
        assert torch.equal(seen[name][0], q.grad)
        assert torch.equal(p.grad, q.grad / 2)


def test_hooks_survive_a_pass_that_fails():
    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise ArithmeticError

    a = nn.Parameter(randn(3))
    calls = []
    handle = a.register_hook(lambda g: calls.append(1))
    fastmtl.AlignedMTL().backward([a.sum(), a.square().sum()], [a])
    with pytest.raises(ArithmeticError):
        fastmtl.AlignedMTL().backward([a.sum(), Fail.apply(a).sum()], [a])
    calls.clear()
    a.sum().backward()
    assert calls == [1]
    handle.remove()
    a.sum().backward()
    assert calls == [1]


def test_module_backward_hooks_fire_once_per_task():
    """Hooks on modules belong to the passes, not to `.grad`: one call for each loss."""
    model = Model()
    calls = []
    model.trunk[2].register_full_backward_hook(lambda *_: calls.append(1))
    fastmtl.AlignedMTL().backward(model.losses(), model.shared())
    assert len(calls) == 3


def test_gradient_buffers_are_handed_over_and_not_copied(monkeypatch):
    model = Model()
    aligned, own = [], []
    align_rows, grad = fastmtl.ops.align_rows, torch.autograd.grad

    def watch_align(*args):
        aligned.extend(x.data_ptr() for x in args[-1])
        return align_rows(*args)

    def watch_grad(*args, **kwargs):
        result = grad(*args, **kwargs)
        own.extend(g.data_ptr() for g in result if g is not None)
        return result

    monkeypatch.setattr(fastmtl.ops, "align_rows", watch_align)
    monkeypatch.setattr(torch.autograd, "grad", watch_grad)
    fastmtl.AlignedMTL().backward(model.losses(), model.shared())
    assert [p.grad.data_ptr() for p in model.shared()] == aligned
    assert {p.grad.data_ptr() for p in model.heads.parameters()} <= set(own)


def test_gradients_are_handed_over_also_with_post_accumulate_hooks(monkeypatch):
    model = Model()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: None)
    aligned = []
    align_rows = fastmtl.ops.align_rows

    def watch(*args):
        aligned.extend(x.data_ptr() for x in args[-1])
        return align_rows(*args)

    monkeypatch.setattr(fastmtl.ops, "align_rows", watch)
    fastmtl.AlignedMTL().backward(model.losses(), model.shared())
    assert [p.grad.data_ptr() for p in model.shared()] == aligned


def test_a_training_run_with_an_optimizer():
    """An ordinary loop around `backward` brings every loss down."""
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    method = fastmtl.AlignedMTL()
    before = [loss.item() for loss in model.losses()]
    for _ in range(100):
        optimizer.zero_grad()
        method.backward(model.losses(), model.shared())
        optimizer.step()
    assert all(now.item() < then for now, then in zip(model.losses(), before, strict=True))


# ------------------------------------------------------------------------------------------------ shared by default


def test_shared_is_what_two_losses_reach():
    model, named = Model(), Model()
    info = fastmtl.AlignedMTL().backward(model.losses())
    expected = fastmtl.AlignedMTL().backward(named.losses(), named.shared())
    assert relative(info.gram, expected.gram) <= 1e-12  # found in another order
    for p, q in zip(model.parameters(), named.parameters(), strict=True):
        assert relative(p.grad, q.grad.to(F64)) <= 1e-6


def test_shared_by_default_includes_what_some_heads_share():
    a, b, c = (nn.Parameter(randn(4, seed=s)) for s in range(3))

    def losses():
        return [(a * b).sum(), (b.sin() * randn(4, seed=5)).sum() + a.sum(), (c * a.cos()).sum()]

    G = torch.stack([flat(row) for row in gradient_rows(losses(), [a, b])]).float()
    own = torch.autograd.grad(losses()[2], c)[0]
    fastmtl.AlignedMTL().backward(losses())
    assert relative(flat([a.grad, b.grad]), svd_align(G)) <= 2e-6
    assert torch.equal(c.grad, own)


# ------------------------------------------------------------------------------------------------ representation


def through_fan_out(model, method):
    hs = fastmtl.fan_out(model.encoder(model.x), len(model.heads), method)
    sum(model.loss(t, h) for t, h in enumerate(hs)).backward()
    return hs.info


def same_gradients(model, other, limit=2e-6):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert relative(p.grad, q.grad.to(F64)) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=dtype_id)
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_representation_equals_plain_autograd(tasks, dtype):
    expected = upper_bound(MLP(tasks, dtype), svd_align)
    model = MLP(tasks, dtype)
    h = model.encoder(model.x)
    info = fastmtl.AlignedMTL().backward(losses_of(model, h), representation=h)
    assert relative(flat(encoder_gradients(model)), flat(expected)) <= (1e-9 if dtype is F64 else 5e-6)
    G = torch.stack([flat(row) for row in task_gradients(model)])
    assert relative(info.gram, G @ G.T) <= 1e-6
    for t, head in enumerate(model.heads):
        own = torch.autograd.grad(model.loss(t, model.encoder(model.x)), list(head.parameters()))
        for p, g in zip(head.parameters(), own, strict=True):
            assert torch.equal(p.grad, g)


@pytest.mark.parametrize("retain_graph", [False, True])
def test_representation_with_stages_made_from_each_other(retain_graph):
    """MTAN's feature maps: what a later one sends on through an earlier one counts once, as the later one's."""
    expected = upper_bound(MTAN(), svd_align)
    model = MTAN()
    h = model.encoder(model.x)
    info = fastmtl.AlignedMTL().backward(losses_of(model, h), representation=h, retain_graph=retain_graph)
    G = torch.stack([flat(row) for row in task_gradients(model)])
    assert relative(info.gram, G @ G.T) <= 1e-6
    assert relative(flat(encoder_gradients(model)), flat(expected)) <= 5e-6


@pytest.mark.parametrize(
    "method", [fastmtl.AlignedMTL(weights="sum", scale="rmse"), fastmtl.MGDA()], ids=["aligned", "mgda"]
)
def test_representation_with_heads_that_share_parameters(method):
    class Shared(MLP):
        """The first two heads have a layer in common."""

        def __init__(self):
            super().__init__(3)
            self.heads[1][0] = self.heads[0][0]

    model, fanned = Shared(), Shared()
    h = model.encoder(model.x)
    losses = losses_of(model, h)
    layer = list(model.heads[0][0].parameters())
    both = torch.autograd.grad(losses[0] + losses[1], layer, retain_graph=True)
    info = method.backward(losses, representation=h)
    other = through_fan_out(fanned, method)
    assert relative(info.gram, other.gram) <= 1e-6
    for p, g in zip(layer, both, strict=True):
        assert relative(p.grad, g.to(F64)) <= 1e-6
    same_gradients(model, fanned)


class Tied(nn.Module):
    """Weights on both sides of the representation, as those of an embedding and its output layer.

    `regularised`: a loss also has a term that reaches the encoder's weights by no way through the representation.
    """

    def __init__(self, regularised):
        super().__init__()
        self.table, self.other = nn.Parameter(randn(7, 5, seed=1)), nn.Parameter(randn(5, 5, seed=2))
        self.own = nn.ParameterList([randn(5, 5, seed=3 + t) for t in range(3)])
        self.regularised = regularised

    def encode(self):
        return (self.table[torch.tensor([0, 2, 2, 6])] @ self.other).tanh()

    def losses(self, aliases):
        outputs = [(h @ own).tanh() @ self.table.T for h, own in zip(aliases, self.own, strict=True)]
        losses = [out.square().mean() * 3.0**t + out[t].sum() for t, out in enumerate(outputs)]
        if self.regularised:
            losses[1] = losses[1] + 0.1 * self.other.square().sum()
        return losses


@pytest.mark.parametrize("regularised", [False, True])
@pytest.mark.parametrize("retain_graph", [False, True])
def test_representation_with_tied_weights(retain_graph, regularised):
    """What comes around the representation is added plainly, as in an ordinary backward of a fan-out."""
    method = fastmtl.AlignedMTL()
    model, fanned = Tied(regularised), Tied(regularised)
    h = model.encode()
    info = method.backward(model.losses([h] * 3), representation=h, retain_graph=retain_graph)
    hs = fastmtl.fan_out(fanned.encode(), 3, method)
    sum(fanned.losses(hs)).backward()
    assert relative(info.gram, hs.info.gram) <= 1e-6
    same_gradients(model, fanned)


def test_representation_nested_and_with_parts_that_are_not_used():
    a, b = nn.Parameter(randn(6, seed=1)), nn.Parameter(randn(6, seed=2))
    unused = nn.Parameter(randn(6, seed=3))
    G = randn(3, 2, 6, seed=4)
    h = {"maps": [a * 2, (b.sin(), torch.tensor([1, 0]))], "none": None, "unused": unused * 1, "again": torch.ones(2)}
    low, high = h["maps"][0], h["maps"][1][0]
    losses = [(low * G[0, 0]).sum(), (low * G[1, 0]).sum() + (high * G[1, 1]).sum(), (high * G[2, 1]).sum()]
    Z = G.clone()
    Z[0, 1] = Z[2, 0] = 0
    aligned = svd_align(Z.reshape(3, 12)).reshape(2, 6)
    info = fastmtl.AlignedMTL().backward(losses, representation=h)
    assert relative(a.grad, 2 * aligned[0]) <= 2e-6
    assert relative(b.grad, aligned[1] * b.cos()) <= 2e-6
    assert unused.grad is None
    assert info.gram[0, 2] == 0


def test_representation_that_occurs_twice_counts_once():
    model, once = MLP(3), MLP(3)
    h = model.encoder(model.x)
    info = fastmtl.AlignedMTL().backward(losses_of(model, h), representation=[h, {"again": h}])
    assert torch.equal(info.gram, through_fan_out(once, fastmtl.AlignedMTL()).gram)
    same_gradients(model, once)


def test_representation_that_a_task_misses():
    model, fanned = MLP(3), MLP(3)
    own = nn.Parameter(torch.tensor([1.0, 2.0]))
    h = model.encoder(model.x)
    losses = [model.loss(0, h), own.square().sum(), model.loss(2, h)]
    with pytest.warns(UserWarning, match=r"representation: losses\[1\] does not depend on it"):
        info = fastmtl.AlignedMTL().backward(losses, representation=h)
    assert info.rank == 2
    assert info.alpha[1] == 0
    assert torch.equal(own.grad, torch.tensor([2.0, 4.0]))
    hs = fastmtl.fan_out(fanned.encoder(fanned.x), 3, fastmtl.AlignedMTL())
    hs.total([fanned.loss(0, hs[0]), None, fanned.loss(2, hs[2])]).backward()
    same_gradients(model.encoder, fanned.encoder)


@pytest.mark.parametrize("retain_graph", [False, True])
def test_representation_beside_another_output_of_the_same_operation(retain_graph):
    """A loss uses it directly: that part of its gradient is added plainly."""
    weights = nn.Parameter(randn(3, 8, seed=1)), nn.Parameter(randn(3, 8, seed=1))
    G = randn(2, 3, 8, seed=2)
    a, b, c = weights[0].exp().unbind()
    losses = [(a * g[0]).sum() + (b * g[1]).sum() + (c * g[2]).sum() for g in G]
    info = fastmtl.AlignedMTL().backward(losses, representation=[a, b], retain_graph=retain_graph)
    a, b, c = weights[1].exp().unbind()
    hs = fastmtl.fan_out([a, b], 2, fastmtl.AlignedMTL())
    sum((h[0] * g[0]).sum() + (h[1] * g[1]).sum() + (c * g[2]).sum() for h, g in zip(hs, G, strict=True)).backward()
    aligned = svd_align(G[:, :2].reshape(2, 16)).reshape(2, 8)
    for weight in weights:
        assert relative(weight.grad, torch.cat([aligned, G[:, 2].sum(0)[None]]) * weight.exp()) <= 5e-6
    assert relative(info.gram, hs.info.gram) <= 1e-12


def test_representation_that_is_a_leaf():
    h = nn.Parameter(randn(8, seed=1))
    G = randn(3, 8, seed=2)
    fastmtl.AlignedMTL().backward([(h * g).sum() for g in G], representation=h)
    assert relative(h.grad, svd_align(G)) <= 2e-6


def test_representation_scale_heads():
    model, plain = MLP(3), MLP(3)
    h = model.encoder(model.x)
    info = fastmtl.AlignedMTL().backward(losses_of(model, h), representation=h, scale_heads=True)
    through_fan_out(plain, fastmtl.AlignedMTL())
    for t in range(3):
        for p, q in zip(model.heads[t].parameters(), plain.heads[t].parameters(), strict=True):
            assert relative(p.grad, info.alpha[t] * q.grad.to(F64)) <= 1e-6
    same_gradients(model.encoder, plain.encoder)


@pytest.mark.parametrize("tasks", [2, 6])
def test_representation_passes_the_encoder_once(tasks):
    model, passes = MLP(tasks), []
    inner = model.encoder[0](model.x)
    inner.grad_fn.register_prehook(lambda _: passes.append(1))
    h = model.encoder[1:](inner)
    fastmtl.AlignedMTL().backward(losses_of(model, h), representation=h)
    assert len(passes) == 1


@pytest.mark.parametrize("option", ["representation", "features"])
def test_cut_retain_graph(option):
    model = MLP(3)
    h = model.encoder(model.x)
    losses, method = losses_of(model, h), fastmtl.AlignedMTL()
    method.backward(losses, **{option: h}, retain_graph=True)
    once = grads_of(model.parameters())
    method.backward(losses, **{option: h})
    for _ in range(2):
        for p, g in zip(model.parameters(), once, strict=True):
            assert torch.equal(p.grad, 2 * g)
        with pytest.raises(RuntimeError, match="second time"):
            method.backward(losses, **{option: h})


@pytest.mark.parametrize("option", ["representation", "features"])
def test_cut_hooks_fire_once(option):
    model = MLP(3)
    h = model.encoder(model.x)
    fired, seen = [], []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(fired.append)
        p.register_hook(seen.append)
    fastmtl.AlignedMTL().backward(losses_of(model, h), **{option: h})
    assert {id(p) for p in fired} == {id(p) for p in model.parameters()}
    assert len(fired) == len(seen) == len(list(model.parameters()))


# ------------------------------------------------------------------------------------------------ features


def in_full(model):
    return fastmtl.AlignedMTL().backward(losses_of(model, model.encoder(model.x)), model.encoder.parameters())


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("make", [lambda: MLP(1), lambda: MLP(2), lambda: MLP(5), MTAN], ids=["1", "2", "5", "mtan"])
def test_features_equal_the_full_passes(make, batched):
    plain = make()
    expected = in_full(plain)
    for retain_graph in (False, True):
        model = make()
        h = model.encoder(model.x)
        info = fastmtl.AlignedMTL().backward(
            losses_of(model, h), features=h, batched=batched, retain_graph=retain_graph
        )
        assert relative(info.gram, expected.gram) <= 1e-6
        assert relative(info.alpha, expected.alpha) <= 1e-5
        same_gradients(model, plain, 5e-6)


@pytest.mark.parametrize("batched", [False, True])
def test_features_nested_and_not_reached_by_all(batched):
    def run(**options):
        a, b, own = (nn.Parameter(randn(6, seed=s)) for s in range(3))
        h = {"low": [a.tanh(), a * b], "mask": torch.tensor([1, 0]), "unused": b.exp()}
        low, product = h["low"]
        losses = [
            (low * randn(6, seed=5)).sum(),
            (product * randn(6, seed=6)).sum() + own.sum(),
            (product.sin() * low).sum(),
        ]
        options = {"features": h, **options} if options else {"shared": [a, b]}
        return fastmtl.AlignedMTL().backward(losses, **options), [a, b, own]

    info, parameters = run(batched=batched)
    expected, others = run()
    assert relative(info.gram, expected.gram) <= 1e-6
    for p, q in zip(parameters, others, strict=True):
        assert relative(p.grad, q.grad.to(F64)) <= 5e-6


def test_features_with_a_part_of_what_lies_behind_them():
    model, plain = MLP(3), MLP(3)
    h = model.encoder(model.x)
    info = fastmtl.AlignedMTL().backward(losses_of(model, h), model.encoder[0].parameters(), features=h)
    h = plain.encoder(plain.x)
    expected = fastmtl.AlignedMTL().backward(losses_of(plain, h), plain.encoder[0].parameters())
    assert relative(info.gram, expected.gram) <= 1e-6
    same_gradients(model, plain)


@pytest.mark.parametrize("regularised", [False, True])
def test_features_with_tied_weights(regularised):
    model, plain = Tied(regularised), Tied(regularised)
    h = model.encode()
    info = fastmtl.AlignedMTL().backward(model.losses([h] * 3), features=h)
    expected = fastmtl.AlignedMTL().backward(plain.losses([plain.encode()] * 3), [plain.table, plain.other])
    assert relative(info.gram, expected.gram) <= 1e-6
    same_gradients(model, plain)


@pytest.mark.parametrize(("batched", "expected"), [(False, 3), (True, 1)])
def test_features_run_the_heads_before_the_encoder(batched, expected):
    model, order = MLP(3), []
    inner = model.encoder[0](model.x)
    h = model.encoder[1:](inner)
    inner.grad_fn.register_prehook(lambda _: order.append("encoder"))
    losses = losses_of(model, h)
    for loss in losses:
        loss.grad_fn.register_prehook(lambda _: order.append("head"))
    fastmtl.AlignedMTL().backward(losses, features=h, batched=batched)
    assert order == ["head"] * 3 + ["encoder"] * expected


def test_features_for_a_method_that_is_not_of_the_gram():
    model, plain = MLP(3, F64), MLP(3, F64)
    parameters = list(model.encoder.parameters())
    h = model.encoder(model.x)
    fastmtl.GradDrop(generator=generator(3)).backward(losses_of(model, h), parameters, features=h)
    rows = gradient_rows(losses_of(plain, plain.encoder(plain.x)), list(plain.encoder.parameters()))
    for p, g in zip(parameters, fastmtl.GradDrop(generator=generator(3))(rows), strict=True):
        assert relative(p.grad, g) <= 1e-9


# ------------------------------------------------------------------------------------------------ groups


GROUPED = {"aligned": fastmtl.AlignedMTL(weights=[1.0, 2.0, 3.0], scale="median"), "mgda": fastmtl.MGDA()}


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("name", GROUPED)
def test_groups_equal_each_group_on_its_own(name, features):
    method, model = GROUPED[name], MLP(3)
    layers = [list(model.encoder[0].parameters()), list(model.encoder[2].parameters())]
    h = model.encoder(model.x)
    losses = losses_of(model, h)
    expected = [gradient_rows(losses, layer) for layer in layers]
    own = [torch.autograd.grad(losses[t], list(model.heads[t].parameters()), retain_graph=True) for t in range(3)]
    info = method.backward(losses, groups=[iter(layer) for layer in layers], features=h if features else None)
    assert info.alpha.shape == (2, 3)
    assert info.gram.shape == (2, 3, 3)
    if name == "aligned":
        assert info.eigenvalues.shape == (2, 3)
        assert info.rank.tolist() == [3, 3]
    for n, (layer, rows) in enumerate(zip(layers, expected, strict=True)):
        G = torch.stack([flat(row) for row in rows])
        assert relative(info.gram[n], G @ G.T) <= 1e-6
        for p, g in zip(layer, method(rows), strict=True):
            assert relative(p.grad, g.to(F64)) <= 5e-6
    for head, grads in zip(model.heads, own, strict=True):
        for p, g in zip(head.parameters(), grads, strict=True):
            assert torch.equal(p.grad, g)


def test_one_group_is_the_whole():
    model, whole = Model(), Model()
    info = fastmtl.AlignedMTL().backward(model.losses(), groups=[model.shared()])
    expected = fastmtl.AlignedMTL().backward(whole.losses(), whole.shared())
    assert relative(info.alpha, expected.alpha[None]) <= 1e-6
    same_gradients(model, whole)


def test_what_is_in_no_group_gets_the_sum():
    model = Model()
    first, second = model.trunk[0], model.trunk[2]
    losses = model.losses()
    plain = torch.autograd.grad(sum(losses), list(second.parameters()), retain_graph=True)
    rows = gradient_rows(losses, list(first.parameters()))
    fastmtl.AlignedMTL().backward(losses, groups=[first.parameters()])
    for p, g in zip(second.parameters(), plain, strict=True):
        assert relative(p.grad, g.to(F64)) <= 1e-6
    for p, g in zip(first.parameters(), fastmtl.AlignedMTL()(rows), strict=True):
        assert relative(p.grad, g.to(F64)) <= 2e-6


def test_groups_that_some_or_no_tasks_reach():
    a, b, c = (nn.Parameter(randn(5, seed=s)) for s in range(3))
    beside, alone = nn.Parameter(randn(2)), nn.Parameter(randn(3))
    G = randn(3, 2, 5, seed=7)
    losses = [(a * G[0, 0]).sum(), (a * G[1, 0]).sum() + (b * G[1, 1]).sum(), (b * G[2, 1]).sum() + c.sum()]
    info = fastmtl.AlignedMTL().backward(losses, groups=[[a], [b, beside], [alone]])
    zero = torch.zeros(5)
    assert relative(a.grad, svd_align(torch.stack([G[0, 0], G[1, 0], zero]))) <= 2e-6
    assert relative(b.grad, svd_align(torch.stack([zero, G[1, 1], G[2, 1]]))) <= 2e-6
    assert torch.equal(c.grad, torch.ones(5))
    assert beside.grad is None
    assert alone.grad is None
    assert info.rank.tolist() == [2, 2, 0]
    assert (info.alpha[2] == 0).all()
    assert (info.gram[2] == 0).all()


def test_groups_of_different_dtypes():
    a, b = nn.Parameter(randn(6)), nn.Parameter(randn(5, dtype=BF16, seed=1))
    G, H = randn(2, 6, seed=2), randn(2, 5, dtype=BF16, seed=3)
    losses = [(a * g).sum() + (b.float() * h.float()).sum() for g, h in zip(G, H, strict=True)]
    fastmtl.AlignedMTL().backward(losses, groups=[[a], [b]])
    assert a.grad.dtype is torch.float32
    assert b.grad.dtype is BF16
    assert relative(a.grad, svd_align(G)) <= 2e-6
    assert relative(b.grad, svd_align(H)) <= EPS[BF16]


def test_a_non_finite_group_leaves_the_others_finite():
    a, b = nn.Parameter(randn(6)), nn.Parameter(randn(5, seed=1))
    G = randn(2, 11, seed=2)
    losses = [(a * g[:6]).sum() + (b * g[6:]).sum() for g in G]
    losses[0] = losses[0] + torch.inf * a[0]
    info = fastmtl.AlignedMTL().backward(losses, groups=[[a], [b]])
    assert not a.grad.isfinite().any()
    assert relative(b.grad, svd_align(G[:, 6:])) <= 2e-6
    assert info.alpha[0].isnan().all()
    assert info.alpha[1].isfinite().all()


# ------------------------------------------------------------------------------------------------ tasks that are absent


NOTHING = {
    "None": lambda loss: None,
    "constant": lambda loss: loss.detach(),
    "constant NaN": lambda loss: torch.tensor(torch.nan),
}
WAYS = {
    "shared": lambda model, h: {"shared": model.encoder},
    "default": lambda model, h: {},
    "features": lambda model, h: {"features": h},
    "batched": lambda model, h: {"features": h, "batched": True},
    "groups": lambda model, h: {"groups": [list(part.parameters()) for part in (model.encoder[0], model.encoder[2])]},
    "representation": lambda model, h: {"representation": h},
}


@pytest.mark.parametrize("absent", [[0], [3], [1, 2]])
@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("way", WAYS)
def test_an_absent_task_is_a_missing_row(way, name, absent):
    """The others are aggregated beside a row of zeros, whatever stands for the loss, and its head is left alone."""
    method, model, plain = fastmtl.AlignedMTL(weights=[1.0, 2.0, 3.0, 4.0]), MLP(4), MLP(4)
    for p in model.heads[absent[0]].parameters():
        p.grad = torch.ones_like(p)
    h = model.encoder(model.x)
    losses = [NOTHING[name](loss) if t in absent else loss for t, loss in enumerate(losses_of(model, h))]
    info = method.backward(losses, **WAYS[way](model, h))

    h = plain.encoder(plain.x)
    target = [h] if way == "representation" else list(plain.encoder.parameters())
    rows: list = gradient_rows(losses_of(plain, h), target)
    for t in absent:
        rows[t] = [None] * len(target)
    if way == "groups":
        expected = [*method([row[:2] for row in rows]), *method([row[2:] for row in rows])]
    else:
        expected = method(rows)
    if way == "representation":
        expected = torch.autograd.grad(h, list(plain.encoder.parameters()), expected)
    for p, g in zip(model.encoder.parameters(), expected, strict=True):
        assert relative(p.grad, g.to(F64)) <= 5e-6
    present = [t for t in range(4) if t not in absent]
    assert (info.alpha[..., absent] == 0).all()
    assert (info.alpha[..., present] != 0).all()
    assert (info.gram[..., absent, :] == 0).all()
    for t, head in enumerate(model.heads):
        for p in head.parameters():
            if t in present:
                assert p.grad is not None
            else:
                assert p.grad is None if t != absent[0] else (p.grad == 1).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_step_without_any_task_changes_nothing(way):
    model = MLP(3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    h = model.encoder(model.x)
    for losses in ([None] * 3, [loss.detach() for loss in losses_of(model, h)]):
        with pytest.raises(
            ValueError, match=r"losses: expected at least one loss that requires grad, got none among 3"
        ):
            fastmtl.AlignedMTL().backward(losses, **WAYS[way](model, h))
    assert all((p.grad == 1).all() for p in model.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_the_graph_is_freed_after_the_last_task_that_is_there(way):
    for retain in (True, False):
        model = MLP(3)
        h = model.encoder(model.x)
        first, second, _ = losses_of(model, h)
        fastmtl.AlignedMTL().backward([first, second, None], **WAYS[way](model, h), retain_graph=retain)
        if retain:
            torch.autograd.grad(second, h)
        else:
            with pytest.raises(RuntimeError, match="second time"):
                torch.autograd.grad(h.sum(), model.encoder[0].weight)


def test_absent_tasks_of_every_method():
    """A step with a task that is not there is finite, and its weight is zero: also where losses or state are needed."""
    methods = [
        *(fastmtl.AlignedMTL(), fastmtl.MGDA(), fastmtl.MGDA(normalization="loss+"), fastmtl.CAGrad(), fastmtl.IMTL()),
        *(fastmtl.NashMTL(), fastmtl.NashMTL(every=2), fastmtl.FairGrad(), fastmtl.UPGrad(), fastmtl.ConFIG()),
        *(fastmtl.PCGrad(), fastmtl.GradVac(), fastmtl.RLW(), fastmtl.Uniform(), fastmtl.DualProj()),
    ]
    for method in methods:
        for step in range(3):
            model = MLP(3)
            h = model.encoder(model.x)
            losses: list = losses_of(model, h)
            losses[step] = None
            info = method.backward(losses, model.encoder)
            assert info.alpha.isfinite().all(), method
            assert (info.gram[step] == 0).all()
            assert any(p.grad.any() for p in model.encoder.parameters()), method
    model = MLP(3)
    h = model.encoder(model.x)
    fastmtl.GradDrop().backward([model.loss(0, h), None, model.loss(2, h)], model.encoder)
    assert all(p.grad.isfinite().all() for p in model.encoder.parameters())


# ------------------------------------------------------------------------------------------------ what is shared


def taken(scales, way):
    """T entries of a tensor of scales, as users write it."""
    return {
        "index": lambda: [scales[t] for t in range(3)],
        "negative index": lambda: [scales[t - 3] for t in range(3)],
        "iteration": lambda: list(scales),
        "unbind": lambda: scales.unbind(),
        "select": lambda: [scales.select(-1, t) for t in range(3)],
    }[way]()


@pytest.mark.parametrize("way", ["index", "negative index", "iteration", "unbind", "select"])
def test_learned_scales_of_losses_are_not_shared(way):
    """Kendall's log-variances, by a parameter of the user's: each loss reads an entry of its own."""
    model, named = MLP(3), MLP(3)
    scales, others = nn.Parameter(randn(3, seed=5)), nn.Parameter(randn(3, seed=5))

    def losses(model, scales):
        plain = losses_of(model, model.encoder(model.x))
        return [torch.exp(-s) * loss + s for s, loss in zip(taken(scales, way), plain, strict=True)]

    expected = torch.autograd.grad(sum(losses(named, others)), others)[0]
    found = fastmtl.AlignedMTL().backward(losses(model, scales))
    given = fastmtl.AlignedMTL().backward(losses(named, others), shared=named.encoder)
    assert relative(found.gram, given.gram) <= 1e-12
    assert relative(scales.grad, expected.to(F64)) <= 1e-6
    assert relative(others.grad, expected.to(F64)) <= 1e-6
    same_gradients(model, named)


@pytest.mark.parametrize("make", [fastmtl.scalarization.IMTLL, fastmtl.scalarization.Uncertainty])
def test_what_scalarizations_learn_is_not_shared(make):
    model, named = MLP(3), MLP(3)
    scales, others = make(3), make(3)

    def losses(model, scales):
        plain = losses_of(model, model.encoder(model.x))
        if isinstance(scales, fastmtl.scalarization.IMTLL):
            return scales.scaled(plain)
        return [0.5 * torch.exp(-scales.s[t]) * loss + 0.5 * scales.s[t] for t, loss in enumerate(plain)]

    found = fastmtl.AlignedMTL().backward(losses(model, scales))
    given = fastmtl.AlignedMTL().backward(losses(named, others), shared=named.encoder)
    assert relative(found.gram, given.gram) <= 1e-12
    assert torch.equal(scales.s.grad, others.s.grad)
    same_gradients(model, named)


@pytest.mark.parametrize(
    ("rows", "whole", "shared"), [((0, 1, 2), False, False), ((0, 1, 0), False, True), ((0, 1, 2), True, True)]
)
def test_entries_that_two_losses_read_are_shared(rows, whole, shared):
    """A task embedding is parted; a table of which two tasks read the same row is not, nor one that is read whole."""
    x, G, base = randn(4, seed=1), randn(3, 4, seed=2), nn.Parameter(randn(4, seed=3))

    def losses(table):
        found = [((table[row] * x).sin() * g).sum() + (base * g).sum() for row, g in zip(rows, G, strict=True)]
        return [loss + table.square().sum() for loss in found] if whole else found

    table, other = nn.Parameter(randn(3, 4, seed=4)), nn.Parameter(randn(3, 4, seed=4))
    info = fastmtl.AlignedMTL().backward(losses(table))
    expected = fastmtl.AlignedMTL().backward(losses(other), [base, other] if shared else [base])
    assert relative(info.gram, expected.gram) <= 1e-12
    assert relative(table.grad, other.grad.to(F64)) <= 1e-6


def test_inputs_that_require_grad_are_not_shared():
    model, named = MLP(3), MLP(3)
    model.x.requires_grad_()
    expected = torch.autograd.grad(sum(losses_of(model, model.encoder(model.x))), model.x)[0]
    for way in ("default", "features"):
        model.zero_grad()
        named.zero_grad()
        model.x.grad = None
        h = model.encoder(model.x)
        found = fastmtl.AlignedMTL().backward(losses_of(model, h), **WAYS[way](model, h))
        given = fastmtl.AlignedMTL().backward(losses_of(named, named.encoder(named.x)), named.encoder)
        assert relative(found.gram, given.gram) <= 1e-12
        assert relative(model.x.grad, expected.to(F64)) <= 1e-6
        same_gradients(model, named)
    for p in model.parameters():
        p.requires_grad_(False)
    h = model.encoder(model.x)
    info = fastmtl.AlignedMTL().backward([loss + (h * t).sum() for t, loss in enumerate(losses_of(model, h))])
    assert info.rank == 3  # where no parameter is left, the inputs are what is trained


class Outputs(nn.Module):
    """A model that returns the outputs of all heads, and what is behind them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self):
        h = self.model.encoder(self.model.x)
        return (*(head(h) for head in self.model.heads), h)


@pytest.mark.parametrize("used", [3, 2])
def test_heads_joined_by_hooks_of_the_module_are_not_shared(used):
    """A full backward hook puts one node behind all outputs: what one loss needs of it leads to one head."""
    model, plain = MLP(3), MLP(3)
    joined = Outputs(model)
    joined.register_full_backward_hook(lambda *_: None)
    joined.model.x.requires_grad_()
    info = fastmtl.AlignedMTL().backward([out.square().mean() for out in joined()[:used]])
    expected = fastmtl.AlignedMTL().backward([out.square().mean() for out in Outputs(plain)()[:used]])
    assert relative(info.gram, expected.gram) <= 1e-12
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert relative(p.grad, q.grad.to(F64)) <= 2e-6


def test_hooks_of_leaves_that_get_no_gradient_fire_as_in_any_backward():
    """DistributedDataParallel waits for them."""

    class Unused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g, None

    def fired(step):
        a, b = nn.Parameter(randn(3)), nn.Parameter(randn(3, seed=1))
        calls = []
        for name, p in (("a", a), ("b", b)):
            p.register_post_accumulate_grad_hook(lambda p, name=name: calls.append((name, p.grad is None)))
        h = Unused.apply(a, b)
        step([h.sum(), h.square().sum()], a, h)
        return sorted(calls)

    method = fastmtl.AlignedMTL()
    expected = fired(lambda losses, a, h: sum(losses).backward())
    assert expected == [("a", False), ("b", True)]
    assert fired(lambda losses, a, h: method.backward(losses, [a])) == expected
    assert fired(lambda losses, a, h: method.backward(losses)) == expected
    assert fired(lambda losses, a, h: method.backward(losses, features=h)) == expected
    assert fired(lambda losses, a, h: method.backward(losses, representation=h)) == expected
