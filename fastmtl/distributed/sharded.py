"""Parameters sharded by `fully_shard` (FSDP2): averaged gradients arrive in `.grad`, one shard per rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastmtl import ops
from fastmtl.distributed.averaged import Weigh
from fastmtl.distributed.collectives import agree, all_reduce
from fastmtl.info import Info
from fastmtl.inputs import Row, describe
from fastmtl.pipeline import coarsest
from fastmtl.rule import Context

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["check_gathered", "is_sharded", "sharded_update"]


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
    """Raises ValueError if one of these parameters, looked at after a backward, is a buffer of `fully_shard`.

    Between forward and backward a module may show its gathered parameters instead of its own. A gradient put there
    would be missing in this step and spoil the next. The backward frees their memory, which is how to tell.
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
    sizes: Sequence[int] | None = None,
    heads: Sequence[Sequence[Tensor]] = (),
) -> tuple[list[Tensor | None], list[tuple[Tensor, Tensor]], Info]:
    """The aggregation of the task gradients of parameters under `fully_shard` (FSDP2), from T backward calls.

    FSDP2 averages gradients inside a backward and leaves this rank's shard in `.grad`, which is taken after each task.
    `.grad` of `parameters` and `heads` ends as it was, and their hooks do not see the tasks' gradients. All other
    parameters accumulate the gradient of the sum of the losses in `.grad`, as in any backward; for a head, that of its
    own loss. (If a backward fails, they keep the gradients of the losses before it.)

    Args:
        losses: T scalar losses, None for a task that is absent: on all ranks, since each backward is collective.
        parameters: the K shared parameters: DTensors on one mesh, taken from the module before its forward.
        weigh: as in `AveragedRows.combine`.
        context: the step's inputs besides gradients.
        retain_graph: keep the graph for another backward.
        sizes: sizes of consecutive groups of parameters that are aggregated separately; None for one problem.
        heads: for each of the T tasks, parameters, sharded or not, whose gradient of its loss is multiplied by α_t.

    Returns:
        K updates, DTensors like the parameters (None where no task has a gradient), the heads' parameters with theirs,
        and what `weigh` returned.

    Raises:
        ValueError: no loss left a gradient.
        RuntimeError: the collective failed.
    """
    rows: list[Row] = []
    own: list[list[tuple[Tensor, Tensor]]] = [[] for _ in losses]
    scaled = {id(p): p for head in heads for p in head}
    last = max(t for t, loss in enumerate(losses) if loss is not None)
    with _set_aside([*parameters, *scaled.values()]):
        for t, loss in enumerate(losses):
            if loss is None:
                rows.append([None] * len(parameters))
                continue
            loss.backward(retain_graph=retain_graph or t < last)
            row: Row = []
            for p in parameters:
                row.append(None if p.grad is None else _shard(p.grad, p))
                p.grad = None
            rows.append(row)
            for head in scaled.values():
                if head.grad is not None:
                    own[t].append((head, _shard(head.grad, head) if _is_dtensor(head) else head.grad))
                    head.grad = None
    check_gathered(scaled.values())
    reached = [k for k in range(len(parameters)) if any(row[k] is not None for row in rows)]
    if not reached:
        raise ValueError(
            "shared: expected parameters that a loss depends on, but no backward left a gradient in any of them "
            "(with fully_shard also where set_requires_gradient_sync(False) holds it back)"
        )
    ends = list(itertools.accumulate(sizes or [len(parameters)]))
    groups = [[k for k in reached if end - size <= k < end] for size, end in zip(sizes or ends, ends, strict=True)]
    with torch.no_grad():
        M = torch.stack([_gram(rows, [k for k in group if _counts(parameters[k])], parameters[0]) for group in groups])
        M = _over_shards(M if sizes else M[0], parameters[0])
        mesh = parameters[0].device_mesh
        context = context._replace(agree=lambda x: _agree_over(mesh, x))
        info = weigh(M, coarsest(parameters), context)
        updates: list[Tensor | None] = [None] * len(parameters)
        for group, alpha in zip(groups, info.alpha.view(len(groups), -1), strict=True):
            if group:
                shards = [torch.empty_like(_local(parameters[k])) for k in group]
                ops.combine_rows([row[k] for row in rows for k in group], alpha, shards)
                for k, shard in zip(group, shards, strict=True):
                    updates[k] = _like(parameters[k], shard)
        of_heads = _weighted(own, info.alpha) if heads else []
    return updates, of_heads, info


def _weighted(own: Sequence[Sequence[tuple[Tensor, Tensor]]], alpha: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Parameters with the weighted sum of their tasks' gradients, or shards of them."""
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    for weight, found in zip(alpha, own, strict=True):
        for p, g in found:
            g = g * weight.to(g)
            sums[id(p)] = p, sums[id(p)][1] + g if id(p) in sums else g
    return [(p, _like(p, g) if _is_dtensor(p) else g) for p, g in sums.values()]


def _gram(rows: Sequence[Row], columns: Sequence[int], like: DTensor) -> Tensor:
    """The Gram matrix of these columns of the local shards [T, T]."""
    if not columns:
        return torch.zeros(len(rows), len(rows), dtype=torch.float64, device=_local(like).device)
    return ops.gram_rows([row[k] for row in rows for k in columns], len(rows))


def _over_shards(M: Tensor, like: DTensor) -> Tensor:
    """The Gram matrix over all shards: the sum over the mesh of those of the local shards."""
    mesh = like.device_mesh
    total = M.to(mesh.device_type)  # with CPU offloading the gradients are where the mesh's backend may not reach
    for dim in range(mesh.ndim):
        all_reduce(total, mesh.get_group(dim))
    return total.to(_local(like).device)


def _agree_over(mesh: Any, x: Tensor) -> Tensor:
    here = x.to(mesh.device_type)
    for dim in range(mesh.ndim):
        agree(here, mesh.get_group(dim))
    return here.to(x.device)


def _counts(parameter: DTensor) -> bool:
    """Whether to count this rank's shard: only one of several replicas (HSDP) counts."""
    coordinate = parameter.device_mesh.get_coordinate() or ()
    return all(
        at == 0 for at, placement in zip(coordinate, parameter.placements, strict=True) if placement.is_replicate()
    )


def _shard(found: Tensor, parameter: DTensor) -> Tensor:
    gradient = cast("DTensor", found)
    if gradient.placements != parameter.placements:  # a sum that is still pending; `fully_shard` leaves none
        with torch.no_grad():
            gradient = gradient.redistribute(placements=parameter.placements)
    return _local(gradient)


def _local(x: DTensor) -> Tensor:
    with torch.no_grad():
        return x.to_local()


def _like(parameter: DTensor, local: Tensor) -> DTensor:
    from torch.distributed.tensor import DTensor

    # Shape and stride are given, since they do not follow from local sizes if shards are uneven.
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


@contextmanager
def _set_aside(parameters: Sequence[Tensor]) -> Iterator[None]:
    """A context without `.grad` and post-accumulate hooks (FSDP2 calls those itself); both come back afterwards."""
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
