"""FairGrad: Fair Resource Allocation in Multi-Task Learning (Ban and Ji, ICML 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.methods.base import GramMethod
from fastmtl.options import number, option
from fastmtl.rule import NOTHING, Context

__all__ = ["FairGrad"]


class FairGrad(GramMethod):
    """FairGrad: α-fair shares of the improvement.

        M α = α^(-1/fairness)    (elementwise, α > 0; their Eq. 4)        M the Gram matrix

    Fairness 0 is the plain mean, 1 is Nash-MTL's proportional fairness, and the limit at infinity is max-min fairness:
    the smallest improvement is largest. If zero lies in the convex hull of the gradients, there is no such α: then
    α = 0, and `info.converged` is false. Otherwise there is exactly one, found by damped Newton steps, to rounding.

    Not homogeneous (the result's norm grows with a power of the gradients'): with a loss scaler pass `grad_scale=`.

    `info` has `alpha`, `gram` and `residual`: max |α_t (Mα)_t^fairness - 1| in a scale-free form.

    Args:
        fairness: the exponent, called α in the paper. The authors' default is 1; their experiments use 2 and more.

    Raises:
        TypeError: `fairness` is not a number.
        ValueError: `fairness` is negative or not finite.
    """

    fairness: float = option(number(low=0))

    def __init__(self, *, fairness: float = 1.0) -> None:
        super().__init__()
        self.fairness = fairness

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"fairness={self.fairness}"

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        if self.fairness == 0:
            return Info.of(ops.constant(M, None), M)
        alpha, residual = ops.nash(context.unscaled(M), 1 / self.fairness)
        return Info.of(alpha, M, residual=residual)
