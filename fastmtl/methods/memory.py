"""Methods with state as large as gradients: flat buffers, updated from gradients where autograd left them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.inputs import has_numbers
from fastmtl.methods.state import Remembering
from fastmtl.ops.reference.present import is_present
from fastmtl.pipeline import coarsest
from fastmtl.rule import Context

__all__ = ["GradientMemory", "Pieces", "move", "present"]

_BLOCK = 1 << 14  # below the size at which torch uses threads, whose waits would cost more


class Pieces:
    """The gradients of T tasks as pieces of their rows.

    A matrix [T, P] or [B, T, P] is one piece; in a list, each of the K parameters is one.
    """

    def __init__(self, grads: Tensor | Sequence[Tensor | None], T: int, out: Tensor | Sequence[Tensor]) -> None:
        self.T = T
        self.grads = grads
        self.out = [out] if isinstance(out, Tensor) else list(out)
        self.batch: tuple[int, ...] = tuple(grads.shape[:-2]) if isinstance(grads, Tensor) else ()
        ends = [0]
        for target in self.out:
            ends.append(ends[-1] + (target.shape[-1] if isinstance(grads, Tensor) else target.numel()))
        self.spans = list(itertools.pairwise(ends))  # of columns, one per piece
        self.P = ends[-1]
        self.dtype = coarsest(self.out)
        self.kept = torch.float64 if self.dtype is torch.float64 else torch.float32  # the dtype of the state
        self.block = _BLOCK if self.out[0].device.type == "cpu" else self.T * self.P  # entries at a time

    def __iter__(self) -> Iterator[tuple[slice, int, int, Tensor | None]]:
        """(tasks, start, stop, gradients [..., tasks, stop - start]), in blocks: all tasks of a matrix, each of a list.

        Whatever a step computes from a block stays in the cache, and takes little memory.
        """
        if isinstance(self.grads, Tensor):
            for begin, end in self.blocks(0, self.P, self.T):
                yield slice(0, self.T), begin, end, self.grads[..., begin:end]
            return
        for k in range(len(self.out)):
            for t, start, stop, g in self.piece(k):
                for begin, end in self.blocks(start, stop):
                    yield slice(t, t + 1), begin, end, None if g is None else g[None, begin - start : end - start]

    def blocks(self, start: int, stop: int, rows: int = 1) -> Iterator[tuple[int, int]]:
        """Blocks of these columns, for this many rows at once."""
        block = max(1, self.block // rows)
        for begin in range(start, stop, block):
            yield begin, min(begin + block, stop)

    def piece(self, k: int) -> Iterator[tuple[int, int, int, Tensor | None]]:
        """The same for one piece, without blocks."""
        start, stop = self.spans[k]
        for t in range(self.T):
            if isinstance(self.grads, Tensor):
                yield t, start, stop, self.grads[..., t, :]
            else:
                g = self.grads[t * len(self.out) + k]
                yield t, start, stop, None if g is None else g.reshape(-1)

    def are_small(self, dtype: torch.dtype) -> bool:
        """Whether they are pieces of a list, in this dtype, and several fit into one block, or they are on a device."""
        if isinstance(self.grads, Tensor) or self.P / len(self.out) > self.block:
            return False
        return all(target.dtype is dtype for target in self.out)

    def groups(self, t: int) -> Iterator[tuple[int, int, list[int], list[Tensor | None]]]:
        """Row t of a list in groups of pieces: start, stop, sizes, gradients [n]."""
        start, sizes, grads = 0, list[int](), list[Tensor | None]()
        for k, (begin, end) in enumerate(self.spans):
            if sizes and end - start > self.block:
                yield start, begin, sizes, grads
                start, sizes, grads = begin, [], []
            g = self.grads[t * len(self.out) + k]
            sizes.append(end - begin)
            grads.append(None if g is None else g.reshape(-1))
        yield start, self.P, sizes, grads

    def merged(self, dtype: torch.dtype) -> Iterator[tuple[slice, int, int, Tensor | None]]:
        """Like `__iter__`, but with as many small pieces at once as stay in the cache."""
        if not self.are_small(dtype):
            yield from self
            return
        one = torch.ones(1, dtype=torch.float64, device=self.out[0].device)
        for t in range(self.T):
            for start, stop, sizes, grads in self.groups(t):
                row = None
                if any(g is not None for g in grads):
                    row = torch.empty(stop - start, dtype=dtype, device=one.device)
                    ops.combine_rows(grads, one, row.split(sizes))
                yield slice(t, t + 1), start, stop, None if row is None else row[None]

    def gram(self) -> Tensor:
        """M [..., T, T]."""
        return ops.gram(self.grads) if isinstance(self.grads, Tensor) else ops.gram_rows(self.grads, self.T)

    def gram_with(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """M [..., T, T], the products [..., T] of the gradients with `row` [..., P], and the row's square [..., 1]."""
        rows = self._rows_with(row)
        if rows is not None:
            N = ops.gram_rows(rows, self.T + 1)
            return N[:-1, :-1].contiguous(), N[-1, :-1], N[-1, -1:]
        M = self.gram()
        products = M.new_zeros(M.shape[:-1])
        for t, start, stop, g in self:
            if g is not None:
                products[..., t] += (g.to(torch.float64) * row[..., None, start:stop]).sum(-1)
        return M, products, ops.gram(row[..., None, :])[..., 0]

    def combine_with(self, row: Tensor, alpha: Tensor, last: Tensor) -> None:
        """Writes αᵀ G + `last` [..., 1] times `row` [..., P]."""
        rows = self._rows_with(row)
        if rows is not None:
            ops.combine_rows(rows, torch.cat([alpha, last]), self.out)
            return
        flat = row * last.to(row.dtype)  # results of 16 bits are rounded once
        for t, start, stop, g in self:
            if g is not None:
                flat[..., start:stop] += (g.to(flat.dtype) * alpha[..., t, None].to(flat.dtype)).sum(-2)
        self.write(flat)

    def _rows_with(self, row: Tensor) -> list[Tensor | None] | None:
        """The gradients and one more row for the ops on rows; None for batches, and if dtypes differ."""
        if self.batch or any(target.dtype is not row.dtype for target in self.out):
            return None
        rows = self.grads.unbind() if isinstance(self.grads, Tensor) else self.grads
        return [*rows, *self._parts(row)]

    def _parts(self, row: Tensor) -> list[Tensor]:
        """A row [P], split into one piece per result."""
        parts = row.split([stop - start for start, stop in self.spans])
        return [part.view(target.shape) for part, target in zip(parts, self.out, strict=True)]

    def combine(self, alpha: Tensor) -> None:
        """Writes αᵀ G."""
        if isinstance(self.grads, Tensor):
            ops.combine(self.grads, alpha, self.out[0])
        else:
            ops.combine_rows(self.grads, alpha, self.out)

    def first(self) -> Pieces:
        """The same for the first task alone."""
        if isinstance(self.grads, Tensor):
            return Pieces(self.grads[..., :1, :], 1, self.out[0])
        return Pieces(self.grads[: len(self.out)], 1, self.out)

    def combine_rows(self, memory: Tensor, alpha: Tensor) -> None:
        """Writes αᵀ of the rows of `memory` [..., T, P]."""
        if any(target.dtype is not memory.dtype for target in self.out):
            flat = memory.new_empty((*memory.shape[:-2], self.P))
            ops.combine(memory, alpha, flat)
            self.write(flat)
        elif isinstance(self.grads, Tensor):
            ops.combine(memory, alpha, self.out[0])
        else:
            ops.combine_rows([part for row in memory for part in self._parts(row)], alpha, self.out)

    def write(self, flat: Tensor) -> None:
        """Writes a result [..., P]."""
        for (start, stop), target in zip(self.spans, self.out, strict=True):
            target.copy_(flat[..., start:stop].view(target.shape))


class GradientMemory(Remembering):
    """A method whose state is as large as gradients, one row per task or one row.

    The first step's gradients define the columns of the state; later gradients must have the same order and sizes. The
    state is float64 for float64 gradients, else float32. A step with a gradient that is not finite leaves it unchanged,
    and an absent task leaves its own row unchanged; the host does not wait for the device to find out.

    Attributes:
        memory: the size of the state, for T tasks and P parameters.
    """

    memory: ClassVar[str] = "T·P"
    remembers = True

    def aggregate_matrix(self, G: Tensor, out: Tensor, context: Context) -> None:
        self._aggregate(Pieces(G, G.shape[-2], out), context)

    def aggregate_list(
        self, grads: Sequence[Tensor | None], T: int, dtype: torch.dtype, out: list[Tensor], context: Context
    ) -> Info:
        return self._aggregate(Pieces(grads, T, out), context)

    def _aggregate(self, G: Pieces, context: Context) -> Info:
        """Writes the aggregation to `G.out`."""
        raise NotImplementedError


def present(M: Tensor) -> tuple[Tensor, Tensor]:
    """Which tasks are present, bool [..., T], and whether all gradients are finite, bool [..., 1]."""
    finite = M.isfinite().all(-1).all(-1, keepdim=True)
    return is_present(M), finite


def move(memory: Tensor, G: Pieces, where: Tensor, step: Tensor | float, factor: Tensor | None = None) -> None:
    """Moves the rows of `memory` [..., T, P] towards G's times `factor` [..., T], where `where` [..., T] is true.

    A missing piece of a present task counts as zeros.
    """
    if G.are_small(memory.dtype):
        _move_pieces(memory, G, where, step, factor)
        return
    for t, start, stop, g in G:
        row, when = memory[..., t, start:stop], where[..., t, None]
        if g is None:
            target = torch.where(when, 0.0, row)
        else:
            g = g.to(memory.dtype)
            target = torch.where(when, g if factor is None else g * factor[..., t, None].to(memory.dtype), row)
        if isinstance(step, Tensor):
            row.lerp_(target, step[..., t, None].to(memory.dtype))
        else:
            row.lerp_(target, step)


def _move_pieces(memory: Tensor, G: Pieces, where: Tensor, step: Tensor | float, factor: Tensor | None) -> None:
    """The same for a list: as many pieces at once as stay in the cache, by the op that combines rows."""
    if not isinstance(step, Tensor):  # made on the device, not copied there
        step = torch.full((G.T,), step, dtype=torch.float64, device=memory.device)
    steps = step.to(torch.float64).expand(G.T)
    alpha = torch.stack((1 - steps, steps if factor is None else steps * factor), 1)
    known = where.tolist() if has_numbers(where) else None
    for t in range(G.T):
        if known is not None and not known[t]:
            continue
        for start, stop, pieces, grads in G.groups(t):
            row = memory[t, start:stop]
            new = torch.empty_like(row)
            ops.combine_rows([*row.split(pieces), *grads], alpha[t], new.split(pieces))
            row.copy_(new if known is not None else torch.where(where[t], new, row))
