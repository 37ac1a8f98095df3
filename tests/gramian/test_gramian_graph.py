"""`engine="gramian"` on graphs of every shape: where heads begin, what they share, and what must stay as it was.

Every graph is held to plain autograd: T passes, the Gram of their gradients, and Aligned-MTL by an SVD.
"""

import math
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
from gramian_models import LAYERS, MODELS, Multitask, build, mlp
from helpers import F32, F64, Fail, dtype_id, flat, randn, relative, svd_align
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import fastmtl
from fastmtl.gramian import cost

LIMIT = {F32: 1e-4, F64: 1e-9}
GRAM = {F32: 1e-5, F64: 1e-12}

dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=dtype_id)


class Graph:
    """Parameters by name, each drawn from a seed of its own, and losses made from them.

    `losses(p, x)` gets the parameters as attributes and `x(*shape)`, constant data.
    """

    def __init__(self, losses, shared, dtype=F64, **shapes):
        self.dtype, self.make = dtype, losses
        for k, (name, shape) in enumerate(shapes.items()):
            setattr(self, name, nn.Parameter(0.5 * randn(*shape, dtype=dtype, seed=10 + k)))
        self.parameters = {name: getattr(self, name) for name in shapes}
        self.shared = [self.parameters[name] for name in shared.split()]

    def losses(self):
        return self.make(self, lambda *shape: randn(*shape, dtype=self.dtype, seed=1))

    def rows(self, parameters):
        """[T][K] by passes of plain autograd, zeros where a loss does not reach a parameter."""
        rows = []
        for loss in self.losses():
            grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)])
        return rows


def check(losses, shared, dtype=F64, method=None, full_rank=True, **shapes):
    """Aligned-MTL, or Uniform for tasks that are dependent, on this graph; returns what the engine saw."""
    graph = Graph(losses, shared, dtype, **shapes)
    G = torch.stack([flat(row) for row in graph.rows(graph.shared)])
    method = fastmtl.AlignedMTL() if full_rank else fastmtl.Uniform()
    info = method.backward(graph.losses(), graph.shared, engine="gramian")
    assert isinstance(info.explicit, tuple)
    close_gram(info.gram, G @ G.T, GRAM[dtype])
    expected = svd_align(G.to(dtype)) if full_rank else G.mean(0)
    got = [torch.zeros_like(p) if p.grad is None else p.grad for p in graph.shared]
    assert relative(flat(got), expected) <= LIMIT[dtype]
    others = {name: p for name, p in graph.parameters.items() if all(p is not q for q in graph.shared)}
    for k, (name, p) in enumerate(others.items()):
        own = sum(row[k] for row in graph.rows(list(others.values())))
        assert p.grad is not None, name
        assert relative(p.grad, own) <= LIMIT[dtype], name
    return info


def close_gram(got, expected, limit):
    norms = expected.diagonal().sqrt()
    size = norms[:, None] * norms
    error = (got - expected).abs()
    assert torch.where(size > 0, error / size, error).nan_to_num(math.inf).max() <= limit


def grads_of(parameters):
    return [None if p.grad is None else p.grad.clone() for p in parameters]


def three(dtype=F32):
    """A model with a bit of everything."""
    return build(
        lambda: Multitask(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 7), nn.LayerNorm(7), nn.Tanh()),
            randn(5, 3, 6, 4, seed=1),
        ),
        dtype,
    )


def backward(model, engine="gramian", method=None, **options):
    return (method or fastmtl.AlignedMTL()).backward(model.losses(), model.shared(), engine=engine, **options)


# ------------------------------------------------------------------------------------------------ where heads begin


@dtypes
def test_a_head_without_parameters(dtype):
    def losses(p, x):
        h = (x(6, 4) @ p.w).tanh()
        return [h.square().sum(), h.exp()[2:].sum(), (h @ p.own).cos().sum()]

    check(losses, "w", dtype, w=(4, 5), own=(5, 2))


def test_a_head_that_takes_the_features_by_several_ways():
    def losses(p, x):
        h = (x(6, 4) @ p.w).tanh()
        return [((h @ p.a).sin() * (h @ p.b)).sum(), (h * h.exp() + h).mean(), F.softmax(h, 0)[:, 0].square().sum()]

    check(losses, "w", w=(4, 5), a=(5, 2), b=(5, 2))


@dtypes
def test_heads_at_several_depths(dtype):
    def losses(p, x):
        a = (x(6, 4) @ p.u).tanh()
        b = (a @ p.v).tanh()
        c = (b @ p.w).tanh()
        return [
            (a @ p.first).square().sum() + c.square().sum(),
            (b * a[:, :3]).sum(),
            (c @ p.last).sin().sum() + (torch.cat([a, b, c], 1) @ p.all).cos().sum(),
        ]

    check(losses, "u v w", dtype, u=(4, 5), v=(5, 3), w=(3, 4), first=(5, 2), last=(4, 2), all=(12, 2))


def test_a_layer_that_only_some_tasks_share():
    """What two of three heads have in common: part of the shared parameters, or beside them."""

    def losses(p, x):
        h = (x(6, 4) @ p.w).tanh()
        m = (h @ p.m).tanh()
        return [(m @ p.a).square().sum(), (m * m.flip(0)).exp().sum(), (h @ p.b).sin().sum()]

    shapes = {"w": (4, 5), "m": (5, 3), "a": (3, 2), "b": (5, 2)}
    for shared in ("w m", "w", "m", "m w"):
        check(losses, shared, full_rank=shared != "m", **shapes)


@pytest.mark.parametrize("shared", ["first", "second", "third", "first third", "second first", "first second third"])
def test_some_of_the_layers(shared):
    """The others that several losses reach get the gradient of the sum."""

    def losses(p, x):
        h = (((x(6, 4) @ p.first).tanh() @ p.second).tanh() @ p.third).tanh()
        return [(h @ p.a).square().sum(), (h @ p.b).sin().sum(), h.exp().sum() + p.a.sum()]

    check(losses, shared, first=(4, 5), second=(5, 4), third=(4, 5), a=(5, 2), b=(5, 3))


def test_outputs_of_one_operation():
    """Each task takes another output; some are not taken."""

    def losses(p, x):
        h = (x(6, 4) @ p.w).tanh()
        a, b, c, _ = h.split([1, 2, 3, 2], 1)
        values, places = h.max(1)
        first, *_ = h.unbind(1)
        return [
            a.exp().sum() + first.sin().sum(),
            (b @ p.b).sum() + values.square().sum(),
            (c * places[:, None]).sin().sum(),
        ]

    check(losses, "w", w=(4, 8), b=(2, 3))


def test_losses_from_one_operation():
    def losses(p, x):
        h = (x(6, 4) @ p.w).tanh().exp() @ p.v
        return list(h.square().mean(0).unbind())

    check(losses, "w v", w=(4, 5), v=(5, 3))


def test_losses_that_are_elements_of_one_tensor():
    def losses(p, x):
        each = ((x(3, 6, 4) @ p.w).tanh() @ p.v).square().mean((1, 2))
        return [each[0], each[1:2], each[2].reshape(1, 1)]

    check(losses, "w v", w=(4, 5), v=(5, 3))


def test_a_loss_that_is_made_from_others():
    """One loss lies behind another: the sum of two, the product of two, a multiple."""

    def losses(p, x):
        h = (x(6, 4) @ p.w).tanh()
        a, b = (h @ p.a).square().sum(), h.exp().mean()
        return [a, b, a * b, a + b]

    check(losses, "w", full_rank=False, w=(4, 5), a=(5, 2))


@dtypes
def test_a_loss_passed_twice(dtype):
    def losses(p, x):
        h = (x(6, 4) @ p.w + p.b).tanh()
        a, b = (h @ p.a).square().sum(), h.exp().mean()
        return [a, b, a]

    check(losses, "w b", dtype, full_rank=False, w=(4, 5), b=(5,), a=(5, 2))


@dtypes
def test_a_loss_passed_twice_is_one_task_for_the_rank(dtype):
    def losses(p, x):
        h = (x(6, 4) @ p.w).tanh()
        a, b = (h @ p.a).square().sum(), h.exp().mean()
        return [a, b, a]

    info = check(losses, "w", dtype, w=(4, 5), a=(5, 2))
    assert info.rank == 2


def test_a_loss_that_is_a_parameter():
    def losses(p, x):
        return [p.n, (x(6, 4) @ p.w).tanh().mean() * p.n, (x(6, 4) @ p.w).square().mean()]

    check(losses, "n w", n=(), w=(4, 5))
    check(losses, "w", n=(), w=(4, 5))


def test_losses_that_share_no_operation():
    """A forward pass of its own for each loss."""

    def losses(p, x):
        return [(F.linear(x(6, 4) + k, p.w, p.b).tanh() * (k + 1)).square().sum() for k in range(3)]

    check(losses, "w b", w=(5, 4), b=(5,))


def test_no_common_node_but_the_parameters_in_part():
    def losses(p, x):
        h = (x(6, 4) @ p.w).tanh()
        return [(h @ p.v).square().sum(), (h @ p.a).sin().sum(), (x(3, 5).exp() @ p.v).cos().sum()]

    check(losses, "w v", w=(4, 5), v=(5, 3), a=(5, 2))


@dtypes
def test_a_loss_that_reaches_no_shared_parameter(dtype):
    def losses(p, x):
        h = (x(6, 4) @ p.w).tanh()
        return [(h @ p.a).square().sum(), p.own.exp().sum(), h.exp().mean()]

    info = check(losses, "w", dtype, w=(4, 5), a=(5, 2), own=(3,))
    assert info.rank == 2
    assert info.alpha[1] == 0
    assert (info.gram[1] == 0).all()


@dtypes
def test_tasks_that_miss_some_parameters(dtype):
    def losses(p, x):
        a, b = (x(6, 4) @ p.u).tanh(), (x(6, 3) @ p.v).tanh()
        return [a.square().sum(), b.exp().sum(), (a * b).sum(), (b @ p.own).sin().sum()]

    check(losses, "u v", dtype, u=(4, 5), v=(3, 5), own=(5, 2))


def test_tasks_that_have_no_parameter_in_common():
    def losses(p, x):
        return [(x(6, 4) @ p.u).exp().sum(), (x(6, 3) @ p.v).exp().sum()]

    info = check(losses, "u v", u=(4, 5), v=(3, 5))
    assert info.gram[0, 1] == 0


def test_a_shared_parameter_of_one_task_alone():
    """As the user says: it is aggregated, though one loss alone reaches it."""

    def losses(p, x):
        h = (x(6, 4) @ p.w).tanh()
        return [(h @ p.a + p.c).square().sum(), (h @ p.b).sin().sum(), h.exp().mean()]

    check(losses, "w a c", w=(4, 5), a=(5, 2), b=(5, 2), c=(2,))
    check(losses, "a b w", w=(4, 5), a=(5, 2), b=(5, 2), c=(2,))


def test_parameters_that_no_loss_reaches():
    model = three()
    unused, kept = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 4))
    kept.grad = before = torch.full((4, 4), 7.0)
    plain = three()
    backward(plain)
    fastmtl.AlignedMTL().backward(model.losses(), [unused, *model.shared(), kept], engine="gramian")
    assert unused.grad is None
    assert kept.grad is before
    assert (before == 7.0).all()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_no_loss_reaches_any_of_them():
    model = three()
    with pytest.raises(ValueError, match="shared"):
        fastmtl.AlignedMTL().backward(model.losses(), [nn.Parameter(torch.ones(3))], engine="gramian")
    assert all(p.grad is None for p in model.parameters())


def test_data_that_requires_grad():
    """A leaf that several losses reach and that is not shared gets the gradient of their sum."""

    def losses(p, x):
        h = ((p.x @ p.w).tanh() @ p.v).tanh()
        return [(h @ p.a).square().sum(), h.exp().sum() + p.x.square().sum()]

    check(losses, "w v", x=(6, 4), w=(4, 5), v=(5, 5), a=(5, 2))


def test_a_constant_path():
    """Parts of the graph through which no gradient comes: detached, no_grad, comparisons."""

    def losses(p, x):
        h = (x(6, 4) @ p.w).tanh()
        with torch.no_grad():
            target = h.exp()
        gate = (h > 0).to(h.dtype)
        return [(h - target).square().sum(), (h * gate @ p.a).sum(), (h.detach() @ p.a).sum() + h.sign().sum()]

    info = check(losses, "w", w=(4, 5), a=(5, 2))
    assert info.rank == 2


# ------------------------------------------------------------------------------------------------ both sides


@dtypes
def test_in_the_trunk_and_in_one_head(dtype):
    def losses(p, x):
        h = F.linear((x(6, 4) @ p.w).tanh(), p.tied).tanh()
        return [F.linear(h, p.tied).square().sum(), (h @ p.a).sin().sum(), h.exp().mean()]

    check(losses, "w tied", dtype, w=(4, 5), tied=(5, 5), a=(5, 2))


@dtypes
def test_an_embedding_in_the_trunk_and_as_one_heads_output(dtype):
    ids = torch.tensor([[0, 3, 3], [1, 4, 0], [2, 2, 2]])

    def losses(p, x):
        h = (F.embedding(ids, p.table, padding_idx=2) @ p.w).tanh()
        logits = F.linear(h, p.table).flatten(0, 1)
        return [F.cross_entropy(logits, ids.flatten()), (h @ p.a).sin().sum(), h.exp().mean()]

    check(losses, "table w", dtype, table=(5, 6), w=(6, 6), a=(6, 2))


@dtypes
def test_in_the_heads_only(dtype):
    def losses(p, x):
        h = (x(6, 4) @ p.w).tanh()
        return [
            F.linear(h, p.tied, p.b).square().sum(),
            F.linear(h.exp(), p.tied).sin().sum(),
            (h @ p.a + p.b[0]).sum(),
        ]

    shapes = {"w": (4, 5), "tied": (3, 5), "b": (3,), "a": (5, 2)}
    check(losses, "w tied b", dtype, **shapes)
    check(losses, "tied", dtype, full_rank=False, **shapes)
    check(losses, "w", dtype, **shapes)


def test_in_the_heads_only_and_found_by_default():
    def losses(p, x):
        h = (x(6, 4) @ p.w).tanh()
        return [F.linear(h, p.tied).square().sum(), F.linear(h.exp(), p.tied).sin().sum(), (h @ p.a).sum()]

    shapes = {"w": (4, 5), "tied": (3, 5), "a": (5, 2)}
    named, found = Graph(losses, "w tied", **shapes), Graph(losses, "w tied", **shapes)
    expected = fastmtl.AlignedMTL().backward(named.losses(), named.shared, engine="full")
    info = fastmtl.AlignedMTL().backward(found.losses(), engine="gramian")
    close_gram(info.gram, expected.gram, GRAM[F64])
    for name, p in found.parameters.items():
        assert relative(p.grad, named.parameters[name].grad) <= LIMIT[F64]


def test_a_penalty_on_a_weight_in_one_loss():
    """A use that has no closed form beside one that has: both count, and so does what they have in common."""

    def losses(p, x):
        h = F.linear(x(6, 4), p.w).tanh()
        return [(h @ p.a).square().sum() + 0.3 * p.w.square().sum(), h.exp().mean(), (h @ p.a).sin().sum()]

    check(losses, "w", w=(5, 4), a=(5, 2))


def test_a_penalty_in_all_losses():
    def losses(p, x):
        h = F.linear(F.linear(x(6, 4), p.w).tanh(), p.v).tanh()
        penalty = 0.1 * (p.w.square().sum() + p.v.abs().sum())
        return [(h @ p.a).square().sum() + penalty, h.exp().mean() + 2 * penalty, h.sin().sum() - penalty]

    check(losses, "w v", w=(5, 4), v=(3, 5), a=(3, 2))


def test_losses_weighted_by_parameters():
    """The uncertainty weighting: parameters next to the losses, here among the shared ones too."""

    def losses(p, x):
        h = (x(6, 4) @ p.w).tanh()
        plain = [(h @ p.a).square().sum(), h.exp().mean(), h.sin().sum()]
        return [loss * (-s).exp() + s for loss, s in zip(plain, p.s.unbind(), strict=True)]

    shapes = {"w": (4, 5), "s": (3,), "a": (5, 2)}
    check(losses, "w", **shapes)
    check(losses, "w s", **shapes)


def test_a_penalty_on_a_gradient():
    """The graph of a backward pass, in which operations and parameters appear again."""

    def losses(p, x):
        x = x(6, 4).requires_grad_()
        h = F.linear(F.linear(x, p.w).tanh(), p.v).tanh()
        slope = torch.autograd.grad(h.square().sum(), x, create_graph=True)[0]
        return [(h @ p.a).square().sum(), slope.square().sum(), h.exp().mean()]

    check(losses, "w v", w=(5, 4), v=(3, 5), a=(3, 2))


# ------------------------------------------------------------------------------------------------ scales, not finite


@pytest.mark.parametrize("scales", [(1e25, 1e25, 1e25), (1e-25, 1e-25, 1e-25), (1e25, 1.0, 1e-25)])
def test_losses_of_extreme_size(scales):
    """Squares of these gradients are no float32."""
    full, model = three(), three()
    infos = []
    for m, engine in ((full, "full"), (model, "gramian")):
        losses = [scale * loss for scale, loss in zip(scales, m.losses(), strict=True)]
        infos.append(fastmtl.Uniform().backward(losses, m.shared(), engine=engine))
    assert infos[1].gram.isfinite().all()
    close_gram(infos[1].gram, infos[0].gram, GRAM[F32])
    for p, q in zip(model.parameters(), full.parameters(), strict=True):
        assert p.grad.isfinite().all()
        assert relative(p.grad, q.grad) <= LIMIT[F32]


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_a_loss_that_is_not_finite(name, factor):
    """A loss scaler finds it in `.grad` and skips the step."""
    full, model = build(MODELS[name]), build(MODELS[name])
    for m, engine in ((full, "full"), (model, "gramian")):
        losses = m.losses()
        losses[1] = losses[1] * factor
        info = fastmtl.AlignedMTL().backward(losses, m.shared(), engine=engine)
        assert info.alpha.isnan().all()
        assert info.rank == 0
        for p in m.shared():
            assert not p.grad.isfinite().any()
        for t, head in enumerate(m.heads):
            assert all(bool(p.grad.isfinite().all()) == (t != 1) for p in head.parameters())


def test_rows_of_an_embedding_beside_a_loss_that_is_not_finite():
    model = build(LAYERS["embedding"])
    losses = model.losses()
    fastmtl.AlignedMTL().backward([losses[0], losses[1] * math.nan, losses[2]], model.shared(), engine="gramian")
    assert not any(p.grad.isfinite().all() for p in model.shared())


def test_no_gradient_at_all():
    """Zero losses: the Gram is zero and so is the result."""
    model = three()
    info = fastmtl.AlignedMTL().backward([0.0 * loss for loss in model.losses()], model.shared(), engine="gramian")
    assert not info.gram.any()
    assert not any(p.grad.any() for p in model.shared())


# ------------------------------------------------------------------------------------------------ hooks


def test_hooks_of_parameters_run_once_on_what_is_committed():
    model, plain = three(), three()
    backward(plain)
    seen, fired = {}, {}
    for name, p in model.named_parameters():
        p.register_hook(lambda g, name=name: (seen.setdefault(name, []).append(g.clone()), g / 2)[1])
        p.register_post_accumulate_grad_hook(lambda p, name=name: fired.setdefault(name, []).append(p.grad.clone()))
    backward(model)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert len(seen[name]) == len(fired[name]) == 1, name
        assert torch.equal(seen[name][0], q.grad)
        assert torch.equal(p.grad, q.grad / 2)
        assert torch.equal(p.grad, fired[name][0])


def test_optimizer_in_backward():
    model, plain = three(), three()
    for p in model.parameters():
        optimizer = torch.optim.SGD([p], lr=0.1)

        def step(_, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(step)
    backward(model)
    backward(plain)
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.grad is None


def test_hooks_of_activations_that_scale():
    """Gradient reversal and the like: part of the gradients, in the Gram and in what is committed."""

    def losses(p, x):
        h = (x(6, 4) @ p.w).tanh()
        h.register_hook(lambda g: -0.5 * g)
        y = F.linear(h, p.v).tanh()
        y.register_hook(lambda g: 3 * g)
        own = y.sin()
        own.register_hook(lambda g: 2 * g)
        return [(y @ p.a).square().sum(), own.exp().mean(), y.cos().sum()]

    check(losses, "w v", w=(4, 5), v=(3, 5), a=(3, 2))


def test_hooks_of_the_features():
    """Where the heads begin: a hook on the last layer of the trunk, and a gradient that is kept for a look at it."""
    full, model = three(F64), three(F64)
    for m in (full, model):
        m.trunk[-1].register_full_backward_hook(lambda _, __, grads: None if grads[0] is not None else 1 / 0)
        m.trunk.register_forward_hook(lambda _, __, h: h.retain_grad())
    expected, info = backward(full, "full"), backward(model)
    close_gram(info.gram, expected.gram, GRAM[F64])
    for p, q in zip(model.parameters(), full.parameters(), strict=True):
        assert relative(p.grad, q.grad) <= LIMIT[F64]


def test_hooks_of_activations_where_heads_begin_behind_each_other():
    """A hook gets cotangents, never None for what another pass is to bring."""

    def losses(p, x):
        h = (x(6, 4) @ p.w).tanh()
        h.register_hook(lambda g: -0.5 * g)
        y = F.linear(h, p.v).tanh()
        y.register_hook(lambda g: 3 * g)
        z = y.sin()
        z.register_hook(lambda g: 2 * g)
        return [(y @ p.a).square().sum(), (z * y).exp().mean(), z.sum() + (h * h).sum()]

    check(losses, "w v", w=(4, 5), v=(3, 5), a=(3, 2))


def test_hooks_of_modules_that_scale():
    full, model = three(F64), three(F64)
    for m in (full, model):
        m.trunk[3].register_full_backward_hook(lambda _, grads, __: (2 * grads[0],))
        m.trunk[1].register_full_backward_pre_hook(lambda _, grads: (3 * grads[0],))
    expected, info = backward(full, "full"), backward(model)
    close_gram(info.gram, expected.gram, GRAM[F64])
    for p, q in zip(model.parameters(), full.parameters(), strict=True):
        assert relative(p.grad, q.grad) <= LIMIT[F64]


def test_hooks_that_look_at_numbers():
    """Nothing that a vectorised pass could do."""
    full, model = three(F64), three(F64)
    seen = []
    for m in (full, model):
        m.trunk[1].register_full_backward_hook(lambda _, grads, __: seen.append(grads[0].norm().item()))
    expected, info = backward(full, "full"), backward(model)
    close_gram(info.gram, expected.gram, GRAM[F64])
    for p, q in zip(model.parameters(), full.parameters(), strict=True):
        assert relative(p.grad, q.grad) <= LIMIT[F64]
    assert all(isinstance(x, float) for x in seen)


def test_no_hook_of_the_engine_stays():
    """The graph that is retained is as it was: a plain backward gives plain gradients and runs no other code."""
    for name in ("mlp", "vit", "mtan", "language model"):
        model, plain = build(MODELS[name], F64), build(MODELS[name], F64)
        losses = model.losses()
        fastmtl.AlignedMTL().backward(losses, model.shared(), engine="gramian", retain_graph=True)
        model.zero_grad()
        sum(losses).backward()
        sum(plain.losses()).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                assert relative(p.grad, q.grad) <= LIMIT[F64]


# ------------------------------------------------------------------------------------------------ what fails


class Failing:
    """A hook that raises at its n-th call, and counts them."""

    def __init__(self, at):
        self.at, self.calls = at, 0

    def __call__(self, *_):
        self.calls += 1
        if self.calls == self.at:
            raise ArithmeticError("here")


@pytest.mark.parametrize("place", ["in the trunk", "at its end", "in a head"])
def test_an_error_in_any_pass_leaves_gradients_as_they_were(place):
    """Whichever call of a hook raises: `.grad` is what it was, hooks of parameters too, and the graph still works."""

    def attempt(at):
        model = three(F64)
        h = model.trunk(model.x)
        inner = h.grad_fn.next_functions[0][0]
        losses = [2.0**t * (head(h) - model.y[t]).square().mean() for t, head in enumerate(model.heads)]
        hook = Failing(at)
        node = {"in the trunk": inner, "at its end": h.grad_fn, "in a head": losses[1].grad_fn.next_functions[0][0]}
        node[place].register_hook(hook)
        return model, losses, hook

    model, losses, hook = attempt(None)
    fastmtl.AlignedMTL().backward(losses, model.shared(), engine="gramian")
    expected, calls = grads_of(model.parameters()), hook.calls
    assert calls >= 1
    for at in range(1, calls + 1):
        model, losses, hook = attempt(at)
        fired = []
        for k, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 7.0) if k % 2 else None
            p.register_hook(fired.append)
        before = [p.grad for p in model.parameters()]
        with pytest.raises(ArithmeticError, match="here"):
            fastmtl.AlignedMTL().backward(losses, model.shared(), engine="gramian", retain_graph=True)
        for p, g in zip(model.parameters(), before, strict=True):
            assert p.grad is g
            assert g is None or (g == 7.0).all()
        assert not fired
        model.zero_grad()
        fastmtl.AlignedMTL().backward(losses, model.shared(), engine="gramian")
        for p, g in zip(model.parameters(), expected, strict=True):
            assert relative(p.grad, g) <= 1e-12
        assert len(fired) == len(expected)


def test_an_error_in_a_function():
    model = three()
    h = model.trunk(model.x)
    with pytest.raises(ArithmeticError, match="cannot be differentiated"):
        fastmtl.AlignedMTL().backward([h.sum(), Fail.apply(h).square().sum()], model.shared(), engine="gramian")
    h = Fail.apply(model.trunk(model.x))
    with pytest.raises(ArithmeticError, match="cannot be differentiated"):
        fastmtl.AlignedMTL().backward([h.sum(), h.square().sum()], model.shared(), engine="gramian")
    assert all(p.grad is None for p in model.parameters())


def test_a_value_that_was_overwritten():
    """Autograd's own error, not a wrong number from what was saved."""
    model = three()
    h = model.trunk[:3](model.x).tanh()
    losses = [model.trunk[3](h).sum(), (h * 1).square().sum()]
    with torch.no_grad():
        h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fastmtl.AlignedMTL().backward(losses, list(model.trunk[:4].parameters()), engine="gramian")
    assert all(p.grad is None for p in model.parameters())


def test_sparse_gradients_are_refused():
    table = nn.Embedding(6, 4, sparse=True)
    for engine in ("full", "gramian"):
        h = table(torch.tensor([0, 3, 3]))
        with pytest.raises(TypeError, match=r"sparse|dense"):
            fastmtl.AlignedMTL().backward([h.sum(), h.exp().sum()], table, engine=engine)
        assert table.weight.grad is None


def _needs_full():
    """Options for which task gradients are needed: name, arguments beside the losses, method."""
    return {
        "representation": lambda m, h: ({"representation": h}, fastmtl.AlignedMTL()),
        "features": lambda m, h: ({"features": h}, fastmtl.AlignedMTL()),
        "features, batched": lambda m, h: ({"features": h, "batched": True}, fastmtl.AlignedMTL()),
        "groups": lambda m, h: ({"groups": [m.shared()[:2], m.shared()[2:]]}, fastmtl.AlignedMTL()),
        "graddrop": lambda m, h: ({"shared": m.shared()}, fastmtl.GradDrop(generator=torch.Generator().manual_seed(1))),
    }


def _losses_at(model):
    h = model.trunk(model.x)
    return [(head(h) - model.y[t]).square().mean() for t, head in enumerate(model.heads)], h


@pytest.mark.parametrize("name", _needs_full())
def test_what_needs_the_full_engine(name):
    model = build(lambda: Multitask(mlp(5), randn(7, 5, seed=1)))
    losses, h = _losses_at(model)
    options, method = _needs_full()[name](model, h)
    with pytest.raises(ValueError, match=r"engine|gramian"):
        method.backward(losses, **options, engine="gramian")
    assert all(p.grad is None for p in model.parameters())

    results = []
    for engine in ("full", "auto"):
        model = build(lambda: Multitask(mlp(5), randn(7, 5, seed=1)))
        losses, h = _losses_at(model)
        options, method = _needs_full()[name](model, h)
        info = method.backward(losses, **options, engine=engine)
        assert info.explicit is None
        results.append(grads_of(model.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_process_groups_need_the_full_engine():
    model = three()
    with pytest.raises(ValueError, match=r"engine|gramian"):
        backward(model, process_group=True)
    assert all(p.grad is None for p in model.parameters())


def test_shards_need_the_full_engine():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for engine in ("gramian", "auto"):
            model = build(lambda: Multitask(mlp(5), randn(7, 5, seed=1)))
            fully_shard(model.trunk)
            shared = model.shared()  # before the forward
            losses = model.losses()
            if engine == "gramian":
                with pytest.raises(ValueError, match=r"engine|gramian"):
                    fastmtl.AlignedMTL().backward(losses, shared, engine=engine)
                assert all(p.grad is None for p in model.parameters())
            else:
                assert fastmtl.AlignedMTL().backward(losses, shared, engine=engine).explicit is None
                assert all(p.grad is not None for p in model.parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("engine", ["Gramian", "", "fast", None, 3])
def test_an_unknown_engine(engine):
    model = three()
    with pytest.raises(ValueError, match="engine"):
        backward(model, engine)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("engine", ["gramian", "auto"])
def test_arguments_are_checked_as_for_the_full_engine(engine):
    model = three()
    method = fastmtl.AlignedMTL()
    losses = model.losses()
    for arguments, error, match in (
        (([], model.shared()), ValueError, "losses"),
        (([losses[0].detach(), losses[1].detach()], model.shared()), ValueError, "losses"),
        (([losses[0], model.x], model.shared()), ValueError, r"losses\[1\]"),
        ((losses, [model.trunk[0].weight * 2]), ValueError, r"shared\[0\]"),
        ((losses, [*model.shared(), 3]), TypeError, r"shared\[6\]"),
        ((losses, model.trunk[0].weight), TypeError, "shared"),
        ((losses, []), ValueError, "shared"),
        ((losses, nn.Tanh()), ValueError, "shared"),
    ):
        with pytest.raises(error, match=match):
            method.backward(*arguments, engine=engine)
    with pytest.raises(ValueError, match="weights"):
        fastmtl.AlignedMTL(weights=[1.0, 2.0]).backward(losses, model.shared(), engine=engine)
    assert all(p.grad is None for p in model.parameters())
    method.backward(losses, model.shared(), engine=engine)  # nothing was freed


# ------------------------------------------------------------------------------------------------ saved values


class Box:
    """Holds a saved activation, so that one can see when it is given up."""

    def __init__(self, x):
        self.x = x


def boxed(model):
    """The losses, and weak references to everything that their graph saves."""
    boxes = []

    def pack(x):
        box = Box(x.detach())
        boxes.append(weakref.ref(box))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.x):
        losses = model.losses()
    return losses, boxes


FIRST = 2  # saved values of an operation
KINDS = ["mlp", "resnet18", "vit", "language model", "lstm", "mtan"]


def _saved_in_the_trunk(name):
    """How much a graph saves that more than one loss reaches: what is freed with the last of them, not with the first.

    A plain backward of every loss on its own frees the heads, one after the other; of all others a graph is left.
    """
    model = build(MODELS[name])
    losses, boxes = boxed(model)
    before = len(boxes)
    del losses[1:]  # the heads of the other losses go; the trunk stays
    heads = before - sum(box() is not None for box in boxes)
    return before - round(heads * model.tasks / (model.tasks - 1))


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("name", KINDS)
def test_the_graph_is_freed(name, monkeypatch):
    """With the call, not when the losses go; the heads only where none begins behind what another one takes.

    What the first operations saved, the model's inputs, stays: no cotangent passes them. Where a graph is so small that
    all cotangents pass it at once, it goes with the losses.
    """
    monkeypatch.setattr(cost, "goes_at_once", lambda *_: False)
    model = build(MODELS[name])
    losses, boxes = boxed(model)
    fastmtl.AlignedMTL().backward(losses, model.shared(), engine="gramian")
    kept = sum(box() is not None for box in boxes)
    if name in ("language model", "mtan"):
        in_heads = len(boxes) - _saved_in_the_trunk(name)
        assert kept <= in_heads + FIRST
    else:
        assert kept <= FIRST
    for engine in ("gramian", "full"):
        with pytest.raises(RuntimeError, match="second time"):
            fastmtl.AlignedMTL().backward(losses, model.shared(), engine=engine)
    with pytest.raises(RuntimeError, match="second time"):
        losses[0].backward()


@pytest.mark.cover(1)
@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_engine_keeps_a_retained_graph(name, fails):
    """No reference cycle, through hooks or otherwise: the graph goes with the last loss, collector or not."""
    model = build(MODELS[name])
    losses, boxes = boxed(model)
    if fails:
        losses[1].grad_fn.register_hook(Failing(1))
        with pytest.raises(ArithmeticError):
            fastmtl.AlignedMTL().backward(losses, model.shared(), engine="gramian", retain_graph=True)
    else:
        info = fastmtl.AlignedMTL().backward(losses, model.shared(), engine="gramian", retain_graph=True)
        assert info.gram.isfinite().all()
    assert sum(box() is not None for box in boxes) == len(boxes)
    del losses
    torch.ones(1, requires_grad=True).sum().backward()  # autograd drops here what a pass that failed had still to do
    assert sum(box() is not None for box in boxes) == 0


@pytest.mark.parametrize("name", KINDS)
def test_saved_values_that_lie_elsewhere(name):
    """Hooks on what the graph saves, as those that move activations to another device and back."""
    full, model = build(MODELS[name], F64), build(MODELS[name], F64)
    fastmtl.AlignedMTL().backward(full.losses(), full.shared(), engine="full")
    losses, _ = boxed(model)
    fastmtl.AlignedMTL().backward(losses, model.shared(), engine="gramian")
    for p, q in zip(model.parameters(), full.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            # Against the whole: the bias before a normalisation has a gradient of pure rounding.
            assert (p.grad - q.grad).norm() <= LIMIT[F64] * q.grad.norm() + 1e-12


def test_the_forward_runs_once():
    model = three()
    calls = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    losses = model.losses()
    before = len(calls)
    fastmtl.AlignedMTL().backward(losses, model.shared(), engine="gramian")
    assert len(calls) == before


def test_what_is_saved_is_not_written_to():
    """Parameters, data, activations and losses are what they were; so is the state of the random numbers."""
    model = three()
    h = model.trunk(model.x)
    losses = [(head(h) - model.y[t]).square().mean() for t, head in enumerate(model.heads)]
    tensors = [*model.parameters(), *model.buffers(), h, *losses]
    before = [(x.detach().clone(), x._version) for x in tensors]
    state = torch.get_rng_state()
    fastmtl.AlignedMTL().backward(losses, model.shared(), engine="gramian")
    for x, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(x, value)
        assert x._version == version
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------ surroundings


def test_under_no_grad():
    model, plain = three(), three()
    backward(plain)
    losses = model.losses()
    with torch.no_grad():
        info = fastmtl.AlignedMTL().backward(losses, model.shared(), engine="gramian")
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
        assert not p.grad.requires_grad
    assert not info.gram.requires_grad
    assert not info.alpha.requires_grad


def test_a_model_that_was_compiled():
    """One operation of the graph for the whole trunk: nothing in it can be told apart."""
    torch.compiler.reset()  # what other tests compiled of the same code may give its buffers away
    full, model = three(F64), three(F64)
    for m in (full, model):
        m.trunk = torch.compile(m.trunk, backend="aot_eager")
    expected, info = backward(full, "full"), backward(model)
    close_gram(info.gram, expected.gram, GRAM[F64])
    for p, q in zip(model.parameters(), full.parameters(), strict=True):
        assert relative(p.grad, q.grad) <= LIMIT[F64]


@pytest.mark.parametrize("name", ["mlp", "resnet18", "vit", "language model", "lstm", "gru", "mtan"])
def test_no_warning(name):
    model = build(MODELS[name])
    losses = model.losses()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastmtl.AlignedMTL().backward(losses, model.shared(), engine="gramian")


def test_a_deep_graph():
    """Deeper than Python's stack."""

    def losses(p, x):
        h = x(6, 4) @ p.w
        for _ in range(3000):
            h = h + 1e-3
        return [(h @ p.a).square().sum(), h.sin().sum()]

    check(losses, "w", w=(4, 5), a=(5, 2))


def test_within_anomaly_mode():
    model, plain = three(F64), three(F64)
    backward(plain)
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        backward(model)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert relative(p.grad, q.grad) <= 1e-12


def test_the_info_is_detached_and_complete():
    model, full = three(), three()
    info, expected = backward(model), backward(full, "full")
    for name in ("alpha", "gram", "eigenvalues", "rank"):
        got, like = getattr(info, name), getattr(expected, name)
        assert got.dtype is like.dtype
        assert got.shape == like.shape
        assert not got.requires_grad
    assert torch.equal(info.gram, info.gram.T)
