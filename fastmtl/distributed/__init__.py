"""More than one process, with torch.distributed: what of an aggregation has to be summed or averaged over ranks.

Under data parallelism each rank sees a part of the batch, and the optimizer steps along the average over ranks. So that
is what has to be aggregated: aggregating on each rank and averaging afterwards is another, noisier direction.

* A shared representation: its rows on W ranks are parts of the same row of G, and only their Gram matrices have to be
  summed (`reduce_gram`, T × T numbers).
* Shared parameters: the task gradients themselves have to be averaged (`AveragedRows`). The Gram of an average is not
  the average of Grams.
* Parameters sharded by `fully_shard` (FSDP2): their gradients arrive averaged, each rank holding its shard of the
  columns (`sharded_update`).

Every rank has to take the same steps in the same order, as with all collectives.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastmtl import ops
from fastmtl.inputs import describe

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

    from fastmtl.info import Info
    from fastmtl.rule import Context

__all__ = ["AveragedRows", "agree", "check_gathered", "gram_group", "is_sharded", "reduce_gram", "sharded_update"]

# M [T, T] (float64), the coarsest dtype among the gradients behind it, and what else the step brings -> task weights,
# as `Info.alpha`.
Weigh: TypeAlias = "Callable[[Tensor, torch.dtype, Context], Info]"

# Ours for each default group that was met; a destroyed one takes its entry with it.
_groups: weakref.WeakKeyDictionary[ProcessGroup, ProcessGroup] = weakref.WeakKeyDictionary()


def gram_group(group: Any = None) -> ProcessGroup:
    """The process group of this library's collectives.

    Args:
        group: None or True for a group of our own over all ranks, made on the first call (by all ranks), so that
            nothing we send gets between the collectives of DistributedDataParallel; or a process group: that one.

    Raises:
        RuntimeError: torch.distributed is not available or not initialised.
        TypeError: `group` is something else.
        ValueError: this rank does not belong to `group`.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("process group: expected torch.distributed to be initialised (init_process_group)")
    if group is None or group is True:
        world: Any = dist.group.WORLD
        if world not in _groups:
            _groups[world] = cast("ProcessGroup", dist.new_group(group_desc="fastmtl"))
        return _groups[world]
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process group: expected a group that this rank belongs to")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process group: expected True, None or a ProcessGroup, got {describe(group)}")
    return group


def reduce_gram(M: Tensor, group: ProcessGroup) -> Tensor:
    """The Gram matrix of a representation of the whole batch, from those of the ranks' parts: Σ_r M_r / W².

    A rank's loss is the mean over its part of the batch, and what is minimised is the average over the W ranks: that
    scales every row of G by 1/W, and every entry of the Gram by 1/W².

    Args:
        M: this rank's Gram matrix [T, T] or a batch [B, T, T], float64; zeros where it has no gradient.
        group: from `gram_group`.

    Returns:
        The Gram of the whole batch, of the shape of `M`, float64; the same on every rank.

    Raises:
        RuntimeError: the collective failed, for example because a rank did not take part before the time-out.
    """
    total = M.clone(memory_format=torch.contiguous_format)
    _all_reduce(total, group)
    return total.div_(dist.get_world_size(group) ** 2)


def agree(x: Tensor, group: ProcessGroup) -> Tensor:
    """What the first rank of the group has, on all: methods that draw at random have to draw the same.

    Args:
        x: overwritten on the other ranks.
        group: from `gram_group`.
    """
    with _together():
        dist.broadcast(x, group=group, group_src=0)
    return x


class AveragedRows:
    """T task gradients averaged over ranks, of which this rank keeps its share of the columns: [T, P/W].

    Gradients go in one task at a time and may be freed at once, so that no rank holds all T; they are scattered while
    the next task's backward runs.

        rows = AveragedRows(shared, tasks=T, group=gram_group())
        for loss in losses:
            rows.append(torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True))
        updates, info = rows.combine(weigh, context)

    Args:
        parameters: the K shared parameters. They fix the layout, since which gradients are missing may differ between
            ranks; they and their order must be the same on every rank.
        tasks: number of tasks T.
        group: from `gram_group`.
    """

    def __init__(self, parameters: Sequence[Tensor], tasks: int, group: ProcessGroup) -> None:
        self._group = group
        self._tasks = tasks
        self._filled = 0
        self._device = parameters[0].device
        self._coarsest = _coarsest(parameters)
        self._reached = [False] * len(parameters)  # on this rank
        by_dtype: dict[torch.dtype, list[int]] = {}
        for k, p in enumerate(parameters):
            by_dtype.setdefault(p.dtype, []).append(k)
        self._buckets = [_Bucket(parameters, members, tasks, group) for members in by_dtype.values()]

    def append(self, row: Sequence[Tensor | None]) -> None:
        """Takes the next task's K gradients on this rank (None: no gradient) and starts to average them.

        Raises:
            RuntimeError: the collective failed.
        """
        for k, g in enumerate(row):
            self._reached[k] |= g is not None
        with torch.no_grad():
            for bucket in self._buckets:
                bucket.scatter(self._filled, row)
        self._filled += 1

    def combine(self, weigh: Weigh, context: Context) -> tuple[list[Tensor | None], Info]:
        """The aggregation of the averaged gradients, the same bits on every rank.

        Args:
            weigh: a method's map from the Gram matrix (float64 [T, T]), the coarsest dtype of the gradients and the
                context to an `Info` with the task weights `alpha`.
            context: what the step brings besides gradients; where `weigh` draws at random it has to have `agree`.

        Returns:
            K updates of the parameters' shapes and dtypes (None where no task of any rank has a gradient), and what
            `weigh` returned.

        Raises:
            RuntimeError: the collective failed.
        """
        T = self._tasks
        with torch.no_grad():
            M = torch.zeros(T, T, dtype=torch.float64, device=self._device)
            for bucket in self._buckets:
                M += ops.gram(bucket.rows())
            # One collective for both: the Gram, and which parameters any rank has a gradient of.
            reached = torch.tensor(self._reached, dtype=torch.float64)
            message = torch.cat([M.view(-1), reached.to(self._device, non_blocking=True)])
            _all_reduce(message, self._group)
            info = weigh(message[: T * T].view(T, T), self._coarsest, context)
            updates: list[Tensor | None] = [None] * len(self._reached)
            for bucket in self._buckets:
                for k, update in bucket.gather(info.alpha):
                    updates[k] = update
        # A rank that has a gradient of each parameter knows the answer without waiting for the device.
        if not all(self._reached):
            anywhere = message[T * T :].tolist()
            updates = [update if n else None for update, n in zip(updates, anywhere, strict=True)]
        return updates, info


class _Bucket:
    """The parameters of one dtype, laid out one after the other and padded to a multiple of W."""

    def __init__(self, parameters: Sequence[Tensor], members: list[int], tasks: int, group: ProcessGroup) -> None:
        like = parameters[members[0]]
        self._group = group
        self._world = dist.get_world_size(group)
        self._members = members
        self._shapes = [parameters[k].shape for k in members]
        self._sizes = [parameters[k].numel() for k in members]
        self._total = sum(self._sizes)
        share = -(-self._total // self._world)
        self._whole = torch.zeros(share * self._world, dtype=like.dtype, device=like.device)  # the padding stays zero
        self._mine = torch.zeros(tasks, share, dtype=like.dtype, device=like.device)
        self._pending: Any = None

    def scatter(self, t: int, row: Sequence[Tensor | None]) -> None:
        self._wait()
        if not self._total:
            return
        zero = self._whole.new_zeros(())
        grads = [row[k] for k in self._members]
        flat = [zero.expand(n) if g is None else g.reshape(-1) for g, n in zip(grads, self._sizes, strict=True)]
        torch.cat(flat, out=self._whole[: self._total])
        self._whole.div_(self._world)  # before the sum, as DistributedDataParallel does: float16 must not overflow
        with _together():
            self._pending = _reduce_scatter(self._mine[t], self._whole, group=self._group, async_op=True)

    def rows(self) -> Tensor:
        """This rank's columns of G, [T, P/W]."""
        self._wait()
        return self._mine

    def gather(self, alpha: Tensor) -> Iterator[tuple[int, Tensor]]:
        """αᵀ G of all columns, cut into the parameters' shapes."""
        share = self._mine.new_empty(self._mine.shape[1])
        whole = torch.empty_like(self._whole)
        if self._total:
            ops.combine(self._mine, alpha, share)
            with _together():
                _all_gather(whole, share, group=self._group)
        parts = whole[: self._total].split(self._sizes)
        for k, part, shape in zip(self._members, parts, self._shapes, strict=True):
            yield k, part.view(shape)

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            with _together():
                pending.wait()


def _coarsest(parameters: Sequence[Tensor]) -> torch.dtype:
    return max((p.dtype for p in parameters), key=lambda dtype: torch.finfo(dtype).eps)


def is_sharded(parameters: Sequence[Tensor]) -> TypeGuard[Sequence[DTensor]]:
    """Whether these are parameters of `fully_shard` (DTensors), for `sharded_update`.

    Raises:
        ValueError: some are and some are not, or they lie on several meshes.
    """
    if not dist.is_available():
        return False
    sharded = [p for p in parameters if _is_dtensor(p)]
    if not sharded:
        return False
    if len(sharded) < len(parameters):
        k, p = next((k, p) for k, p in enumerate(parameters) if not _is_dtensor(p))
        raise ValueError(f"shared: expected all parameters to be sharded, or none, got {describe(p)} at {k}. {_BEFORE}")
    if any(p.device_mesh != sharded[0].device_mesh for p in sharded):
        raise ValueError("shared: expected all sharded parameters on one device mesh")
    return True


def check_gathered(parameters: Iterable[Tensor]) -> None:
    """Raises ValueError where one of these parameters, seen after a backward, is a buffer of `fully_shard`.

    Between forward and backward a module may show its gathered parameters instead of its own. A gradient put there
    would miss this step and spoil the next. The backward gives their memory back, which is how to tell.
    """
    for p in parameters:
        if not _is_dtensor(p) and p.numel() and p.untyped_storage().size() == 0:
            raise ValueError(f"expected parameters, got a temporary copy gathered by fully_shard. {_BEFORE}")


def sharded_update(
    losses: Sequence[Tensor | None],
    parameters: Sequence[DTensor],
    weigh: Weigh,
    context: Context,
    *,
    retain_graph: bool = False,
) -> tuple[list[Tensor | None], Info]:
    """The aggregation of the task gradients of parameters under `fully_shard` (FSDP2), from T backward calls.

    FSDP2 averages gradients inside a backward and leaves this rank's shard in `.grad`: that is taken after each task's.
    `.grad` of `parameters` ends as it was, and their hooks do not see the tasks' gradients. All other parameters
    accumulate the gradient of the sum of the losses in `.grad`, as in any backward: a head that of its own loss.
    (Should a backward fail, they keep what the losses before it have left.)

    Args:
        losses: T scalar losses, None for a task that is absent: on all ranks, since each backward is collective.
        parameters: the K shared parameters: DTensors on one mesh, taken from the module before its forward.
        weigh: as in `AveragedRows.combine`.
        context: what the step brings besides gradients.
        retain_graph: keep the graph for another backward.

    Returns:
        K updates, DTensors like the parameters (None where no task has a gradient), and what `weigh` returned.

    Raises:
        ValueError: no loss left a gradient.
        RuntimeError: the collective failed.
    """
    rows: list[list[Tensor | None]] = []
    last = max(t for t, loss in enumerate(losses) if loss is not None)
    with _set_aside(parameters):
        for t, loss in enumerate(losses):
            if loss is None:
                rows.append([None] * len(parameters))
                continue
            loss.backward(retain_graph=retain_graph or t < last)
            row: list[Tensor | None] = []
            for p in parameters:
                row.append(None if p.grad is None else _shard(cast("DTensor", p.grad), p))
                p.grad = None
            rows.append(row)
    reached = [k for k in range(len(parameters)) if any(row[k] is not None for row in rows)]
    if not reached:
        raise ValueError(
            "shared: expected parameters that a loss depends on, but no backward left a gradient in any of them "
            "(with fully_shard also where set_requires_gradient_sync(False) holds it back)"
        )
    with torch.no_grad():
        counted = [k for k in reached if _counts(parameters[k])]
        M = _sharded_gram([row[k] for row in rows for k in counted], len(rows), parameters[0])
        mesh = parameters[0].device_mesh
        context = context._replace(agree=lambda x: _agree_over(mesh, x))
        info = weigh(M, _coarsest(parameters), context)
        shards = [torch.empty_like(_local(parameters[k])) for k in reached]
        ops.combine_rows([row[k] for row in rows for k in reached], info.alpha, shards)
        updates: list[Tensor | None] = [None] * len(parameters)
        for k, shard in zip(reached, shards, strict=True):
            updates[k] = _like(parameters[k], shard)
    return updates, info


def _sharded_gram(grads: list[Tensor | None], tasks: int, like: DTensor) -> Tensor:
    """The Gram matrix over all shards: the sum over the mesh of those of the local shards."""
    mesh = like.device_mesh
    M = ops.gram_rows(grads, tasks)
    total = M.to(mesh.device_type)  # with CPU offloading the gradients are where the mesh's backend may not reach
    for dim in range(mesh.ndim):
        _all_reduce(total, mesh.get_group(dim))
    return total.to(_local(like).device)


def _agree_over(mesh: Any, x: Tensor) -> Tensor:
    here = x.to(mesh.device_type)
    for dim in range(mesh.ndim):
        agree(here, mesh.get_group(dim))
    return here.to(x.device)


def _counts(parameter: DTensor) -> bool:
    """Whether this rank's shard is to be counted: of replicas (HSDP) one only."""
    coordinate = parameter.device_mesh.get_coordinate() or ()
    return all(
        at == 0 for at, placement in zip(coordinate, parameter.placements, strict=True) if placement.is_replicate()
    )


def _shard(gradient: DTensor, parameter: DTensor) -> Tensor:
    if gradient.placements != parameter.placements:  # a sum that is still pending; `fully_shard` leaves none
        with torch.no_grad():
            gradient = gradient.redistribute(placements=parameter.placements)
    return _local(gradient)


def _local(x: DTensor) -> Tensor:
    with torch.no_grad():
        return x.to_local()


def _like(parameter: DTensor, local: Tensor) -> DTensor:
    from torch.distributed.tensor import DTensor

    # With shape and stride given, since local sizes do not tell them where shards are uneven.
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


@contextmanager
def _set_aside(parameters: Sequence[DTensor]) -> Iterator[None]:
    """Within, `.grad` is None and no post-accumulate hook runs (FSDP2 calls those itself); then all is as it was."""
    grads = [p.grad for p in parameters]
    hooks = [(p._post_accumulate_grad_hooks, dict(p._post_accumulate_grad_hooks or {})) for p in parameters]
    try:
        for p, (active, _) in zip(parameters, hooks, strict=True):
            p.grad = None
            if active:
                active.clear()
        yield
    finally:
        for p, grad, (active, entries) in zip(parameters, grads, hooks, strict=True):
            p.grad = grad
            if entries:
                active.update(entries)


def _is_dtensor(x: Tensor) -> TypeGuard[DTensor]:
    if type(x) in (Tensor, torch.nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


_BEFORE = (
    "With fully_shard, take the parameters before the forward, as for the optimizer, by list(module.parameters()); "
    "a shared representation goes through fan_out"
)


def _all_reduce(x: Tensor, group: ProcessGroup) -> None:
    with _together():
        dist.all_reduce(x, group=group)


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "a collective of fastmtl failed: every rank has to take part in every step. A rank whose losses may not "
            "reach the shared representation has to sum them with FanOut.total: hs.total(losses).backward()"
        ) from error


# Their new names came with torch 2.14, which deprecates the old ones.
def _reduce_scatter(output: Tensor, whole: Tensor, **options: Any) -> Any:
    return getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(output, whole, **options)


def _all_gather(whole: Tensor, share: Tensor, **options: Any) -> Any:
    return getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(whole, share, **options)
