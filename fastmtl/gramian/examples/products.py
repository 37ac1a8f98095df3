"""Inner products of the gradients of T · B losses of B examples, from the factors of their rows.

The gradient of loss (t, b) of a weight is G_tb = C_tbᵀ A_b, from the inputs A_b [S, I] and the cotangents C_tb [S, O]
of the S rows of example b. So ⟨G_tb, G_sc⟩ = Σ_pq (A_b A_cᵀ)_pq (C_tb C_scᵀ)_pq, which is cheaper if these S² products
of rows are fewer than the entries of a gradient. Otherwise the product of the gradients themselves is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fastmtl.gramian.contraction import scale_of, times
from fastmtl.gramian.forms.convolution import Convolution

__all__ = ["Gram", "Per", "through_rows"]

Per: TypeAlias = Literal["all", "example", "task"]

_F64 = torch.float64
_ENTRIES = 1 << 17  # entries of A Aᵀ, or of a block of gradients, at a time: what is made of them stays in the cache
_NEAR = (2.0**-19, 2.0**19)  # norms of rows that need no scaling
_SMALL = 3  # times what a convolution reads and returns: gradients that are kept for the update
_PAIR = 6.0  # multiply-adds that an entry of A Aᵀ ∘ C Cᵀ takes besides the products


class Gram:
    """The Gram matrix that contributions are added to, float64.

    Args:
        tasks: T.
        examples: B.
        per: "all" for one matrix of T · B losses; "example" for B of T; "task" for T of B.
        device: its device.
    """

    def __init__(self, tasks: int, examples: int, per: Per, device: torch.device) -> None:
        self.T, self.B, self.per = tasks, examples, per
        shape = {
            "all": (tasks, examples, tasks, examples),
            "example": (examples, tasks, tasks),
            "task": (tasks, examples, examples),
        }
        self._sum = torch.zeros(shape[per], dtype=_F64, device=device)

    def like(self) -> Gram:
        """A zero one of the same kind."""
        return Gram(self.T, self.B, self.per, self._sum.device)

    @property
    def matrix(self) -> Tensor:
        """M: [T·B, T·B] with loss (t, b) at t·B + b, [B, T, T] or [T, B, B]."""
        n = self.T * self.B
        return self._sum.view(n, n) if self.per == "all" else self._sum

    @property
    def diagonal(self) -> Tensor:
        """Squared norms of the gradients [T, B]."""
        d = self.matrix.diagonal(dim1=-2, dim2=-1)
        return d.mT if self.per == "example" else d.reshape(self.T, self.B)

    def add(self, other: Gram) -> None:
        """Adds another Gram matrix."""
        self._sum += other._sum

    def replace(self, old: Gram, new: Gram) -> None:
        """Adds one Gram matrix in place of another."""
        self._sum += new._sum - old._sum

    def add_rows(self, G: Tensor) -> None:
        """Adds the products of gradients [T, B, P]."""
        own = self._products(G)
        if not _are_near(own.diagonal(dim1=-2, dim2=-1), squares=True):
            scale = scale_of([G], 2)
            other = self.like()
            other._add(self._products(times(G, scale)))
            self.add_scaled(other, scale)
        else:
            self._add(own)

    def _products(self, G: Tensor) -> Tensor:
        """The products of gradients [T, B, P], in their dtype: of the matrix's shape, or a part of it."""
        if self.per == "all":
            G = G.reshape(self.T * self.B, -1)
        elif self.per == "example":
            G = G.transpose(0, 1)
        return G @ G.mT

    def _add(self, products: Tensor) -> None:
        self._sum.view(products.shape).add_(products)

    def add_scaled(self, other: Gram, scale: Tensor) -> None:
        """Adds the Gram matrix of gradients that were multiplied by powers of two [T, B]."""
        if self.per == "all":
            flat = scale.reshape(-1)
            self.matrix.add_(other.matrix / flat[:, None] / flat)
        else:
            own = scale.mT if self.per == "example" else scale
            self._sum += other._sum / own[:, :, None] / own[:, None, :]

    def add_factors(self, A: Tensor, C: Tensor, biased: bool = False) -> tuple[Tensor | None, Tensor | None]:
        """Adds the products of the gradients C_tbᵀ A_b.

        Args:
            A: [B, S, I].
            C: [T, B, S, O].
            biased: whether to add those of a bias, too.

        Returns:
            The sizes [T, B] of the terms that squared norms are summed from, if there is more than one row, and the
            gradients [T, B, O, I] if they were formed and are no larger than A and C.
        """
        S = A.shape[1]
        ones = A.new_ones(len(A)) if biased else None
        # Norms of rows: they give the sizes of sums, and show whether products could leave the range of float32.
        a, c = torch.linalg.vector_norm(A, dim=2), torch.linalg.vector_norm(C, dim=3)
        if _are_near(a.amax(1)) and _are_near(c.amax(2)):
            return (a * c).double().square().sum(2) if S > 1 else None, self._add_factors(A, C, ones)
        scale_a, scale_c = scale_of([A] if ones is None else [A, ones[:, None]], 1), scale_of([C], 2)
        scale = scale_c * scale_a
        A, C = times(A, scale_a), times(C, scale_c)
        own = self.like()
        rows = own._add_factors(A, C, None if ones is None else times(ones, scale_a))
        self.add_scaled(own, scale)
        products = torch.linalg.vector_norm(A, dim=2).double() * torch.linalg.vector_norm(C, dim=3).double()
        sizes = products.square().sum(2) / scale.square() if S > 1 else None
        return sizes, None if rows is None else times(rows, 1 / scale)

    def add_windows(self, use: Convolution, C: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The same for the windows of a convolution's inputs, made for some examples at a time; C [T, B, S, O].

        All of them at once would take as many times the memory of the inputs as the kernel has entries.
        """
        T, B, S, width = C.shape
        a, c = use.sizes(C.dtype), _lengths(C)
        own, scales = self, None
        if not (_are_near(a) and _are_near(c.amax(2))):
            own, scales = self.like(), (scale_of([a[:, None]], 1), scale_of([C], 2))
            C = times(C, scales[1])
            c = _lengths(C)
        some = max(1, _ENTRIES // (S * use.depth))
        numbers = use.inputs + C.numel()
        small = T * B * width * use.depth <= _SMALL * numbers
        step = width if small else max(1, max(numbers, 8 * _ENTRIES) // (T * B * use.depth))
        G = C.new_empty(0)
        for o in range(0, width, step):
            D = C[..., o : o + step].mT
            G = C.new_empty(T, B, D.shape[2], use.depth)
            for b in range(0, B, some):
                e = min(b + some, B)
                A = use.windows(C.dtype, b, e)[0]
                A = A if scales is None else times(A, scales[0][b:e])
                for t in range(T):
                    torch.bmm(D[t, b:e], A, out=G[t, b:e])
            own._add(own._products(G.flatten(2)))
        sizes = None
        if S > 1:
            sizes = (use.lengths(C.dtype, None if scales is None else scales[0]) * c).double().square().sum(2)
        if scales is None:
            return sizes, G if small else None
        scale = scales[0] * scales[1]
        self.add_scaled(own, scale)
        return None if sizes is None else sizes / scale.square(), times(G, 1 / scale) if small else None

    def add_products(self, factors: Sequence[tuple[Tensor, Tensor, bool]]) -> bool:
        """Adds those of weights with one task and a row for each example: A [B, I], C [B, O] and whether with a bias.

        All or none: False if there are too many, or if the squares on the diagonals are not of a size near 1.
        """
        if self.per == "example" or self.B**2 > _ENTRIES or self._sum.device.type != "cpu":
            return False
        products = [(A @ A.mT, C @ C.mT, biased) for A, C, biased in factors]
        squares = [x.diagonal() for K, X, _ in products for x in (K, X)]
        if not squares or not _are_near(torch.cat(squares), squares=True):
            return False
        for K, X, biased in products:
            self._add(X.addcmul_(X, K) if biased else X.mul_(K))
        return True

    def _add_factors(self, A: Tensor, C: Tensor, last: Tensor | None) -> Tensor | None:
        """Adds the products the cheaper way; returns the gradients if they were formed and are small.

        `last` [B] is one more column of A.
        """
        if last is not None or through_rows(self, C, A.shape[2]):
            self._add_pairs(A, C, last)
            return None
        return self._add_gradients(A, C)

    def _add_pairs(self, A: Tensor, C: Tensor, last: Tensor | None) -> None:
        T, B, S, _ = C.shape
        if self.per == "example":
            K = torch.bmm(A, A.mT)
            if last is not None:
                K += last.square()[:, None, None]
            for t in range(T):
                for s in range(t, T):
                    X = (torch.bmm(C[t], C[s].mT) * K).sum((1, 2), dtype=_F64)
                    self._sum[:, t, s] += X
                    if s != t:
                        self._sum[:, s, t] += X
            return
        step = max(1, _ENTRIES // (B * S * S))
        pairs = [(t, s) for t in range(T) for s in range(t, t + 1 if self.per == "task" else T)]
        A, C = A.reshape(B * S, -1), C.reshape(T, B * S, -1)
        last = None if last is None else last.repeat_interleave(S) if S > 1 else last
        for b in range(0, B, step):
            e = min(b + step, B)
            start = b if T == 1 else 0  # the matrix is symmetric: nothing left of the diagonal block is computed
            K = A[b * S : e * S] @ A[start * S :].mT  # the same for all tasks
            if last is not None:
                K.addr_(last[b * S : e * S], last[start * S :])
            for t, s in pairs:
                first = b if s == t else 0
                X = C[t, b * S : e * S] @ C[s, first * S :].mT
                X *= K[:, (first - start) * S :]
                if S > 1:
                    X = X.view(e - b, S, -1, S).sum((1, 3), dtype=_F64)
                block = self._sum[t] if self.per == "task" else self._sum[t, :, s]
                block[b:e, first:] += X
                if s != t:
                    self._sum[s, :, t, b:e] += X.mT
                elif e < B:
                    block[e:, b:e] += X[:, e - b :].mT

    def _add_gradients(self, A: Tensor, C: Tensor) -> Tensor | None:
        T, B, _, width = C.shape
        depth = A.shape[2]
        small = T * B * width * depth <= A.numel() + C.numel()
        most = min(8 * _ENTRIES, max(2 * _ENTRIES, A.numel() + C.numel()))
        step = width if small else max(1, most // (T * B * depth))
        G = None
        for o in range(0, width, step):
            D = C[..., o : o + step].mT
            G = torch.bmm(D[0], A)[None] if T == 1 else D @ A  # `@` would copy a transposed operand
            self._add(self._products(G.flatten(2)))  # in range, since A and C have been scaled
        return G if small else None

    def add_indexed(self, ids: Tensor, C: Tensor) -> None:
        """Adds the products of gradients whose rows A_b are unit vectors: ids [B, S], C [T, B, S, O]."""
        T, B, _, width = C.shape
        unique, place = ids.unique(return_inverse=True)
        step = max(1, 8 * _ENTRIES // (T * B * max(1, width)))
        for u in range(0, len(unique), step):
            n = min(step, len(unique) - u)
            b, s = ((place >= u) & (place < u + n)).nonzero(as_tuple=True)
            G = C.new_zeros(T, B * n, width).index_add_(1, b * n + place[b, s] - u, C[:, b, s])
            self.add_rows(G.view(T, B, n * width))

    def add_cross(self, A: Tensor, C: Tensor, E: Tensor, D: Tensor) -> None:
        """Adds ⟨C_tbᵀ A_b, E_cᵀ D_sc⟩ and its transpose, of uses on both sides of a weight.

        Args:
            A: [B, S, I] or ids [B, S].
            C: [T, B, S, O].
            E: [B, R, O] or ids [B, R].
            D: [T, B, R, I].
        """
        for t in range(self.T):
            for s in [t] if self.per == "task" else range(self.T):
                for b in range(self.B):
                    others = slice(b, b + 1) if self.per == "example" else slice(None)
                    X = _paired(C[t, b], E[others]) * _paired(D[s, others].flatten(0, 1), A[b : b + 1]).mT
                    x = X.view(len(X), -1, E.shape[1]).sum((0, 2), dtype=_F64)
                    if self.per == "example":
                        self._sum[b, t, s] += x[0]
                        self._sum[b, s, t] += x[0]
                    else:
                        M = self._sum[t] if self.per == "task" else self._sum[t, :, s]
                        M[b] += x
                        M = self._sum[t] if self.per == "task" else self._sum[s, :, t]
                        M[:, b] += x


def _are_near(norms: Tensor, squares: bool = False) -> bool:
    """Whether these norms of rows, or their squares, are known to be near 1 in size."""
    if norms.device.type != "cpu" or not norms.numel():  # nothing waits for a GPU
        return False
    # A norm of 0 may be that of a small row.
    least, most = (float(x) for x in norms.aminmax())
    power = 2 if squares else 1
    return _NEAR[0] ** power < least and most < _NEAR[1] ** power


def _paired(C: Tensor, E: Tensor) -> Tensor:
    """Products of the rows of C [N, O] with those of E [b, R, O], or with the unit vectors of ids [b, R]: [N, b·R]."""
    return C[:, E.flatten()] if E.dim() == 2 else C @ E.flatten(0, 1).mT


def through_rows(gram: Gram, C: Tensor, depth: int) -> bool:
    """Whether products of rows take fewer multiply-adds than gradients and their products."""
    T, B, S, width = C.shape
    pairs = B if gram.per == "example" else B * B  # pairs of examples, in both halves
    tasks = T if gram.per == "task" else T * (T + 1) / 2
    rows = pairs * S * S * (depth / 2 + tasks * (width / 2 + _PAIR))
    gradients = T * B * S * width * depth + pairs * (T if gram.per == "task" else T * T) * width * depth / 2
    return rows <= gradients


def _lengths(C: Tensor) -> Tensor:
    """Norms along the last dimension, of any stride; 0 or ∞ beyond the range of squares."""
    return C.square().sum(-1).sqrt_()
