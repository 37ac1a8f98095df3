"""What every rank of `test_distributed.py` runs: checks that all ranks of a world enter together, in one order.

Starting a process costs far more than a check, so one world runs them all and reports each check by its name.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from helpers import BF16, F32, F64, flat, gram_error, randn, relative, svd_align
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fastmtl
from fastmtl import distributed, once
from fastmtl.rule import NOTHING, Context

TASKS = 3
BATCH = 8


# ------------------------------------------------------------------------------------------------ a model and its truth


class Model(nn.Module):
    """A trunk of 75 parameters, which divide evenly on no world of ours, and one head a task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3), nn.Tanh()).double()
        self.heads = nn.ModuleList([nn.Linear(3, 2) for _ in range(TASKS)]).double()

    def forward(self, x: Tensor, method: fastmtl.AlignedMTL | None = None, **options):
        """T outputs, and the fan-out between trunk and heads where a method is given."""
        self.h = h = self.trunk(x)
        if method is None:
            return [head(h) for head in self.heads], None
        hs = fastmtl.fan_out(h, TASKS, method, **options)
        return [head(h_t) for head, h_t in zip(self.heads, hs, strict=True)], hs


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    """The whole batch: inputs [8, 5] and targets [8, T, 2], float64."""
    return randn(BATCH, 5, dtype=F64, seed=10 + step), randn(BATCH, TASKS, 2, dtype=F64, seed=20 + step)


def part(x: Tensor) -> Tensor:
    """This rank's part of the batch."""
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def losses_of(outputs: list[Tensor], y: Tensor) -> list[Tensor]:
    return [10.0**t * (out - y[:, t]).square().mean() for t, out in enumerate(outputs)]


def task_rows(model: Model, x: Tensor, y: Tensor) -> list[Tensor]:
    """Task gradients of the trunk, T vectors [P], by T plain passes."""
    losses = losses_of(model(x)[0], y)
    return [flat(torch.autograd.grad(loss, list(model.trunk.parameters()), retain_graph=True)) for loss in losses]


def head_gradients(model: Model, x: Tensor, y: Tensor) -> Tensor:
    return flat(torch.autograd.grad(sum(losses_of(model(x)[0], y)), list(model.heads.parameters())))


def encoder_truth(model: Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Trunk gradient [P] of Aligned-MTL-UB on this batch in one process, and the Gram [T, T] of the representation."""
    h = model.trunk(x)
    losses = losses_of([head(h) for head in model.heads], y)
    Z = torch.stack([torch.autograd.grad(loss, h, retain_graph=True)[0].reshape(-1) for loss in losses])
    gradient = torch.autograd.grad(h, list(model.trunk.parameters()), svd_align(Z).view_as(h))
    return flat(gradient), Z @ Z.T


def grads(module: nn.Module) -> Tensor:
    return flat([p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in module.parameters()])


def everywhere(x: Tensor) -> list[Tensor]:
    """`x` of every rank."""
    xs = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(xs, x.contiguous())
    return xs


def assert_same_bits(x: Tensor) -> None:
    first, *others = everywhere(x)
    assert all(torch.equal(first, other) for other in others)


def weigh(M: Tensor, dtype: torch.dtype, context: Context) -> fastmtl.Info:
    return fastmtl.AlignedMTL().solve(M, dtype, context)


# ------------------------------------------------------------------------------------------------ Gram and group


def check_own_group() -> None:
    group = distributed.gram_group()
    assert group is distributed.gram_group(True) is distributed.gram_group(None)
    assert group is not dist.group.WORLD
    assert dist.get_process_group_ranks(group) == list(range(dist.get_world_size()))
    assert distributed.gram_group(dist.group.WORLD) is dist.group.WORLD


def check_group_refuses() -> None:
    only = dist.new_group([0])
    if dist.get_rank() == 0:
        assert distributed.gram_group(only) is only
    else:
        assert_raises(ValueError, "belongs to", lambda: distributed.gram_group(only))
    assert_raises(TypeError, "expected True, None or a ProcessGroup", lambda: distributed.gram_group("world"))


def check_group_is_made_anew_after_a_restart() -> None:
    before = distributed.gram_group()
    rank, world = dist.get_rank(), dist.get_world_size()
    store = dist.PrefixStore("again", dist.distributed_c10d._get_default_store())
    dist.destroy_process_group()
    assert_raises(RuntimeError, "init_process_group", distributed.gram_group)
    start(store, rank, world)
    after = distributed.gram_group()
    assert after is not before
    total = distributed.reduce_gram(torch.full((1, 1), rank + 1.0, dtype=F64), after)
    assert total.item() == (world + 1) / (2 * world)


def check_reduced_gram_is_that_of_the_whole_batch() -> None:
    Z = randn(4, BATCH, 5, dtype=F64, seed=1)  # rows of a loss that is a mean over the batch
    W = dist.get_world_size()
    mine = part(Z.transpose(0, 1)).transpose(0, 1).reshape(4, -1) * W  # the mean over a part has W times the gradient
    M = mine @ mine.T
    before = M.clone()
    total = distributed.reduce_gram(M, distributed.gram_group())
    assert gram_error(total, Z.reshape(4, -1)) <= 1e-14
    assert torch.equal(M, before)
    assert_same_bits(total)
    stacked = distributed.reduce_gram(torch.stack([M, 2 * M]), distributed.gram_group())
    assert relative(stacked, torch.stack([total, 2 * total])) <= 1e-15


def check_a_missing_rank_is_named() -> None:
    group = dist.new_group(timeout=datetime.timedelta(seconds=10))
    if dist.get_rank() == 0:
        M = torch.eye(2, dtype=F64)
        assert_raises(RuntimeError, r"every rank has to take part .* hs\.total", distributed.reduce_gram, M, group)
    else:
        dist.destroy_process_group(group)
        del group  # which ends its connections: faster, and surer, than a time-out
    dist.barrier()


# ------------------------------------------------------------------------------------------------ averaged rows

SHAPES = ((), (3,), (2, 5), (0,), (1, 7), (11,))


def local_rows(dtypes: list[torch.dtype], rank: int, missing: bool) -> list[list[Tensor | None]]:
    """This rank's gradients. With `missing`, which are None differs by rank and task; parameter 4 has none anywhere."""
    rows: list[list[Tensor | None]] = []
    for t in range(TASKS):
        row: list[Tensor | None] = []
        for k, (shape, dtype) in enumerate(zip(SHAPES, dtypes, strict=True)):
            gone = missing and (k == 4 or (k == 2 and rank != 0) or (k == 5 and (rank + t) % 2 == 0))
            row.append(None if gone else 3.0**t * randn(*shape, dtype=dtype, seed=1000 * rank + 10 * t + k))
        rows.append(row)
    return rows


def check_averaged_rows_float64() -> None:
    _check_averaged([F64] * len(SHAPES), missing=False, limit=1e-12)


def check_averaged_rows_missing_here_and_there() -> None:
    _check_averaged([F64] * len(SHAPES), missing=True, limit=1e-12)


def check_averaged_rows_mixed_dtypes() -> None:
    _check_averaged([F64, F32, BF16, F32, F64, F64], missing=False, limit=1e-2)
    _check_averaged([F64, F32, F32, F32, F64, F64], missing=True, limit=1e-6)


def _check_averaged(dtypes: list[torch.dtype], missing: bool, limit: float) -> None:
    W, rank = dist.get_world_size(), dist.get_rank()
    parameters = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(SHAPES, dtypes, strict=True)]
    rows = distributed.AveragedRows(parameters, TASKS, distributed.gram_group())
    for row in local_rows(dtypes, rank, missing):
        rows.append(row)
    seen = []
    updates, info = rows.combine(lambda M, dtype, context: seen.append(dtype) or weigh(M, dtype, context), NOTHING)
    assert seen == [max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)]

    reached = [k for k in range(len(SHAPES)) if not (missing and k == 4)]
    assert [k for k, update in enumerate(updates) if update is not None] == reached
    for k in reached:
        assert (updates[k].shape, updates[k].dtype) == (parameters[k].shape, parameters[k].dtype)
        assert_same_bits(updates[k])
    assert_same_bits(info.alpha)
    G = torch.zeros(TASKS, sum(parameters[k].numel() for k in reached), dtype=F64)
    for r in range(W):
        for t, row in enumerate(local_rows(dtypes, r, missing)):
            G[t] += flat([torch.zeros_like(parameters[k]) if row[k] is None else row[k] for k in reached]) / W
    assert gram_error(info.gram, G) <= limit
    assert relative(flat(updates), svd_align(G)) <= limit


def check_averaged_is_not_the_average_of_aligned() -> None:
    """The point of the exchange: aligning on each rank and averaging is something else, by far more than rounding."""
    model = Model()
    x, y = batch()
    whole = svd_align(torch.stack(task_rows(model, x, y)))
    mine = svd_align(torch.stack(task_rows(model, part(x), part(y))))
    assert relative(torch.stack(everywhere(mine)).mean(0), whole) > 1e-2


# ------------------------------------------------------------------------------------------------ data parallelism


def check_full_method_under_ddp() -> None:
    _check_ddp()


def check_full_method_under_ddp_with_options() -> None:
    _check_ddp(gradient_as_bucket_view=True)
    _check_ddp(find_unused_parameters=True)


def _check_ddp(**options) -> None:
    """Three steps of SGD on parts of the batch equal three steps of one process on all of it."""
    model, alone = DistributedDataParallel(Model(), **options), Model()
    method = fastmtl.AlignedMTL()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        x, y = batch(step)
        trunk, heads = svd_align(torch.stack(task_rows(alone, x, y))), head_gradients(alone, x, y)
        optimizer.zero_grad()
        losses = losses_of(model(part(x))[0], part(y))
        info = method.backward(losses, model.module.trunk.parameters(), process_group=True)
        assert relative(grads(model.module.trunk), trunk) <= 1e-9
        assert relative(grads(model.module.heads), heads) <= 1e-12
        assert gram_error(info.gram, torch.stack(task_rows(alone, x, y))) <= 1e-12
        assert_same_bits(grads(model))
        assert_same_bits(info.alpha)
        optimizer.step()
        step_alone(alone, torch.cat([trunk, heads]), 0.05)
        assert_same_bits(flat(list(model.parameters())))
        assert relative(flat(list(model.parameters())), flat(list(alone.parameters()))) <= 1e-9


def check_a_step_between_solutions_under_ddp() -> None:
    """One local pass, averaged: Σ α_t of the whole batch's gradients, the same bits on every rank."""
    model, method = Model(), fastmtl.AlignedMTL()
    ddp = DistributedDataParallel(model)
    for step in range(2):
        x, y = batch(step)
        ddp.zero_grad(set_to_none=True)
        info = method.backward(
            losses_of(ddp(part(x))[0], part(y)), model.trunk.parameters(), process_group=True, every=2
        )
        assert info.age == step
    expected = torch.stack(task_rows(model, x, y)).T @ info.alpha
    assert relative(grads(model.trunk), expected) <= 1e-12
    assert relative(grads(model.heads), head_gradients(model, x, y)) <= 1e-12
    assert_same_bits(grads(model))


def step_alone(model: Model, gradient: Tensor, lr: float) -> None:
    with torch.no_grad():
        for p, g in zip(model.parameters(), gradient.split([p.numel() for p in model.parameters()]), strict=True):
            p -= lr * g.view_as(p)


def check_full_method_accumulates_under_no_sync() -> None:
    model, alone = DistributedDataParallel(Model()), Model()
    trunk, heads = torch.zeros(()), torch.zeros(())
    for step in range(2):
        x, y = batch(step)
        trunk = trunk + svd_align(torch.stack(task_rows(alone, x, y)))
        heads = heads + head_gradients(alone, x, y)
        model.require_backward_grad_sync = step == 1  # what no_sync() sets
        losses = losses_of(model(part(x))[0], part(y))
        fastmtl.AlignedMTL().backward(losses, model.module.trunk.parameters(), process_group=True)
    assert relative(grads(model.module.trunk), trunk) <= 1e-9
    assert relative(grads(model.module.heads), heads) <= 1e-12


def check_accumulation_under_ddp() -> None:
    """Micro-batches are summed on each rank, under no_sync, and averaged once: one process on the whole batch."""
    for way in ("shared", "features", "representation"):
        model, alone = Model(), Model()
        ddp = DistributedDataParallel(model)
        where = {} if way == "representation" else {"shared": model.trunk}
        accumulator = fastmtl.AlignedMTL().accumulate(**where, process_group=True)
        for step in range(2):
            ddp.zero_grad(set_to_none=True)
            x, y = batch(step)
            for i, (x_i, y_i) in enumerate(zip(part(x).chunk(2), part(y).chunk(2), strict=True)):
                with ddp.no_sync() if i == 0 else contextlib.nullcontext():
                    losses = [loss / 2 for loss in losses_of(ddp(x_i)[0], y_i)]
                accumulator.add(losses, **({} if way == "shared" else {way: model.h}))
            info = accumulator.backward()
            if way == "representation":
                trunk, M = encoder_truth(alone, x, y)
            else:
                rows = torch.stack(task_rows(alone, x, y))
                trunk, M = svd_align(rows), rows @ rows.T
            assert relative(grads(model.trunk), trunk) <= 1e-9
            assert relative(grads(model.heads), head_gradients(alone, x, y)) <= 1e-12
            assert relative(info.gram, M) <= 1e-12
            assert_same_bits(grads(model))


def check_groups_are_aggregated_each_on_its_own() -> None:
    """Layers under data parallelism: the averaged gradients of each, in one batch of problems; accumulated, too."""
    x, y = batch()
    alone = Model()
    rows = torch.stack(task_rows(alone, x, y))
    sizes = [sum(p.numel() for p in alone.trunk[k].parameters()) for k in (0, 2)]
    expected = torch.cat([svd_align(part) for part in rows.split(sizes, 1)])
    for way in ("shared", "features", "accumulate"):
        model = Model()
        ddp = DistributedDataParallel(model)
        layers, method = [model.trunk[0], model.trunk[2]], fastmtl.AlignedMTL()
        losses = losses_of(ddp(part(x))[0], part(y))
        if way == "accumulate":
            accumulator = method.accumulate(groups=layers, process_group=True)
            accumulator.add(losses)
            info = accumulator.backward()
        else:
            where = {"features": model.h} if way == "features" else {}
            info = method.backward(losses, groups=layers, process_group=True, **where)
        assert relative(grads(model.trunk), expected) <= 1e-9
        assert relative(grads(model.heads), head_gradients(alone, x, y)) <= 1e-12
        assert info.alpha.shape == (2, TASKS)
        assert relative(info.gram, torch.stack([part @ part.T for part in rows.split(sizes, 1)])) <= 1e-12
        assert_same_bits(grads(model))
        assert_same_bits(info.alpha)


class Reader(nn.Module):
    """An embedding, an input layer, a convolution, a norm and a weight used twice, one read by one task alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.trunk = nn.ModuleDict(
            {
                "words": nn.Embedding(70, 4),
                "input": nn.Linear(4, 6),
                "conv": nn.Conv1d(6, 6, 3, padding=1, groups=2),
                "norm": nn.LayerNorm(5),
                "twice": nn.Linear(5, 5),
                "alone": nn.Linear(5, 3),
            }
        ).double()
        self.heads = nn.ModuleList([nn.Linear(5, 2) for _ in range(TASKS)]).double()

    def losses(self, ids: Tensor) -> list[Tensor]:
        """T losses of words [B, 5]."""
        trunk = self.trunk
        h = trunk["conv"](trunk["input"](trunk["words"](ids)).mT.tanh())
        h = trunk["twice"](trunk["twice"](trunk["norm"](h)).tanh())
        losses = [10.0**t * (head(h).square().mean() - t) ** 2 for t, head in enumerate(self.heads)]
        losses[0] = losses[0] + trunk["alone"](h.detach()).square().mean()
        return losses


def check_gramian_engine_on_averaged_gradients() -> None:
    """Factors where they are smaller, gradients elsewhere; ranks with batches of their own size, and without losses."""
    from fastmtl.distributed import factors

    rank, W = dist.get_rank(), dist.get_world_size()
    seen: set[bool] = set()
    decide = factors._is_factored
    factors._is_factored = lambda *args: seen.add(found := decide(*args)) or found
    try:
        for lacking in ((), (1,), (0, 1, 2)):
            for size in (1, 9):
                model = Reader()
                ids = torch.arange(5 * (size + rank)).view(-1, 5).mul(rank + 3) % 70
                last = rank == W - 1
                there = [not (last and t in lacking) for t in range(TASKS)]
                parameters = list(model.trunk.parameters())
                losses = model.losses(ids)
                rows = torch.zeros(TASKS, sum(p.numel() for p in parameters), dtype=F64)
                for t, loss in enumerate(losses):
                    found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
                    rows[t] = flat(found) if there[t] else 0.0
                G = torch.stack(everywhere(rows)).mean(0)
                own = torch.autograd.grad(sum(losses), [head.weight for head in model.heads], retain_graph=True)
                given = [loss if here else None for loss, here in zip(losses, there, strict=True)]
                info = fastmtl.AlignedMTL().backward(given, model.trunk, engine="gramian", process_group=True)
                assert gram_error(info.gram, G) <= 1e-11
                assert relative(grads(model.trunk), svd_align(G)) <= 1e-9
                assert_same_bits(grads(model.trunk))
                for head, g, here in zip(model.heads, own, there, strict=True):
                    assert (head.weight.grad is not None) == here
                    assert not here or relative(head.weight.grad, g) <= 1e-12
    finally:
        factors._is_factored = decide
    assert seen == {True, False}


def check_gramian_engine_under_ddp() -> None:
    """Three steps, with and without scaled heads, and with one pass in between."""
    for options in ({}, {"find_unused_parameters": True}):
        model, alone = DistributedDataParallel(Model(), **options), Model()
        method = fastmtl.MGDA()
        for step in range(3):
            model.zero_grad()
            x, y = batch(step)
            losses = losses_of(model(part(x))[0], part(y))
            info = method.backward(losses, model.module.trunk, engine="gramian", process_group=True, every=2)
            assert info.age == step % 2
            rows = torch.stack(task_rows(alone, x, y))
            assert relative(grads(model.module.trunk), info.alpha @ rows) <= 1e-9
            assert info.age or gram_error(info.gram, rows) <= 1e-11
            assert relative(grads(model.module.heads), head_gradients(alone, x, y)) <= 1e-12
    own, shared = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    losses = [own.sum(), own.square().sum()]
    options = {"engine": "gramian", "process_group": True}
    assert_raises(ValueError, "no loss reaches", lambda: method.backward(losses, [shared], **options))
    assert own.grad is None


def check_the_example_of_processes() -> None:
    """It says that every way prints the same losses."""
    import data_parallel

    alone = torch.tensor(data_parallel.train("alone", 5))
    for way in ("ddp", "fsdp2"):
        assert relative(torch.tensor(data_parallel.train(way, 5)), alone) <= 1e-4


def check_accumulation_where_ranks_lack_losses() -> None:
    """The first rank lacks a task in one micro-batch, the last one all tasks in both: it takes part with zeros."""
    rank, W = dist.get_rank(), dist.get_world_size()
    x, y = batch()
    model, alone = Model(), Model()
    accumulator = fastmtl.AlignedMTL().accumulate(model.trunk, process_group=True)
    rows = torch.zeros(TASKS, sum(p.numel() for p in alone.trunk.parameters()), dtype=F64)
    for i, (x_i, y_i) in enumerate(zip(part(x).chunk(2), part(y).chunk(2), strict=True)):
        there = [rank != W - 1 and not (rank == 0 and i == 0 and t == 1) for t in range(TASKS)]
        losses = losses_of(model(x_i)[0], y_i)
        accumulator.add([loss if here else None for loss, here in zip(losses, there, strict=True)])
        rows += torch.stack(task_rows(alone, x_i, y_i)) * torch.tensor(there, dtype=F64)[:, None]
    accumulator.backward()
    assert relative(grads(model.trunk), svd_align(torch.stack(everywhere(rows)).mean(0))) <= 1e-9
    assert_same_bits(grads(model.trunk))
    assert all((p.grad is None) == (rank == W - 1) for p in model.heads.parameters())


def check_accumulation_of_shards_is_refused() -> None:
    model = Model()
    shard_each(model)
    shared = list(model.trunk.parameters())
    accumulator = fastmtl.AlignedMTL().accumulate(shared)
    x, y = batch()
    losses = losses_of(model(part(x))[0], part(y))
    assert_raises(ValueError, "expected plain parameters with accumulate, got a DTensor", accumulator.add, losses)


def check_full_method_through_features() -> None:
    for batched in (False, True):
        model, alone = Model(), Model()
        encoder = DistributedDataParallel(model.trunk)
        x, y = batch()
        h = encoder(part(x))
        losses = losses_of([head(h) for head in model.heads], part(y))
        fastmtl.AlignedMTL().backward(losses, features=h, batched=batched, process_group=True)
        assert relative(grads(model.trunk), svd_align(torch.stack(task_rows(alone, x, y)))) <= 1e-9
        assert_same_bits(grads(model.trunk))


def check_upper_bound_in_one_call() -> None:
    model, alone = Model(), Model()
    encoder = DistributedDataParallel(model.trunk)
    x, y = batch()
    h = encoder(part(x))
    losses = losses_of([head(h) for head in model.heads], part(y))
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
        info = fastmtl.AlignedMTL().backward(losses, representation=h, process_group=dist.group.WORLD)
    assert [call.args[0].shape for call in reduced.call_args_list] == [(TASKS, TASKS)]  # all that processes exchange
    trunk, M = encoder_truth(alone, x, y)
    assert relative(grads(model.trunk), trunk) <= 1e-9
    assert relative(info.gram, M) <= 1e-12
    assert_same_bits(grads(model.trunk))


def check_random_methods_draw_alike() -> None:
    """Ranks whose generators differ still take the same step: each holds a share of the columns."""
    for make in (fastmtl.PCGrad, fastmtl.GradVac, fastmtl.RLW, lambda: fastmtl.NashMTL(every=2)):
        for way in ("shared", "representation", "fan_out"):
            model, method = Model(), make()
            torch.manual_seed(dist.get_rank())
            for step in range(3):
                x, y = batch(step)
                h = model.trunk(part(x))
                if way == "fan_out":
                    hs = fastmtl.fan_out(h, TASKS, method, process_group=True)
                    hs.total(losses_of([head(z) for head, z in zip(model.heads, hs, strict=True)], part(y))).backward()
                    alpha = hs.info.alpha
                else:
                    losses = losses_of([head(h) for head in model.heads], part(y))
                    where = {"shared": model.trunk.parameters()} if way == "shared" else {"representation": h}
                    alpha = method.backward(losses, process_group=True, **where).alpha
                assert_same_bits(alpha)
                if way == "shared":
                    assert_same_bits(grads(model.trunk))
            if isinstance(method, nn.Module):
                for value in method.state_dict().values():
                    assert_same_bits(value)


def check_random_methods_draw_alike_for_shards() -> None:
    model = Model()
    shard_each(model)
    torch.manual_seed(dist.get_rank())
    for method in (fastmtl.PCGrad(), fastmtl.GradVac()):
        shared = list(model.trunk.parameters())
        x, y = batch()
        assert_same_bits(method.backward(losses_of(model(part(x))[0], part(y)), shared).alpha)
    with_losses, losses = fastmtl.MGDA(normalization="loss"), losses_of(model(part(x))[0], part(y))
    assert_raises(ValueError, "shared: expected plain parameters", lambda: with_losses.backward(losses, shared))


def check_losses_differ_between_ranks() -> None:
    method, p = fastmtl.MGDA(normalization="loss"), nn.Parameter(torch.ones(2))
    assert_raises(
        ValueError,
        "process_group: expected a method that needs no losses",
        lambda: method.backward([p.sum()], [p], process_group=True),
    )
    h = p * 2
    assert_raises(
        ValueError,
        "process_group: expected a method that needs no losses",
        lambda: fastmtl.fan_out(h, 2, method, process_group=True),
    )


def check_full_method_that_reaches_nothing() -> None:
    """Every rank hears of it, after a collective that none of them may leave out."""
    own, shared = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    method = fastmtl.AlignedMTL()
    assert_raises(ValueError, "no loss reaches", lambda: method.backward([own.sum()], [shared], process_group=True))
    assert own.grad is None


def check_full_method_with_a_task_missing_on_a_rank() -> None:
    """A task without examples on the last rank counts there as zero: the others keep their gradients of it."""
    model = DistributedDataParallel(Model(), find_unused_parameters=True)
    alone = Model()
    x, y = batch()
    last = dist.get_rank() == dist.get_world_size() - 1
    rows = torch.stack(task_rows(alone, part(x), part(y)))
    if last:
        rows[1] = 0.0
    G = torch.stack(everywhere(rows)).mean(0)
    outputs, _ = model(part(x))
    losses = losses_of(outputs, part(y))
    if last:  # the loss of no example: a constant zero that still reaches the head
        losses[1] = model.module.heads[1](torch.zeros(1, 3, dtype=F64)).sum() * 0.0
    fastmtl.AlignedMTL().backward(losses, model.module.trunk.parameters(), process_group=True)
    assert relative(grads(model.module.trunk), svd_align(G)) <= 1e-9
    assert_same_bits(grads(model))


def check_an_absent_loss_on_a_rank() -> None:
    """None counts as that zero does, and DistributedDataParallel's unused head is seen to."""
    x, y = batch()
    last = dist.get_rank() == dist.get_world_size() - 1
    alone = Model()
    rows = torch.stack(task_rows(alone, part(x), part(y)))
    if last:
        rows[1] = 0.0
    G = torch.stack(everywhere(rows)).mean(0)
    heads = flat(
        [
            g
            for t, loss in enumerate(losses_of(alone(part(x))[0], part(y)))
            for g in torch.autograd.grad(loss * (0.0 if last and t == 1 else 1.0), list(alone.heads[t].parameters()))
        ]
    )
    for way in ("shared", "module", "features"):
        model = DistributedDataParallel(Model(), find_unused_parameters=True)
        for _ in range(3):
            model.zero_grad()
            outputs, _ = model(part(x))
            losses: list[Tensor | None] = losses_of(outputs, part(y))
            if last:
                losses[1] = None
            trunk, h = model.module.trunk, model.module.h
            where = {"shared": trunk.parameters()} if way == "shared" else {"shared": trunk}
            info = fastmtl.AlignedMTL().backward(
                losses, **({"features": h} if way == "features" else where), process_group=True
            )
            assert relative(grads(trunk), svd_align(G)) <= 1e-9
            assert gram_error(info.gram, G) <= 1e-12
            assert relative(grads(model.module.heads), torch.stack(everywhere(heads)).mean(0)) <= 1e-12
            assert_same_bits(grads(model))


def check_a_rank_without_any_loss() -> None:
    """It takes part with zeros: the others neither wait for it nor lose their part."""
    x, y = batch()
    W = dist.get_world_size()
    last = dist.get_rank() == W - 1
    alone = Model()
    rows = torch.stack(task_rows(alone, part(x), part(y))) * (0.0 if last else 1.0)
    G = torch.stack(everywhere(rows)).mean(0)
    for way in ("shared", "features"):
        model = Model()
        h = model.trunk(part(x))
        losses = [None] * TASKS if last else losses_of([head(h) for head in model.heads], part(y))
        where = {"features": h} if way == "features" else {"shared": model.trunk}
        fastmtl.AlignedMTL().backward(losses, **where, process_group=True)
        assert relative(grads(model.trunk), svd_align(G)) <= 1e-9
        assert all((p.grad is None) == last for p in model.heads.parameters())
        assert_same_bits(grads(model.trunk))
    model = Model()
    encoder = DistributedDataParallel(model.trunk)
    h = encoder(part(x))
    losses = [None] * TASKS if last else losses_of([head(h) for head in model.heads], part(y))
    info = fastmtl.AlignedMTL().backward(losses, representation=h, process_group=True)
    z = alone.trunk(part(x))
    Z = torch.zeros(TASKS, z.numel(), dtype=F64)
    if not last:
        own = losses_of([head(z) for head in alone.heads], part(y))
        Z = torch.stack([torch.autograd.grad(loss, z, retain_graph=True)[0].reshape(-1) for loss in own])
    whole = torch.cat(everywhere(Z), 1) / W
    assert relative(info.gram, whole @ whole.T) <= 1e-12
    assert_same_bits(grads(model.trunk))
    aligned = svd_align(whole).chunk(W)[dist.get_rank()] * W
    mine = flat(torch.autograd.grad(z, list(alone.trunk.parameters()), aligned.view_as(z)))
    assert relative(grads(model.trunk), torch.stack(everywhere(mine)).mean(0)) <= 1e-9


def check_absent_losses_that_cannot_be_told_apart() -> None:
    """Without names, what a process finds to be shared depends on its losses."""
    model, method = Model(), fastmtl.AlignedMTL()
    x, y = batch()
    losses = [*losses_of(model(part(x))[0], part(y))[:2], None]
    assert_raises(ValueError, "shared: expected .* named", lambda: method.backward(losses, process_group=True))
    assert all(p.grad is None for p in model.parameters())
    assert_raises(ValueError, "losses: expected at least one", lambda: method.backward([None] * TASKS, model.trunk))


def check_heads_under_ddp_are_not_shared() -> None:
    """DistributedDataParallel joins all outputs where it looks for unused parameters."""
    for options in ({}, {"find_unused_parameters": True}):
        model, alone = DistributedDataParallel(Model(), **options), Model()
        x, y = batch()
        info = fastmtl.AlignedMTL().backward(losses_of(model(part(x))[0], part(y)), process_group=True)
        rows = torch.stack(task_rows(alone, x, y))
        assert gram_error(info.gram, rows) <= 1e-12
        assert relative(grads(model.module.trunk), svd_align(rows)) <= 1e-9
        assert relative(grads(model.module.heads), head_gradients(alone, x, y)) <= 1e-12


def check_an_unused_head_under_ddp() -> None:
    """Three steps of every way, where DistributedDataParallel fails if a parameter has not been seen."""
    method = fastmtl.AlignedMTL()

    def fanned(model: nn.Module, x: Tensor, y: Tensor) -> None:
        outputs, hs = model(x, method, process_group=True)
        hs.total([*losses_of(outputs, y)[:2], None]).backward()

    def summed(model: nn.Module, x: Tensor, y: Tensor) -> None:
        sum(losses_of(model(x)[0], y)[:2]).backward()

    def by(**options) -> object:
        def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
            losses = losses_of(model(x)[0], y)[:2]
            where = {"representation": model.module.h} if "h" in options else {"shared": model.module.trunk}
            given = {name: value for name, value in options.items() if name != "h"}
            method.backward(losses, **where, **given)

        return step

    for step in (summed, fanned, by(process_group=False), by(process_group=True), by(h=True, process_group=True)):
        model = DistributedDataParallel(Model(), find_unused_parameters=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        before = flat(list(model.module.heads[2].parameters()))
        for i in range(3):
            x, y = map(part, batch(i))
            optimizer.zero_grad()
            step(model, x, y)
            optimizer.step()
        assert all(p.grad is None for p in model.module.heads[2].parameters())
        assert torch.equal(flat(list(model.module.heads[2].parameters())), before)
        assert_same_bits(flat(list(model.parameters())))


def check_processes_that_go_by_themselves_are_told() -> None:
    """Once for each place; what is said is not."""
    x, y = map(part, batch())
    method = fastmtl.AlignedMTL()

    def steps(**options) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                model = Model()
                hs = fastmtl.fan_out(model.trunk(x), TASKS, method, **options.get("fan_out", {}))
                hs.total(losses_of([head(h) for head, h in zip(model.heads, hs, strict=True)], y)).backward()
                h = model.trunk(x)
                losses = losses_of([head(h) for head in model.heads], y)
                where = {"representation": h} if options.get("h") else {"shared": model.trunk}
                method.backward(losses, **where, **options.get("backward", {}))
        return [str(w.message) for w in caught]

    once.forget()
    first, second = steps()
    W = dist.get_world_size()
    assert first.startswith(f"fan_out: {W} processes train"), first
    assert "process_group=True" in first
    assert "process_group=False" in first
    assert second.startswith(f"backward: {W} processes train"), second
    assert "process_group=True" in second
    assert not steps()
    for h in (True, False):
        for value in (True, False):
            once.forget()
            assert not steps(fan_out={"process_group": value}, backward={"process_group": value}, h=h)


def check_global_fan_out_under_ddp() -> None:
    _check_global_fan_out()


def check_global_fan_out_under_ddp_with_options() -> None:
    _check_global_fan_out(static_graph=True)
    _check_global_fan_out(gradient_as_bucket_view=True, find_unused_parameters=True)


def _check_global_fan_out(**options) -> None:
    model, alone = DistributedDataParallel(Model(), **options), Model()
    for via in ("node", "hooks"):
        for group in (True, dist.group.WORLD):
            model.zero_grad()
            x, y = batch()
            trunk, M = encoder_truth(alone, x, y)
            outputs, hs = model(part(x), fastmtl.AlignedMTL(), via=via, process_group=group)
            hs.total(losses_of(outputs, part(y))).backward()
            assert relative(grads(model.module.trunk), trunk) <= 1e-9
            assert relative(grads(model.module.heads), head_gradients(alone, x, y)) <= 1e-12
            assert relative(hs.info.gram, M) <= 1e-12
            assert_same_bits(grads(model))
            assert_same_bits(hs.info.alpha)


def check_local_fan_out_under_ddp() -> None:
    """Without `process_group`, the mean of what each rank aligns on its own."""
    model, alone = DistributedDataParallel(Model()), Model()
    x, y = batch()
    outputs, hs = model(part(x), fastmtl.AlignedMTL())
    sum(losses_of(outputs, part(y))).backward()
    mean = torch.stack(everywhere(encoder_truth(alone, part(x), part(y))[0])).mean(0)
    assert relative(grads(model.module.trunk), mean) <= 1e-9
    assert relative(hs.info.gram, encoder_truth(alone, part(x), part(y))[1]) <= 1e-12
    assert relative(mean, encoder_truth(alone, x, y)[0]) > 1e-2  # so the two differ, and either test can fail


def check_one_task_misses_the_representation_on_a_rank() -> None:
    for via in ("node", "hooks"):
        _check_missing(via, kept=2)


def check_all_tasks_miss_the_representation_on_a_rank() -> None:
    """`hs.total` makes the last rank take part with zeros: the others neither hang nor lose their own part."""
    for via in ("node", "hooks"):
        _check_missing(via, kept=0)


def check_all_tasks_miss_a_sharded_representation_on_a_rank() -> None:
    for via in ("node", "hooks"):
        _check_missing(via, kept=0, wrap=fully_shard)


def _check_missing(via: str, kept: int, wrap=DistributedDataParallel) -> None:
    """On the last rank only the first `kept` losses are there; the others' rows count as zero there."""
    alone, model = Model(), Model()
    encoder = wrap(model.trunk)
    x, y = map(part, batch())
    W, rank = dist.get_world_size(), dist.get_rank()
    here = TASKS if rank < W - 1 else kept
    hs = fastmtl.fan_out(encoder(x), TASKS, fastmtl.AlignedMTL(), via=via, process_group=True)
    losses = losses_of([head(h) for head, h in zip(model.heads, hs, strict=True)], y)
    hs.total([loss if t < here else None for t, loss in enumerate(losses)]).backward()

    h = alone.trunk(x)
    losses = losses_of([head(h) for head in alone.heads], y)
    Z = torch.stack([torch.autograd.grad(loss, h, retain_graph=True)[0].reshape(-1) for loss in losses])
    Z[here:] = 0.0
    whole = torch.cat(everywhere(Z), 1) / W
    assert relative(hs.info.gram, whole @ whole.T) <= 1e-12
    aligned = svd_align(whole).chunk(W)[rank] * W  # times W, since the encoder's gradients are averaged
    mine = flat(torch.autograd.grad(h, list(alone.trunk.parameters()), aligned.view_as(h)))
    assert relative(grads(model.trunk), torch.stack(everywhere(mine)).mean(0)) <= 1e-9
    assert_same_bits(grads(model.trunk))


# ------------------------------------------------------------------------------------------------ fully_shard (FSDP2)


def shard_root(model: Model) -> None:
    fully_shard(model)


def shard_each(model: Model, **options) -> None:
    for layer in (model.trunk[0], model.trunk[2], *model.heads):
        fully_shard(layer, **options)
    fully_shard(model, **options)


def shard_kept(model: Model) -> None:
    shard_each(model, reshard_after_forward=False)


def shard_encoder(model: Model) -> None:
    fully_shard(model.trunk)


def shard_hybrid(model: Model) -> None:
    shape = (2, dist.get_world_size() // 2)
    shard_each(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))


def check_sharded_root() -> None:
    _check_sharded(shard_root)


def check_sharded_layers() -> None:
    _check_sharded(shard_each)


def check_sharded_layers_kept_after_forward() -> None:
    _check_sharded(shard_kept)


def check_sharded_in_one_dimension_of_two() -> None:
    _check_sharded(shard_hybrid)


def check_sharded_encoder_with_plain_heads() -> None:
    _check_sharded(shard_encoder)


def _check_sharded(shard) -> None:
    """Three steps of SGD equal three steps of one process; the update is committed once, hooks see nothing else."""
    model, alone = Model(), Model()
    shard(model)
    shared, parameters = list(model.trunk.parameters()), list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    calls = []
    for p in shared:
        p.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.full_tensor()))
    for step in range(3):
        x, y = batch(step)
        trunk, heads = svd_align(torch.stack(task_rows(alone, x, y))), head_gradients(alone, x, y)
        optimizer.zero_grad()
        calls.clear()
        info = fastmtl.AlignedMTL().backward(losses_of(model(part(x))[0], part(y)), shared)
        assert all(isinstance(p.grad, DTensor) and p.grad.placements == p.placements for p in shared)
        assert relative(grads(model.trunk), trunk) <= 1e-9
        assert (
            relative(flat(sorted(calls, key=Tensor.numel)), flat(sorted(trunk_parts(trunk), key=Tensor.numel))) <= 1e-9
        )
        if shard is shard_encoder:  # nobody averages what is not sharded: that is left to the user
            for p in model.heads.parameters():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        assert relative(grads(model.heads), heads) <= 1e-12
        assert gram_error(info.gram, torch.stack(task_rows(alone, x, y))) <= 1e-12
        assert_same_bits(info.alpha)
        optimizer.step()
        step_alone(alone, torch.cat([trunk, heads]), 0.05)
    got = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
    assert relative(flat(got), flat(list(alone.parameters()))) <= 1e-9


def trunk_parts(gradient: Tensor) -> list[Tensor]:
    return list(gradient.split([p.numel() for p in Model().trunk.parameters()]))


def check_dtensors_without_fully_shard() -> None:
    """Replicated parameters and a batch in parts: DTensor leaves the sum of gradients pending."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    w = nn.Parameter(distribute_tensor(randn(5, 2, dtype=F64, seed=1), mesh, [Replicate()]))
    x, _ = batch()
    factors = [1.0, -2.0]

    def losses(x: Tensor, w: Tensor) -> list[Tensor]:
        return [(factor * (x @ w)[:, t]).exp().sum() for t, factor in enumerate(factors)]

    fastmtl.AlignedMTL().backward(
        [loss.full_tensor() for loss in losses(distribute_tensor(x, mesh, [Shard(0)]), w)], [w]
    )
    alone = w.full_tensor().detach().requires_grad_()
    G = torch.stack([torch.autograd.grad(loss, alone)[0].reshape(-1) for loss in losses(x, alone)])
    assert w.grad.placements == w.placements
    assert relative(w.grad.full_tensor().reshape(-1), svd_align(G)) <= 1e-12


def check_sharded_with_an_absent_task() -> None:
    """One that no process has in this step; and nothing is said of process groups."""
    model, alone = Model(), Model()
    shard_each(model)
    shared = list(model.trunk.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2):
            x, y = batch(step)
            rows = torch.stack(task_rows(alone, x, y))
            rows[2] = 0.0
            model.zero_grad()
            losses = [*losses_of(model(part(x))[0], part(y))[:2], None]
            info = fastmtl.AlignedMTL().backward(losses, shared)
            assert relative(grads(model.trunk), svd_align(rows)) <= 1e-9
            assert gram_error(info.gram, rows) <= 1e-12
            assert all(p.grad is None for p in model.heads[2].parameters())


def check_sharded_groups_are_aggregated_each_on_its_own() -> None:
    x, y = batch()
    alone = Model()
    rows = torch.stack(task_rows(alone, x, y))
    sizes = [sum(p.numel() for p in alone.trunk[k].parameters()) for k in (0, 2)]
    parts = rows.split(sizes, 1)
    for shard in (shard_each, shard_hybrid):
        model = Model()
        shard(model)
        layers = [list(model.trunk[k].parameters()) for k in (0, 2)]
        info = fastmtl.AlignedMTL().backward(losses_of(model(part(x))[0], part(y)), groups=layers)
        assert relative(grads(model.trunk), torch.cat([svd_align(part) for part in parts])) <= 1e-9
        assert relative(grads(model.heads), head_gradients(alone, x, y)) <= 1e-12
        assert relative(info.gram, torch.stack([part @ part.T for part in parts])) <= 1e-12
        assert_same_bits(info.alpha)


def check_sharded_heads_are_scaled() -> None:
    """Named ones, whether they are sharded or not; added to what was there, with one run of each hook."""
    for shard in (shard_each, shard_encoder):
        model, alone, calls = Model(), Model(), []
        shard(model)
        shared, heads = list(model.trunk.parameters()), [list(head.parameters()) for head in model.heads]
        model.heads[1].weight.register_post_accumulate_grad_hook(lambda p, calls=calls: calls.append(1))
        for step in range(2):
            x, y = batch(step)
            info = fastmtl.AlignedMTL().backward(losses_of(model(part(x))[0], part(y)), shared, scale_heads=heads)
            losses = losses_of(alone(x if shard is shard_each else part(x))[0], y if shard is shard_each else part(y))
            (info.alpha @ torch.stack(losses)).backward()
        assert len(calls) == 2
        assert relative(grads(model.heads), grads(alone.heads)) <= 1e-9
        assert_same_bits(info.alpha)


def check_sharded_gradients_accumulate() -> None:
    model, alone = Model(), Model()
    shard_each(model)
    shared = list(model.trunk.parameters())
    trunk, heads = torch.zeros(()), torch.zeros(())
    for step in range(2):
        x, y = batch(step)
        trunk = trunk + svd_align(torch.stack(task_rows(alone, x, y)))
        heads = heads + head_gradients(alone, x, y)
        fastmtl.AlignedMTL().backward(losses_of(model(part(x))[0], part(y)), shared)
    assert relative(grads(model.trunk), trunk) <= 1e-9
    assert relative(grads(model.heads), heads) <= 1e-12


def check_sharded_failure_leaves_gradients_and_hooks() -> None:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise ArithmeticError("on purpose")

    model = Model()
    shard_each(model)
    shared = list(model.trunk.parameters())
    calls: list[int] = []
    for k, p in enumerate(shared):
        p.register_post_accumulate_grad_hook(lambda _, k=k: calls.append(k))
        p.grad = DTensor.from_local(
            torch.full_like(p.to_local(), k), p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
        )
    before = [p.grad for p in shared]
    x, y = batch()
    losses = losses_of(model(part(x))[0], part(y))
    losses[1] = Failing.apply(losses[1])
    assert_raises(ArithmeticError, "on purpose", fastmtl.AlignedMTL().backward, losses, shared)
    for k, (p, g) in enumerate(zip(shared, before, strict=True)):
        assert p.grad is g
        assert (g.to_local() == k).all()
    assert not calls
    model.zero_grad()
    fastmtl.AlignedMTL().backward(losses_of(model(part(x))[0], part(y)), shared)
    assert sorted(calls) == [0, 1, 2, 3]


def check_sharded_fan_out() -> None:
    """The upper bound needs nothing of FSDP2: one ordinary backward."""
    model, alone = Model(), Model()
    shard_each(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for step in range(3):
        x, y = batch(step)
        trunk, _ = encoder_truth(alone, x, y)
        heads = head_gradients(alone, x, y)
        optimizer.zero_grad()
        outputs, hs = model(part(x), fastmtl.AlignedMTL(), process_group=True)
        hs.total(losses_of(outputs, part(y))).backward()
        assert relative(grads(model.trunk), trunk) <= 1e-9
        assert relative(grads(model.heads), heads) <= 1e-12
        optimizer.step()
        step_alone(alone, torch.cat([trunk, heads]), 0.05)


def check_sharded_refusals() -> None:
    model = Model()
    fully_shard(model)
    shared = list(model.trunk.parameters())
    plain = nn.Parameter(torch.ones(2))
    assert distributed.is_sharded(shared)
    assert not distributed.is_sharded([plain])
    assert_raises(ValueError, "all parameters to be sharded, or none", distributed.is_sharded, [*shared, plain])
    x, y = batch()
    method = fastmtl.AlignedMTL()

    def refused(model: Model) -> list[Tensor]:
        return losses_of(model(part(x))[0], part(y))

    losses = refused(model)
    gathered = list(model.trunk.parameters())  # the root keeps them gathered between forward and backward
    assert not distributed.is_sharded(gathered)
    distributed.check_gathered(gathered)
    assert_raises(ValueError, "take the parameters before the forward", method.backward, losses, gathered)
    assert all(p.grad is None for p in gathered)
    assert_raises(ValueError, "fan_out", lambda: method.backward(refused(model), representation=model.h))
    losses = refused(model)
    for heads, wrong in ((True, "one for each task, with parameters of"), (model.heads[:2], "3 tasks, got 2")):
        message = f"scale_heads: expected .*{wrong}"
        assert_raises(ValueError, message, lambda h=heads: method.backward(losses, shared, scale_heads=h))
    assert_raises(ValueError, "features: expected none", lambda: method.backward(losses, shared, features=model.h))
    assert_raises(ValueError, "before the forward", lambda: method.backward(losses, shared, scale_heads=model.heads))
    assert all(p.grad is None for p in shared)


# ------------------------------------------------------------------------------------------------ the machinery


def assert_raises(kind: type[BaseException], match: str, function, *args) -> None:
    import pytest

    with pytest.raises(kind, match=match):
        function(*args)


CHECKS = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_") and inspect.isfunction(function)
}


def run(rank: int, world: int, folder: str, names: Sequence[str] = tuple(CHECKS)) -> None:
    """Runs the checks as this rank and leaves, for each, an empty file or one with the traceback.

    Each check has a process group of its own: where one fails on a rank in the middle, the others fail too, at once, as
    their connections are closed, and the next check starts afresh.
    """
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/rendezvous", world)
    for name in names:
        start(dist.PrefixStore(name, store), rank, world)
        try:
            CHECKS[name]()
            report = ""
        except BaseException:
            report = traceback.format_exc()
        dist.destroy_process_group()
        Path(folder, f"{name}.{rank}").write_text(report)


def start(store: dist.Store, rank: int, world: int) -> None:
    timeout = datetime.timedelta(seconds=20)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    dist.barrier()  # a rank that is done before another has connected to it would close the connection under it
