"""Inner products of the tasks' gradients of one weight, from the factors of its uses: docs/methods.md."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.gramian.forms import Use
from fastmtl.graph import Edge

__all__ = ["BLOCK", "CANCELLED", "Contraction", "from_block", "gram_of_factors", "scale_of", "times"]

_F64 = torch.float64
_NEAR = 20  # how many powers of two factors may be away from 1: products of others could leave the range of float32
_COLUMNS = 2048  # numbers of X and Y whose products are summed in their own dtype
# A squared norm that its float32 terms together exceed this many times has cancelled: float64 then.
CANCELLED = 4.0
BLOCK = 512  # rows of K = A Aᵀ at a time: products with them stay in the cache, and memory stays linear in N


class Contraction:
    """The uses of one weight, or of one of the disjoint blocks that it is split into.

    Args:
        parameter: the weight.
        uses: its uses. Those of one side have the same groups, width and depth, and are all dense or all indexed.
        block: dimension, start and length of the block.
        way: the outputs of the operations that pass the weight on to its uses.
    """

    def __init__(
        self, parameter: Tensor, uses: Sequence[Use], block: tuple[int, int, int] | None, way: Iterable[Edge] = ()
    ) -> None:
        self.parameter: Tensor = parameter
        self.uses: Sequence[Use] = uses
        self.way: list[Edge] = list(way)  # and the bias's
        self.bias: Tensor | None = None  # of the same operations, and of no other
        self._block = block
        self._sides = [[use for use in uses if use.side == side] for side in (0, 1)]

    def gram(self, arrived: Mapping[Edge, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """M [T, T] and the sizes [T] of the terms that its diagonal is summed from, both float64.

        M is off by some eps of `dtype` times these sizes; by no more than float64 rounds where they are zero.

        Args:
            arrived: all T cotangents [T, ...] of each use that they reached, which is at least one.
            dtype: of products, float32 or float64; sums over rows are in float64.
        """
        found = [side for uses in self._sides if (side := _side(uses, arrived, dtype)) is not None]
        return gram_of_factors(found, self.bias is not None)

    def factors(self, arrived: Mapping[Edge, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """A [g, N, I] (or ids [N]) and B [T, g, N, O] of gradients B_tᵀ A; None if they are not the whole gradient."""
        sides = [uses for uses in self._sides if uses]
        if len(sides) > 1 or self._block is not None or any(use.order is not None for use in sides[0]):
            return None
        return _side(sides[0], arrived, dtype)

    @property
    def side(self) -> int:
        """Which dimension of the weight the columns of B are, of the first use."""
        return self.uses[0].side

    def gradients(self, cotangents: Mapping[Edge, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The weight and its gradient from one cotangent of every use, and the bias and its gradient."""
        used = [use for use in self.uses if use.edge in cotangents]
        if not used:
            return
        target = self.parameter if self._block is None else self.parameter.narrow(*self._block)
        g = _sum(use.whole_gradient(cotangents[use.edge], target.shape) for use in used)
        yield self.parameter, from_block(g, self.parameter, self._block)
        if self.bias is not None:
            each = (use.cotangents(cotangents[use.edge][None]).sum(2).flatten() for use in used)
            yield self.bias, _sum(each).to(self.bias.dtype)


def gram_of_factors(found: Sequence[tuple[Tensor, Tensor]], biased: bool) -> tuple[Tensor, Tensor]:
    """See `Contraction.gram`: from the factors A and B of either side, with those of a bias if there is one."""
    scale = scale_of([B for _, B in found], 1)
    sizes = [scale_of([A], 0) for A, _ in found]
    found = [(times(A, size), times(B, scale)) for (A, B), size in zip(found, sizes, strict=True)]
    M = torch.zeros(scale.numel(), scale.numel(), dtype=_F64, device=scale.device)
    lengths = torch.zeros_like(scale)
    for (A, B), size in zip(found, sizes, strict=True):
        own, length = _own(A, B)
        M += own / size.square()
        lengths += length / size.square()
        if biased:
            M += _of_bias(B)
    if len(found) == 2:
        X = _cross(*found[0], *found[1]) / (sizes[0] * sizes[1])
        M += X + X.T
    return M / scale[:, None] / scale, lengths / scale / scale


def from_block(g: Tensor, parameter: Tensor, block: tuple[int, int, int] | None) -> Tensor:
    """The gradient of a parameter, from that of one of its blocks or of all of it."""
    if block is None:
        return g.view(parameter.shape).to(parameter.dtype)
    whole = torch.zeros_like(parameter)
    own = whole.narrow(*block)
    own.copy_(g.view(own.shape))
    return whole


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    """Their sum; a single one is not copied."""
    return functools.reduce(torch.add, tensors)


def _side(uses: Sequence[Use], arrived: Mapping[Edge, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """A [g, N, I] (or ids [N]) and B [T, g, N, O] of several uses, with their rows one after the other."""
    used = [use for use in uses if use.edge in arrived]
    factors = [use.factor(dtype) for use in used]
    cotangents = [use.cotangents(arrived[use.edge].to(dtype)) for use in used]
    if len(factors) > 1:
        return torch.cat(factors, 0 if uses[0].is_indexed else 1), torch.cat(cotangents, 2)
    return (factors[0], cotangents[0]) if factors else None


def scale_of(tensors: Sequence[Tensor], dims: int) -> Tensor:
    """Powers of two, float64, that bring the largest entries near 1 if they are far from it, with `dims` dimensions."""
    device = tensors[0].device
    sizes = [
        torch.linalg.vector_norm(x.flatten(dims), math.inf, dim=-1).double()
        for x in tensors
        if x.numel() and x.is_floating_point()
    ]
    scale = torch.ones(tensors[0].shape[:dims], dtype=_F64, device=device)
    if not sizes:
        return scale
    largest = torch.stack(sizes).amax(0)
    # The power that would bring the smallest numbers near 1 is beyond the largest number.
    limit = min(math.frexp(torch.finfo(x.dtype).max)[1] for x in tensors if x.is_floating_point()) - 2
    exponent = torch.frexp(largest).exponent.clamp_min(-limit)
    far = largest.isfinite() & (largest > 0) & (exponent.abs() > _NEAR)
    return torch.where(far, torch.ldexp(scale, -exponent), scale)


def times(x: Tensor, scale: Tensor) -> Tensor:
    """`x` times `scale`; `x` itself if that is known to be the same."""
    if not x.is_floating_point() or (scale.is_cpu and not (scale != 1).any()):  # nothing waits for a GPU
        return x
    return x * scale.to(x.dtype).reshape(scale.shape + (1,) * (x.dim() - scale.dim()))


def _own(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """⟨B_tᵀ A, B_sᵀ A⟩ [T, T] = Σ_nm K_nm ⟨B_t[n], B_s[m]⟩, K = A Aᵀ, and Σ_n K_nn ⟨B_t[n], B_t[n]⟩ [T].

    A is split into its mean over rows and the rest, and B_tᵀ A into (B_tᵀ 1) meanᵀ and the product with the rest: if
    cotangents add up to zero, as before a batch norm, the square of the mean would drown what matters in K.
    """
    T, groups, N, _ = B.shape
    M = torch.zeros(T, T, dtype=_F64, device=B.device)
    if A.dim() == 1:  # rows of the same id are summed; all others are orthogonal
        ids, place = A.unique(return_inverse=True)
        sums = torch.zeros(T, len(ids), B.shape[3], dtype=_F64, device=B.device)
        for own, b in zip(sums, B[:, 0], strict=True):
            own.index_add_(0, place, b.double())
        return ops.gram(sums.flatten(1)), M.diagonal()
    if not A.numel() or not B.numel():
        return M, M.diagonal()
    mean = A.mean(1, keepdim=True)
    A = A - mean
    lengths = torch.zeros(T, dtype=_F64, device=B.device)
    for g in range(groups):
        for start in range(0, N, BLOCK):
            rows = A[g, start : start + BLOCK]
            end = start + len(rows)
            own = B[:, g, start:end]
            for first, last in ((0, start), (start, end)):  # K is symmetric: what is left of the diagonal counts twice
                if first == last:
                    continue
                K = rows @ A[g, first:last].mT
                # Not `matmul`, which would transpose all of B for a single product.
                X = _products(torch.bmm(K.expand(T, *K.shape), B[:, g, first:last]), own)
                M += X if last == end else X + X.T
        along = (A[g] @ mean[g].mT).mT  # [1, N]
        sums = B[:, g].sum(1, dtype=_F64)
        X = torch.bmm(along.expand(T, 1, N), B[:, g])[:, 0].double() @ sums.mT
        M += X + X.T + mean[g].double().square().sum() * (sums @ sums.mT)
        if B.dtype is not _F64:
            squares = torch.linalg.vector_norm(A[g], dim=1).square()
            lengths += (torch.linalg.vector_norm(B[:, g], dim=2).square() @ squares).double()
    return (M + M.T) / 2, lengths


def _of_bias(B: Tensor) -> Tensor:
    """⟨B_tᵀ 1, B_sᵀ 1⟩ [T, T]: from one more column of A, of ones."""
    sums = B.sum(2, dtype=_F64).flatten(1)
    return sums @ sums.mT


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
        if start < end and width:
            left, right = (x[:, start:end].reshape(T, -1, step * width) for x in (X, Y))
            M += torch.bmm(left.transpose(0, 1), right.permute(1, 2, 0)).sum(0, dtype=_F64)
    return M
