"""Inner products of the tasks' gradients of one weight, from the factors of its uses: docs/methods.md."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl._graph import Edge
from fastmtl.gramian.forms import Use

__all__ = ["BLOCK", "Contraction"]

_F64 = torch.float64
_COLUMNS = 2048  # of X and Y that are summed in their own dtype
BLOCK = 512  # rows of K = A Aᵀ at a time: what is made of them stays in the cache, and memory linear in N


class Contraction:
    """The uses of one weight, or of one of the disjoint blocks that it is split into.

    Args:
        parameter: the weight.
        uses: its uses. Those of one side have the same groups, width and depth, and are all dense or all indexed.
        block: dimension, start and length of the block.
    """

    def __init__(self, parameter: Tensor, uses: Sequence[Use], block: tuple[int, int, int] | None) -> None:
        self.parameter, self.uses = parameter, uses
        self.bias: Tensor | None = None  # of the same operations, and of no other
        self._block = block
        self._sides = [[use for use in uses if use.side == side] for side in (0, 1)]

    def gram(self, arrived: Mapping[Edge, Tensor | None], working: Callable[[torch.dtype], torch.dtype]) -> Tensor:
        """M [T, T], float64, or 0 where no cotangent arrived.

        Args:
            arrived: all T cotangents [T, ...] where they arrived.
            working: from the cotangents' dtype to that of products; sums over rows are in float64.
        """
        found = [side for uses in self._sides if (side := _side(uses, arrived, working)) is not None]
        M = sum((_own(A, B, self.bias is not None) for A, B in found), torch.zeros((), dtype=_F64))
        if len(found) == 2:
            X = _cross(*found[0], *found[1])
            M = M + X + X.T
        return M

    def gradients(self, cotangents: Mapping[Edge, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The weight and its gradient from one cotangent of every use, and the same of the bias."""
        used = [use for use in self.uses if use.edge in cotangents]
        if not used:
            return
        g = _sum(use.gradient(cotangents[use.edge]) for use in used).to(self.parameter.dtype)
        if self._block is not None:
            whole = torch.zeros_like(self.parameter)
            whole.narrow(*self._block).copy_(g)
            g = whole
        yield self.parameter, g
        if self.bias is not None:
            each = (use.cotangents(cotangents[use.edge][None]).sum(2).flatten() for use in used)
            yield self.bias, _sum(each).to(self.bias.dtype)


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    """Their sum; one alone is not copied."""
    return functools.reduce(torch.add, tensors)


def _side(
    uses: Sequence[Use], arrived: Mapping[Edge, Tensor | None], working: Callable[[torch.dtype], torch.dtype]
) -> tuple[Tensor, Tensor] | None:
    """A [g, N, I] (or ids [N]) and B [T, g, N, O] of uses whose rows follow each other."""
    factors, cotangents = [], []
    for use in uses:
        if (b := arrived[use.edge]) is not None:
            dtype = working(b.dtype)
            factors.append(use.factor(dtype))
            cotangents.append(use.cotangents(b.to(dtype)))
    if len(factors) > 1:
        return torch.cat(factors, 0 if uses[0].is_indexed else 1), torch.cat(cotangents, 2)
    return (factors[0], cotangents[0]) if factors else None


def _own(A: Tensor, B: Tensor, biased: bool) -> Tensor:
    """⟨B_tᵀ A, B_sᵀ A⟩ [T, T] = Σ_nm K_nm ⟨B_t[n], B_s[m]⟩, K = A Aᵀ; K + 1 adds the gradients Σ_n B_t[n] of a bias."""
    T, groups, N, _ = B.shape
    if A.dim() == 1:  # rows of the same id are summed; all others are orthogonal
        ids, place = A.unique(return_inverse=True)
        sums = B.new_zeros(T, len(ids), B.shape[3]).index_add_(1, place, B[:, 0])
        return ops.gram(sums.reshape(T, -1))
    M = torch.zeros(T, T, dtype=_F64, device=B.device)
    for g in range(groups):
        for start in range(0, N, BLOCK):
            rows = A[g, start : start + BLOCK]
            end = start + len(rows)
            own = B[:, g, start:end]
            for first, last in ((0, start), (start, end)):  # K is symmetric: what is left of the diagonal counts twice
                if first == last:
                    continue
                K = rows @ A[g, first:last].mT
                if biased:
                    K += 1.0
                # Not `matmul`, which would transpose all of B to make one product of it.
                X = _products(torch.bmm(K.expand(T, *K.shape), B[:, g, first:last]), own)
                M += X if last == end else X + X.T
    return (M + M.T) / 2


def _cross(A: Tensor, B: Tensor, other: Tensor, D: Tensor) -> Tensor:
    """⟨B_tᵀ A, Eᵀ D_s⟩ [T, T] = Σ_nm ⟨B_t[n], E[m]⟩ ⟨A[n], D_s[m]⟩ of uses on both sides; E dense, or ids."""
    M = torch.zeros(len(B), len(B), dtype=_F64, device=B.device)
    B, D = B[:, 0], D[:, 0]
    for start in range(0, D.shape[1], BLOCK):
        part = slice(start, start + BLOCK)
        P = B[:, :, other[part]] if other.dim() == 1 else B @ other[0, part].mT
        M += _products(P, A[0] @ D[:, part].mT)
    return M


def _products(X: Tensor, Y: Tensor) -> Tensor:
    """⟨X_t, Y_s⟩ [T, T] of X and Y [T, N, O]: sums over a few rows in their dtype, the rest in float64."""
    T, N, width = X.shape
    rows = max(1, min(N, _COLUMNS // max(1, width)))
    M = torch.zeros(T, T, dtype=_F64, device=X.device)
    for start, end, step in ((0, N - N % rows, rows), (N - N % rows, N, N % rows)):
        if start < end:
            left, right = (x[:, start:end].reshape(T, -1, step * width) for x in (X, Y))
            M += torch.bmm(left.transpose(0, 1), right.permute(1, 2, 0)).sum(0, dtype=_F64)
    return M
