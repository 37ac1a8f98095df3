"""The best plain PyTorch a user would write from losses and rows on: what fastmtl is compared with.

On a matrix that is `fastmtl.scaling.baseline.Pure`.
Buffers are allocated once and reused, α is a chain of matrix-vector products and never a T×T matrix, and what can be a
view is one. Everything stays in the gradients' dtype: float64 would be slower, and few write it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.scaling.baseline import Pure

__all__ = ["Backward", "FanOut", "Ragged", "autograd_loop"]


class Ragged:
    """Aligned-MTL of T rows of K tensors: concatenate, aggregate, split into views."""

    def __init__(self, T: int, shapes: Sequence[Sequence[int]]) -> None:
        """Allocates the matrix [T, P] and the result."""
        self.shapes = [torch.Size(shape) for shape in shapes]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.matrix = torch.empty(T, sum(self.sizes))
        self.flat = Pure(self.matrix.shape)

    def flatten(self, rows: Sequence[Sequence[Tensor]]) -> Tensor:
        """T rows of K tensors -> [T, P], overwritten by the next call."""
        for row, target in zip(rows, self.matrix, strict=True):
            torch.cat([g.reshape(-1) for g in row], out=target)
        return self.matrix

    def __call__(self, rows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """T rows of K tensors -> K tensors, overwritten by the next call."""
        pieces = self.flat(self.flatten(rows)).split(self.sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]


def autograd_loop(
    losses: Sequence[Tensor], shared: Sequence[Tensor], heads: Sequence[Sequence[Tensor]]
) -> list[tuple[Tensor, ...]]:
    """T backward passes: for each loss the gradients of the shared parameters, then those of its own head."""
    return [
        torch.autograd.grad(loss, [*shared, *head], retain_graph=True) for loss, head in zip(losses, heads, strict=True)
    ]


class Backward:
    """From T losses to `.grad`: T backward passes, flatten, aggregate, write back."""

    def __init__(self, shared: Sequence[Tensor], heads: Sequence[Sequence[Tensor]]) -> None:
        """Allocates the matrix [T, P] and the result."""
        self.shared, self.heads = shared, heads
        self.ragged = Ragged(len(heads), [p.shape for p in shared])

    def __call__(self, losses: Sequence[Tensor]) -> None:
        """Sets every `.grad`; those of the shared parameters are overwritten by the next call."""
        rows = autograd_loop(losses, self.shared, self.heads)
        K = len(self.shared)
        for parameter, g in zip(self.shared, self.ragged([row[:K] for row in rows]), strict=True):
            parameter.grad = g
        for head, row in zip(self.heads, rows, strict=True):
            for parameter, g in zip(head, row[K:], strict=True):
                parameter.grad = g


class FanOut:
    """Aligned-MTL-UB inside one ordinary backward: T aliases of a representation, their gradients aggregated."""

    def __init__(self, T: int, shape: Sequence[int]) -> None:
        """Allocates the matrix [T, P] and the result, for a representation of this shape."""
        self.tasks = T
        self.stacked = torch.empty(T, *shape)
        self.matrix = self.stacked.view(T, -1)
        self.flat = Pure(self.matrix.shape)

    def __call__(self, h: Tensor) -> tuple[Tensor, ...]:
        """T aliases; what the encoder gets is overwritten by the next backward."""
        return _Aliases.apply(self, h)


class _Aliases(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, owner: FanOut, h: Tensor) -> tuple[Tensor, ...]:
        ctx.owner = owner
        return tuple(h.view_as(h) for _ in range(owner.tasks))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        owner = ctx.owner
        torch.stack(grads, out=owner.stacked)
        return None, owner.flat(owner.matrix).view_as(grads[0])
