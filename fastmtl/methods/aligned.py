"""Aligned-MTL: Independent Component Alignment for Multi-Task Learning (Senushkin et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastmtl import ops
from fastmtl.info import Info, tolerances
from fastmtl.inputs import Rows, checked_out
from fastmtl.losses import Losses
from fastmtl.methods.base import GradScale, GramMethod
from fastmtl.methods.weighted import Weighted
from fastmtl.options import Weights, choice, number, option, show_weights
from fastmtl.rule import NOTHING, Context

__all__ = ["AlignedMTL"]

Scale: TypeAlias = Literal["min", "median", "rmse"]
RankRule: TypeAlias = Literal["normalized", "gram"]
_HAS_KERNELS = ops.EXTENSIONS["_C"] is not None


class AlignedMTL(Weighted, GramMethod):
    """Aligned-MTL (paper, Algorithm 1): aligns the principal components of the task gradients and sums them.

    The gradient matrix G [T, P] is replaced by the nearest one with condition number 1 (Eq. 4 and 5), scaled by s, and
    its rows are summed with the task weights w:

        λ, V = eigh(G Gᵀ)        α = sqrt(s) · V_R diag(λ_R^-1/2) V_Rᵀ w        g = αᵀ G

    An instance holds only these options (and a copy of the weights for each device used), so threads and models can
    safely share it.

    Args:
        weights: task weights w: None or "mean" for 1/T each (the paper's), "sum" for ones (the public code's), or T
            numbers (a tensor [T], an array or a sequence).
        scale: s, from the kept eigenvalues: "min" (the paper's; the step has the size of the smallest kept singular
            value), "median" (the lower median) or "rmse" (the mean).
        rtol: singular values of the (row-normalised) gradient matrix at most `rtol` times the largest are treated as
            zero. Default sqrt(T · eps) with eps of the gradients' dtype for float32 and float64, max(sqrt(T · eps32),
            eps(dtype)) for bfloat16 and float16.
        rank_rule: what `rtol` is applied to: "normalized", the Gram of the gradients scaled to unit norm, so that a
            large task does not make the others look dependent; or "gram", the Gram itself, as in the public codes.

    Raises:
        ValueError: unknown `scale` or `rank_rule`, a negative or non-finite `rtol`, weights that are not
            one-dimensional or not finite. (For every method, setting the attribute later raises the same errors.)
        TypeError: an option of another kind.
    """

    scale: Scale = option(choice(*get_args(Scale)))
    rtol: float | None = option(number(low=0, optional=True))
    rank_rule: RankRule = option(choice(*get_args(RankRule)))

    def __init__(
        self,
        *,
        weights: Weights = None,
        scale: Scale = "min",
        rtol: float | None = None,
        rank_rule: RankRule = "normalized",
    ) -> None:
        super().__init__(weights)
        self.scale = scale
        self.rtol = rtol
        self.rank_rule = rank_rule

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return (
            f"weights={show_weights(self.weights)}, scale={self.scale!r}, rtol={self.rtol!r}, "
            f"rank_rule={self.rank_rule!r}"
        )

    @overload
    def __call__(
        self,
        gradients: Tensor,
        out: Tensor | None = None,
        *,
        losses: Losses | None = None,
        grad_scale: GradScale = None,
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        gradients: Rows,
        out: Sequence[Tensor | None] | None = None,
        *,
        losses: Losses | None = None,
        grad_scale: GradScale = None,
    ) -> list[Tensor | None]: ...
    def __call__(
        self, gradients: Any, out: Any = None, *, losses: Losses | None = None, grad_scale: GradScale = None
    ) -> Any:
        """The aligned gradient αᵀ G: see `Method.__call__`."""
        if grad_scale is not None or losses is not None or not isinstance(gradients, Tensor):
            return super().__call__(gradients, out, losses=losses, grad_scale=grad_scale)
        G = gradients
        if (
            not isinstance(out, Tensor)
            or out.requires_grad
            or not out.is_cpu
            or not out.is_contiguous()
            or G.requires_grad
            or forward_ad._current_level >= 0
            or not _HAS_KERNELS
        ):
            out = checked_out(G, out)
        # The kernel solves a small problem in a microsecond or two, and our checks would take as long. Its own checks
        # replace them here; ours only word the error.
        try:
            self.aggregate_matrix(G, out, NOTHING)
        except Exception:
            checked_out(G, out)
            raise
        return out

    def aggregate_matrix(self, G: Tensor, out: Tensor, context: Context) -> None:
        ops.align(G, *self._policy(G.shape[-2], G.dtype, G), out)

    def aggregate_list(
        self, grads: Sequence[Tensor | None], T: int, dtype: torch.dtype, out: list[Tensor], context: Context
    ) -> Info:
        gram, alpha, rank = ops.align_rows(grads, T, *self._policy(T, dtype, out[0]), out)
        return Info.of(alpha, gram, rank=rank, spectrum=True)

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        alpha, rank = ops.align_gram(M, *self._policy(M.shape[-1], dtype, M))
        return Info.of(alpha, M, rank=rank, spectrum=True)

    def _policy(self, T: int, dtype: torch.dtype, like: Tensor) -> tuple[Tensor | None, str, float, float, str]:
        """The numerical decisions as the ops take them."""
        weights = self._task_weights(T, like)
        default, zero = tolerances(T, dtype)
        return weights, self.scale, default if self.rtol is None else self.rtol, zero, self.rank_rule
