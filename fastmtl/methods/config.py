"""ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks (Liu et al., 2024)."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.inputs import EPS
from fastmtl.methods.base import GramMethod
from fastmtl.methods.weighted import Weighted
from fastmtl.ops.reference.present import is_present
from fastmtl.options import Weights, choice, number, option, show_weights
from fastmtl.rule import NOTHING, Context

__all__ = ["ConFIG", "Length"]

Length: TypeAlias = Literal["projection", "min", "max", "harmonic", "arithmetic", "geometric"]


class ConFIG(Weighted, GramMethod):
    """ConFIG: the direction with given cosines to all task gradients; its length is the sum of their projections.

        u = U⁺ w / ‖U⁺ w‖        g = (Σ_t <g_t, u>) u        U the gradients at unit length

    (Eq. 2 of the paper.) On the Gram matrix: U⁺ w = Uᵀ C⁺ w with C = U Uᵀ. Zero gradients take no part. If U⁺ w is
    zero, as for opposed gradients with equal weights, no direction has such cosines, and g is zero (α = 0).

    `info` has `alpha` and `gram`.

    Args:
        weights: the ratio of the cosines: None, "mean" or "sum" for equal ones, or T numbers.
        length: the length of g. "projection" is the paper's. The others give all gradients the same norm before they
            are projected: the smallest ("min"), the largest ("max"), or the harmonic, arithmetic or geometric mean of
            the norms (the authors' `TrackMinimum` and so on). "min" and "harmonic" keep g short despite a large
            gradient.
        rtol: singular values of U at most `rtol` times the largest are treated as zero. Default T · eps with eps of the
            gradients' dtype.

    Raises:
        ValueError: weights that are not one-dimensional or not finite, an unknown `length`, a negative or non-finite
            `rtol`.
        TypeError: an option of another kind.
    """

    length: Length = option(choice(*get_args(Length)))
    rtol: float | None = option(number(low=0, optional=True))

    def __init__(self, *, weights: Weights = None, length: Length = "projection", rtol: float | None = None) -> None:
        super().__init__(weights)
        self.length = length
        self.rtol = rtol

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"weights={show_weights(self.weights)}, length={self.length!r}, rtol={self.rtol}"

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        T = M.shape[-1]
        w = self._task_weights(T, M)
        if w is not None:  # only their ratio counts: scaled by a power of two, so that squares stay in range
            w = torch.ldexp(w, -torch.frexp(w.abs().amax()).exponent)
        # Gᵀv = U⁺ w; its products with the unit gradients are `cosines`.
        v, cosines = ops.unit_solve(M, w, T * EPS[dtype] if self.rtol is None else self.rtol)
        norms = M.diagonal(dim1=-2, dim2=-1).clamp_min(0).to(torch.float64).sqrt()
        products = cosines * norms
        squared = (v * products).sum(-1, keepdim=True)
        if self.length == "projection":
            length = products.sum(-1, keepdim=True)
        else:
            length = _tracked(norms, is_present(M), self.length) * cosines.sum(-1, keepdim=True)
        return Info.of(torch.where(squared == 0, 0.0, length / squared) * v, M)


def _tracked(norms: Tensor, there: Tensor, length: Length) -> Tensor:
    """The common norm [..., 1] that replaces the norms [..., T] of the present gradients."""
    n = there.sum(-1, keepdim=True).clamp_min(1)
    if length == "min":
        return torch.where(there, norms, torch.inf).amin(-1, keepdim=True)
    if length == "max":
        return norms.amax(-1, keepdim=True)
    if length == "harmonic":
        return n / torch.where(there, 1 / norms, 0.0).sum(-1, keepdim=True)
    if length == "arithmetic":
        return norms.sum(-1, keepdim=True) / n
    return (torch.where(there, norms.log(), 0.0).sum(-1, keepdim=True) / n).exp()
