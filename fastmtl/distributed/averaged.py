"""Data parallelism: task gradients averaged over ranks; each rank keeps its share of the columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from fastmtl import ops
from fastmtl.distributed.collectives import all_gather, all_reduce, reduce_scatter, together
from fastmtl.info import Info
from fastmtl.pipeline import coarsest
from fastmtl.rule import Context

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["AveragedRows", "Weigh"]

# M [T, T] (float64), the coarsest dtype among the gradients behind it, and the step's other inputs -> task weights,
# as `Info.alpha`.
Weigh: TypeAlias = "Callable[[Tensor, torch.dtype, Context], Info]"


class AveragedRows:
    """T task gradients averaged over ranks; this rank keeps its share of the columns, [T, P/W].

    Gradients are added one task at a time and may be freed at once, so no rank holds all T; they are scattered while
    the next task's backward runs.

        rows = AveragedRows(shared, tasks=T, group=gram_group())
        for loss in losses:
            rows.append(torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True))
        updates, info = rows.combine(weigh, context)

    Args:
        parameters: the K shared parameters. They fix the layout, since different gradients may be missing on
            different ranks; they and their order must be the same on every rank.
        tasks: number of tasks T.
        group: from `gram_group`.
        sizes: sizes of consecutive groups of parameters that are aggregated separately; None for one problem.
        device: the Gram matrix's device; default: the first parameter's.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        tasks: int,
        group: ProcessGroup,
        sizes: Sequence[int] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._group = group
        self._tasks = tasks
        self._filled = 0
        self._device = parameters[0].device if device is None else device
        self._coarsest = coarsest(parameters)
        self._reached = [False] * len(parameters)  # on this rank
        self._problems = () if sizes is None else (len(sizes),)
        problems = [b for b, size in enumerate(sizes or [len(parameters)]) for _ in range(size)]
        kinds: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
        for k, (b, p) in enumerate(zip(problems, parameters, strict=True)):
            kinds.setdefault((b, p.dtype, p.device), []).append(k)
        self._buckets = [(b, _Bucket(parameters, members, tasks, group)) for (b, *_), members in kinds.items()]

    def append(self, row: Sequence[Tensor | None]) -> None:
        """Takes the next task's K gradients on this rank (None: no gradient) and starts to average them.

        Raises:
            RuntimeError: the collective failed.
        """
        for k, g in enumerate(row):
            self._reached[k] |= g is not None
        with torch.no_grad():
            for _, bucket in self._buckets:
                bucket.scatter(self._filled, row)
        self._filled += 1

    def combine(self, weigh: Weigh, context: Context, beside: Tensor | None = None) -> tuple[list[Tensor | None], Info]:
        """The aggregation of the averaged gradients, the same bits on every rank.

        Args:
            weigh: a method's map from the Gram matrix (float64 [T, T], or [B, T, T] of groups), the coarsest dtype of
                the gradients and the context to an `Info` with the task weights `alpha`.
            context: the step's inputs besides gradients; needs `agree` if `weigh` draws random numbers.
            beside: this rank's share of the Gram matrix of other gradients, float64 [T, T], summed over ranks.

        Returns:
            K updates of the parameters' shapes and dtypes (None where no task of any rank has a gradient), and what
            `weigh` returned.

        Raises:
            RuntimeError: the collective failed.
        """
        T = self._tasks
        with torch.no_grad():
            M = torch.zeros(*self._problems, T, T, dtype=torch.float64, device=self._device)
            if beside is not None:
                M += beside
            for b, bucket in self._buckets:
                M.view(-1, T, T)[b] += ops.gram(bucket.rows()).to(self._device)
            # One collective for both: the Gram, and which parameters have a gradient on any rank.
            reached = torch.tensor(self._reached, dtype=torch.float64, device="cpu")
            message = torch.cat([M.view(-1), reached.to(self._device, non_blocking=True)])
            all_reduce(message, self._group)
            info = weigh(message[: M.numel()].view(M.shape), self._coarsest, context)
            updates: list[Tensor | None] = [None] * len(self._reached)
            for b, bucket in self._buckets:
                for k, update in bucket.gather(info.alpha.reshape(-1, T)[b]):
                    updates[k] = update
        # A rank that has a gradient of each parameter knows the answer without waiting for the device.
        if not all(self._reached):
            anywhere = message[M.numel() :].tolist()
            updates = [update if n else None for update, n in zip(updates, anywhere, strict=True)]
        return updates, info


class _Bucket:
    """The parameters of one dtype and device, laid out one after another and padded to a multiple of W."""

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
        with together():
            self._pending = reduce_scatter(self._mine[t], self._whole, group=self._group, async_op=True)

    def rows(self) -> Tensor:
        """This rank's columns of G, [T, P/W]."""
        self._wait()
        return self._mine

    def gather(self, alpha: Tensor) -> Iterator[tuple[int, Tensor]]:
        """αᵀ G of all columns, cut into the parameters' shapes."""
        share = self._mine.new_empty(self._mine.shape[1])
        whole = torch.empty_like(self._whole)
        if self._total:
            ops.combine(self._mine, alpha.to(share.device), share)
            with together():
                all_gather(whole, share, group=self._group)
        parts = whole[: self._total].split(self._sizes)
        for k, part, shape in zip(self._members, parts, self._shapes, strict=True):
            yield k, part.view(shape)

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            with together():
                pending.wait()
