"""The process group of this library, and its collectives. torch.distributed only."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastmtl.inputs import describe

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["agree", "all_gather", "all_reduce", "gather", "gram_group", "reduce_gram", "reduce_scatter", "together"]

# Our group for each default group met so far; the entry of a destroyed one goes with it.
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
    """The Gram matrix of a representation for the whole batch, from the ranks' Gram matrices: Σ_r M_r / W².

    A rank's loss is the mean over its part of the batch, and training minimises the average over the W ranks. That
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
    all_reduce(total, group)
    return total.div_(dist.get_world_size(group) ** 2)


def agree(x: Tensor, group: ProcessGroup) -> Tensor:
    """The first rank's value, on all ranks: methods that draw random numbers have to draw the same.

    Args:
        x: overwritten on the other ranks.
        group: from `gram_group`.
    """
    with together():
        dist.broadcast(x, group=group, group_src=0)
    return x


def all_reduce(x: Tensor, group: ProcessGroup) -> None:
    """The sum over ranks, in place."""
    with together():
        dist.all_reduce(x, group=group)


def gather(x: Tensor, owner: int, group: ProcessGroup) -> list[Tensor] | None:
    """The values of all ranks, on the rank with this number in the group; None on the others."""
    mine = dist.get_rank(group) == owner
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))] if mine else None
    with together():
        dist.gather(x, parts, group=group, group_dst=owner)
    return parts


@contextmanager
def together() -> Iterator[None]:
    """Adds a likely cause to the error of a collective that fails."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "a collective of fastmtl failed: every rank has to take part in every step. A rank whose losses may not "
            "reach the shared representation has to sum them with FanOut.total: hs.total(losses).backward()"
        ) from error


# Their new names came with torch 2.14, which deprecates the old ones.
def reduce_scatter(output: Tensor, whole: Tensor, **options: Any) -> Any:
    """`reduce_scatter_single`, under its old name in older versions of torch."""
    return getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(output, whole, **options)


def all_gather(whole: Tensor, share: Tensor, **options: Any) -> Any:
    """`all_gather_single`, likewise."""
    return getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(whole, share, **options)
