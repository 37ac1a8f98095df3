"""ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks (Liu et al., 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.inputs import EPS
from fastmtl.methods.base import GramMethod
from fastmtl.methods.weighted import Weighted
from fastmtl.options import Weights, number, option, show_weights
from fastmtl.rule import NOTHING, Context

__all__ = ["ConFIG"]


class ConFIG(Weighted, GramMethod):
    """ConFIG: a direction with given cosines to all task gradients, as long as their projections onto it together.

        u = U⁺ w / ‖U⁺ w‖        g = (Σ_t <g_t, u>) u        U the gradients at unit length

    (Eq. 2 of the paper.) On the Gram matrix: U⁺ w = Uᵀ C⁺ w with C = U Uᵀ. Zero gradients take no part. Where U⁺ w is
    zero, as for opposed gradients with equal weights, no direction has such cosines, and g is zero (α = 0).

    `info` has `alpha` and `gram`.

    Args:
        weights: the ratio of the cosines: None, "mean" or "sum" for equal ones, or T numbers.
        rtol: singular values of U at most `rtol` times the largest are treated as zero. Default T · eps with eps of the
            gradients' dtype.

    Raises:
        ValueError: weights that are not one-dimensional or not finite, a negative or non-finite `rtol`.
        TypeError: an option of another kind.
    """

    rtol: float | None = option(number(low=0, optional=True))

    def __init__(self, *, weights: Weights = None, rtol: float | None = None) -> None:
        super().__init__(weights)
        self.rtol = rtol

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"weights={show_weights(self.weights)}, rtol={self.rtol}"

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        T = M.shape[-1]
        w = self._task_weights(T, M)
        if w is not None:  # only their ratio counts: by a power of two, so that no square leaves the range of numbers
            w = torch.ldexp(w, -torch.frexp(w.abs().amax()).exponent)
        # Gᵀv = U⁺ w, whose products with the unit gradients are `cosines`.
        v, cosines = ops.unit_solve(M, w, T * EPS[dtype] if self.rtol is None else self.rtol)
        products = cosines * M.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        squared = (v * products).sum(-1, keepdim=True)
        length = products.sum(-1, keepdim=True)
        return Info.of(torch.where(squared == 0, 0.0, length / squared) * v, M)
