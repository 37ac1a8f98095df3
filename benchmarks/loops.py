"""A gradient collection loop as libraries in the style of LibMTL run it: what they do, not their code.

For every loss a backward pass into `.grad`; what lies there is flattened parameter by parameter into a vector; the
vectors are stacked into a matrix [T, P]; the matrix is aggregated; and the result is written back, slice by slice, as a
new `.grad` of each parameter. Nothing is preallocated, as it is not in those loops. The aggregation is Aligned-MTL's
in the gradients' dtype, so that the loop and `pure` differ in the collection alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fastmtl.scaling.baseline import task_weights

__all__ = ["Loop", "aligned", "collected", "graddrop", "row", "slices", "upper_bound"]


def aligned(G: Tensor) -> Tensor:
    """Aligned-MTL of a matrix [T, P] -> [P]."""
    T = len(G)
    return task_weights(G @ G.T, G.new_full((T,), 1 / T)) @ G


def graddrop(G: Tensor) -> Tensor:
    """GradDrop of a matrix [T, P] -> [P]: in every coordinate the sum of the gradients of one sign, drawn by purity."""
    purity = 0.5 * (1 + G.sum(0) / G.abs().sum(0))
    positive = purity > torch.rand_like(purity)
    return torch.where(positive, G.clamp_min(0).sum(0), G.clamp_max(0).sum(0))


def row(gradients: Iterable[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """One tensor per parameter -> a new vector [P], slice by slice; None leaves zeros."""
    vector = torch.zeros(sum(sizes))
    start = 0
    for g, size in zip(gradients, sizes, strict=True):
        if g is not None:
            vector[start : start + size] = g.detach().reshape(-1)
        start += size
    return vector


def collected(rows: Iterable[Sequence[Tensor | None]], sizes: Sequence[int]) -> Tensor:
    """T rows of one tensor per parameter -> a new matrix [T, P]."""
    return torch.stack([row(gradients, sizes) for gradients in rows])


def slices(vector: Tensor, shapes: Iterable[torch.Size]) -> list[Tensor]:
    """A vector [P] -> a new tensor per parameter."""
    tensors, start = [], 0
    for shape in shapes:
        tensors.append(vector[start : start + shape.numel()].view(shape).clone())
        start += shape.numel()
    return tensors


class Loop:
    """From T losses to `.grad` of the parameters that they share; those of the heads are left by the passes."""

    def __init__(self, shared: Sequence[Tensor], aggregate: Callable[[Tensor], Tensor] = aligned) -> None:
        """`aggregate` takes the matrix [T, P] and returns [P]."""
        self.shared, self.aggregate = shared, aggregate
        self.sizes = [p.numel() for p in shared]

    def __call__(self, losses: Sequence[Tensor]) -> None:
        """Sets every `.grad`; the graph is kept."""
        rows = []
        for loss in losses:
            for p in self.shared:
                p.grad = None
            loss.backward(retain_graph=True)
            rows.append(row([p.grad for p in self.shared], self.sizes))
        update = self.aggregate(torch.stack(rows))
        for p, g in zip(self.shared, slices(update, [p.shape for p in self.shared]), strict=True):
            p.grad = g


def upper_bound(
    h: Tensor, losses_of: Callable[[Tensor], Sequence[Tensor]], aggregate: Callable[[Tensor], Tensor] = aligned
) -> None:
    """The same with the gradients of a representation h: heads on a detached copy, then one pass behind it."""
    z = h.detach().requires_grad_()
    rows = []
    for loss in losses_of(z):
        z.grad = None
        loss.backward(retain_graph=True)
        rows.append(row([z.grad], [z.numel()]))
    h.backward(aggregate(torch.stack(rows)).view_as(h))
