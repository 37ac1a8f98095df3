"""Accumulate, then aggregate: what is committed is one `backward` on the sums of the micro-batches' losses."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from helpers import F16, F32, F64, Fail, flat, randn, relative, svd_align
from torch import nn

import fastmtl

TASKS, PIECES = 3, 4


class Model(nn.Module):
    """Convolutions with a batch of their own, three heads, a weight that the first head shares with the encoder."""

    def __init__(self, dtype=F64):
        super().__init__()
        torch.manual_seed(2)
        self.encoder = nn.Sequential(
            *(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3, bias=False), nn.Flatten(), nn.Linear(16, 5), nn.Tanh())
        )
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(TASKS))
        self.common = nn.Parameter(torch.ones(2))  # of heads 1 and 2
        self.to(dtype)

    def losses(self, h, y, pieces=PIECES):
        outputs = [head(h) for head in self.heads]
        outputs[1:] = [output * self.common for output in outputs[1:]]
        return [5.0**t * (output - y[:, t]).square().mean() / pieces for t, output in enumerate(outputs)]


def data(dtype=F64):
    return randn(4 * PIECES, 2, 6, 6, dtype=dtype, seed=1), randn(4 * PIECES, TASKS, 2, dtype=dtype, seed=2)


def pieces(dtype=F64):
    return list(zip(*(x.chunk(PIECES) for x in data(dtype)), strict=True))


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def alike(got, expected, limit=1e-9):
    assert got.keys() == expected.keys()
    for name, g in expected.items():
        assert (got[name] is None) == (g is None), name
        assert g is None or relative(got[name], g.double()) <= limit, name


def by_hand(model, absent=frozenset(), weigh=svd_align, scale=None):
    """Plain autograd on the sums of the losses: T passes, an SVD; `absent`: pairs of a piece and a task."""
    totals = [torch.zeros(()) for _ in range(TASKS)]
    for i, (x, y) in enumerate(pieces()):
        for t, loss in enumerate(model.losses(model.encoder(x), y)):
            totals[t] = totals[t] + (0.0 if (i, t) in absent else 1.0) * loss
    shared = list(model.encoder.parameters())
    rows = [torch.autograd.grad(total, shared, retain_graph=True) for total in totals]
    G = torch.stack([flat(row) for row in rows])
    found = dict.fromkeys(n for n, _ in model.named_parameters())
    for (name, p), g in zip(model.encoder.named_parameters(), weigh(G).split([p.numel() for p in shared]), strict=True):
        found[f"encoder.{name}"] = g.view_as(p)
    for name, p in model.named_parameters():
        if not name.startswith("encoder"):
            weighted = sum(total * (1.0 if scale is None else scale[t]) for t, total in enumerate(totals))
            (found[name],) = torch.autograd.grad(weighted, p, retain_graph=True)
    return found


def accumulated(model, method, absent=frozenset(), way="shared", **options):
    where = {"shared": model.encoder} if way in ("shared", "features", "batched") else {}
    if way == "groups":
        where = {"groups": [model.encoder[:2], model.encoder[2:]]}
    accumulator = method.accumulate(**where, **options)
    for i, (x, y) in enumerate(pieces()):
        h = model.encoder(x)
        losses = [None if (i, t) in absent else loss for t, loss in enumerate(model.losses(h, y))]
        extra = {"features": h} if way in ("features", "batched") else {}
        extra |= {"batched": True} if way == "batched" else {}
        extra |= {"representation": h} if way == "representation" else {}
        accumulator.add(losses, **extra)
    assert all(p.grad is None for p in model.parameters())  # nothing before the end
    assert accumulator.count == PIECES
    info = accumulator.backward()
    assert accumulator.count == 0
    return info


@pytest.mark.parametrize("way", ["shared", "features", "found"])
def test_it_is_the_aggregation_of_sums(way):
    model = Model()
    expected = by_hand(model)
    if way == "found":  # the parameters that several losses reach, of which the heads' common one is one too
        model.common.requires_grad_(False)
        expected = by_hand_without_common(model)
    info = accumulated(model, fastmtl.AlignedMTL(), way=way)
    alike(gradients(model), expected)
    assert info.alpha.shape == (TASKS,)


def by_hand_without_common(model):
    model.common.requires_grad_(True)
    found = by_hand(model)
    model.common.requires_grad_(False)
    return found | {"common": None}


@pytest.mark.parametrize("way", ["shared", "features", "groups", "representation"])
@pytest.mark.parametrize("name", ["AlignedMTL", "GradDrop", "MGDA of losses", "ExcessMTL"])
def test_it_is_one_backward_on_the_whole_batch(way, name):
    """Of every kind of method: on the Gram matrix, on gradients, with losses, with a memory; two steps."""
    make = {
        "AlignedMTL": fastmtl.AlignedMTL,
        "GradDrop": fastmtl.GradDrop,
        "MGDA of losses": lambda: fastmtl.MGDA(normalization="loss"),
        "ExcessMTL": fastmtl.ExcessMTL,
    }[name]
    if way == "groups" and not make().on_gram:
        with pytest.raises(ValueError, match="groups: expected a method that works on the Gram matrix"):
            make().accumulate(groups=[nn.Linear(1, 1)])
        return
    model, whole = Model(), Model()
    one, other = make(), make()
    x, y = data()
    for step in range(2):
        for each in (model, whole):
            each.zero_grad()
        torch.manual_seed(step)
        info = accumulated(model, one, way=way)
        torch.manual_seed(step)
        h = whole.encoder(x)
        losses = whole.losses(h, y, pieces=1)
        where = {"shared": {"shared": whole.encoder}, "features": {"features": h, "shared": whole.encoder}}
        where |= {"groups": {"groups": [whole.encoder[:2], whole.encoder[2:]]}, "representation": {"representation": h}}
        expected = other.backward(losses, **where[way])
        alike(gradients(model), gradients(whole), 1e-9 if name != "ExcessMTL" else 1e-6)
        if expected.alpha is not None:
            assert relative(info.alpha, expected.alpha) <= 1e-9


def test_heads_may_be_scaled():
    model = Model()
    info = accumulated(model, fastmtl.AlignedMTL(), scale_heads=True)
    expected = by_hand(model, scale=info.alpha)
    alike(gradients(model), expected)


@pytest.mark.parametrize("way", ["shared", "representation"])
def test_tasks_that_micro_batches_lack(way):
    """Here one, there another, one micro-batch without any; and a task that none of them has."""
    model = Model()
    absent = {(1, 1), (2, 0), (2, 2), *((0, t) for t in range(TASKS))}
    if way == "shared":
        expected = by_hand(model, absent)
    else:  # all at once: the representation of the whole batch is that of its pieces, side by side
        whole, hs, totals = Model(), [], [0.0] * TASKS
        for i, (x, y) in enumerate(pieces()):
            hs.append(whole.encoder(x))
            for t, loss in enumerate(whole.losses(hs[-1], y)):
                totals[t] = totals[t] + (0.0 if (i, t) in absent else 1.0) * loss
        fastmtl.AlignedMTL().backward(totals, representation=hs)
        expected = gradients(whole)
    accumulated(model, fastmtl.AlignedMTL(), absent, way)
    alike(gradients(model), expected)
    model.zero_grad()
    absent = {(i, 1) for i in range(PIECES)} | {(0, t) for t in range(TASKS)}
    info = accumulated(model, fastmtl.AlignedMTL(), absent, way)
    assert info.alpha[1] == 0
    assert model.heads[1].weight.grad is None
    assert model.heads[0].weight.grad is not None


def test_names_and_steps_one_after_the_other():
    """The buffer is the same; what was added in the last step is gone, and `.grad` is added to."""
    model, method = Model(), fastmtl.AlignedMTL()
    accumulator = method.accumulate(model.encoder)
    expected = by_hand(model)
    buffers = set()
    for step in range(1, 4):
        for x, y in pieces():
            losses = model.losses(model.encoder(x), y)
            accumulator.add(
                dict(zip("abc", losses, strict=True)) if step % 2 else dict(zip("cba", losses[::-1], strict=True))
            )
        buffers.add(next(accumulator._sums.rows())[0].data_ptr())
        assert accumulator.backward().names == ("a", "b", "c")
        alike(gradients(model), {name: step * g for name, g in expected.items()})
    assert len(buffers) == 1


def test_memory_is_one_flat_buffer_of_views():
    """Rows are views, laid out as the parameters, of one tensor of each dtype; nothing is kept of a graph."""
    model = Model().to(memory_format=torch.channels_last)
    model.encoder[4].to(F32)
    accumulator = fastmtl.AlignedMTL().accumulate(model.encoder)
    for x, y in pieces():
        h = model.encoder[:4](x.contiguous(memory_format=torch.channels_last))
        accumulator.add(model.losses(model.encoder[4:](h.float()).double(), y))
    rows = list(accumulator._sums.rows())
    storages = {g.untyped_storage().data_ptr(): g for row in rows for g in row}
    assert len(storages) == 2
    assert sum(g.untyped_storage().nbytes() for g in storages.values()) == TASKS * sum(
        p.numel() * p.element_size() for p in model.encoder.parameters()
    )
    assert all(g.stride() == p.stride() for row in rows for g, p in zip(row, model.encoder.parameters(), strict=True))
    h.grad_fn  # noqa: B018
    with pytest.raises(RuntimeError, match="second time"):
        h.sum().backward()


class Marked(torch.autograd.Function):
    """A node that shows whether its graph is there."""

    @staticmethod
    def forward(ctx, x, mark):
        ctx.mark = mark
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None


class Mark:
    pass


@pytest.mark.parametrize("way", ["shared", "features", "representation"])
def test_a_micro_batchs_graph_goes_with_it(way):
    """All of it, but for the encoder's in the upper bound; and that goes with the step."""
    model, method = Model(), fastmtl.AlignedMTL()
    accumulator = method.accumulate(model.encoder if way == "shared" else None)
    x, y = pieces()[0]
    marks = [Mark(), Mark()]
    seen = [weakref.ref(mark) for mark in marks]
    h = Marked.apply(model.encoder(x), marks[0])
    losses = model.losses(h, y)
    losses[0] = Marked.apply(losses[0], marks[1])
    accumulator.add(losses, **({} if way == "shared" else {way: h}))
    del marks, losses, h
    gc.collect()
    assert [ref() is None for ref in seen] == [way != "representation", True]
    accumulator.backward()
    gc.collect()
    assert seen[0]() is None


@pytest.mark.parametrize("way", ["shared", "representation"])
def test_a_failure_leaves_every_gradient_and_says_what_is_spoiled(way):
    model, method = Model(), fastmtl.AlignedMTL()
    expected = by_hand(model)
    accumulator = method.accumulate(model.encoder if way == "shared" else None)

    def add(x, y, fails=None):
        h = model.encoder(x)
        losses = model.losses(h, y)
        if fails is not None:
            losses[fails] = Fail.apply(losses[fails])
        accumulator.add(losses, **({} if way == "shared" else {"representation": h}))

    (first, *others) = pieces()
    with pytest.raises(ArithmeticError):
        add(*first, fails=2)  # of nothing nothing is lost
    add(*first)
    with pytest.raises(ArithmeticError):
        add(*others[0], fails=0)  # before anything is added
    assert accumulator.count == 1
    for piece in others:
        add(*piece)
    if way == "shared":
        accumulator.backward()
        alike(gradients(model), expected)
        add(*first)
        before = gradients(model)
        with pytest.raises(ArithmeticError):
            add(*others[0], fails=2)
        for call in (accumulator.backward, lambda: add(*first)):
            with pytest.raises(RuntimeError, match=r"failed in the middle of its passes.*reset\(\)"):
                call()
        alike(gradients(model), before, 0)
        accumulator.reset()
        model.zero_grad()
        for piece in pieces():
            add(*piece)
    accumulator.backward()
    if way == "shared":
        alike(gradients(model), expected)


def test_a_solver_that_fails_loses_nothing():
    model = Model()

    class Refuses(fastmtl.GramMethod):
        broken = True

        def weigh(self, M):
            if self.broken:
                raise ArithmeticError("no weights today")
            return torch.ones(M.shape[:-1], dtype=F64)

    method = Refuses()
    accumulator = method.accumulate(model.encoder)
    for x, y in pieces():
        accumulator.add(model.losses(model.encoder(x), y))
    with pytest.raises(ArithmeticError):
        accumulator.backward()
    assert all(p.grad is None for p in model.parameters())
    method.broken = False
    accumulator.backward()
    alike(gradients(model), by_hand(model, weigh=lambda G: G.sum(0)))


def test_state_changes_once_a_step_and_a_run_goes_on_from_it():
    """A checkpoint between steps: the same bits afterwards."""

    def run(model, method, steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        accumulator = method.accumulate(model.encoder)
        for x, y in itertools.chain.from_iterable([pieces()] * steps):
            before = copy.deepcopy(method.state_dict())
            accumulator.add(model.losses(model.encoder(x), y))
            assert str(before) == str(method.state_dict())
            if accumulator.count == PIECES:
                accumulator.backward()
                optimizer.step()
                optimizer.zero_grad()

    model, method = Model(), fastmtl.MoCo()
    run(model, method, 2)
    again, other = Model(), fastmtl.MoCo()
    again.load_state_dict(model.state_dict())
    other.load_state_dict(method.state_dict())
    run(model, method, 2)
    run(again, other, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_loss_scaler():
    """Scaled losses, one factor a step: the unscaled gradient, and an overflow in one micro-batch skips the step."""
    x32, model = pieces(F32), Model(F32)
    expected = by_hand(copy.deepcopy(model).double())
    for overflow in (False, True):
        method = fastmtl.NashMTL(max_norm=0.5)  # not homogeneous
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        accumulator = method.accumulate(model.encoder)
        start = copy.deepcopy(model.state_dict())
        for i, (x, y) in enumerate(x32):
            losses = [scaler.scale(loss) for loss in model.losses(model.encoder(x), y)]
            if overflow and i == 1:
                losses[0] = losses[0] * torch.inf
            accumulator.add(losses)
        accumulator.backward(grad_scale=scaler.get_scale())
        scaler.unscale_(optimizer)
        if not overflow:
            assert flat([p.grad for p in model.encoder.parameters()]).norm() == pytest.approx(0.5, rel=1e-5)
            alike(
                {k: g for k, g in gradients(model).items() if "heads" in k},
                {k: g for k, g in expected.items() if "heads" in k},
                1e-5,
            )
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items()) is overflow
        assert (scaler.get_scale() < 2.0**10) is overflow
        optimizer.zero_grad()


def test_autocast():
    model = Model(F32)
    expected = by_hand(copy.deepcopy(model).double())
    accumulator = fastmtl.AlignedMTL().accumulate(model.encoder)
    for x, y in pieces(F32):
        with torch.autocast("cpu", dtype=F16):
            losses = model.losses(model.encoder(x), y)
        accumulator.add(losses)
    accumulator.backward()
    assert all(p.grad.dtype is F32 for p in model.parameters())
    alike(gradients(model), expected, 0.05)


def test_hooks_run_once_a_step_on_the_sum():
    model, seen = Model(), []
    expected = by_hand(model)
    for name, p in model.named_parameters():
        p.register_hook(lambda g, name=name: seen.append((name, g.clone())))
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append((name, p.grad.clone())))
    accumulated(model, fastmtl.AlignedMTL())
    assert sorted(name for name, _ in seen) == sorted(2 * list(expected))
    alike(dict(seen), expected)


def test_what_does_not_go_is_refused_and_keeps_what_is_there():
    model = Model()
    method = fastmtl.AlignedMTL()
    expected = by_hand(model)
    accumulator = method.accumulate(model.encoder)
    with pytest.raises(
        ValueError, match="losses: expected at least one loss that requires grad, got none in 0 micro-b"
    ):
        accumulator.backward()

    def losses(piece):
        h = model.encoder(piece[0])
        return model.losses(h, piece[1]), h

    first, *others = pieces()
    accumulator.add(losses(first)[0])
    for arguments, options, error, message in (
        ((losses(first)[0][:2],), {}, ValueError, "losses: expected 3, one for each task"),
        (("abc",), {}, TypeError, "losses: expected a sequence"),
        ((losses(first)[0],), {"batched": True}, ValueError, "batched: expected False without features"),
        ((losses(first)[0],), {"representation": losses(first)[1]}, ValueError, "shared: expected None where rep"),
    ):
        with pytest.raises(error, match=message):
            accumulator.add(*arguments, **options)
    model.encoder[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="shared: expected the 5 parameters of the micro-batches before, got 4"):
        accumulator.add(losses(others[0])[0])
    model.encoder[0].bias.requires_grad_(True)
    for piece in others:
        accumulator.add(losses(piece)[0])
    accumulator.backward()
    alike(gradients(model), expected)

    upper = method.accumulate()
    both, h = losses(first)
    upper.add(both, representation=h)
    with pytest.raises(ValueError, match="representation: expected one, as in the micro-batches before, got none"):
        upper.add(losses(first)[0])
    with pytest.raises(ValueError, match="shared: expected the shared parameters to be named"):
        method.accumulate().add([*losses(first)[0][:2], None])
    with pytest.raises(ValueError, match="scale_heads: expected False with groups"):
        method.accumulate(groups=[model.encoder], scale_heads=True)
    with pytest.raises(TypeError, match="shared: expected a module or an iterable"):
        method.accumulate(3)


def test_sparse_gradients_are_refused():
    table, heads = nn.Embedding(6, 3, sparse=True), [nn.Linear(3, 1) for _ in range(2)]
    accumulator = fastmtl.AlignedMTL().accumulate(table)
    h = table(torch.arange(4))
    with pytest.raises(TypeError, match=r"rows\[0\]\[0\]: expected a dense"):
        accumulator.add([head(h).mean() for head in heads])
