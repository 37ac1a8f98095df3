"""IMTL-G: Towards Impartial Multi-task Learning (Liu et al., ICLR 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.inputs import EPS
from fastmtl.methods.base import GramMethod
from fastmtl.ops.reference.present import is_present
from fastmtl.options import number, option
from fastmtl.rule import NOTHING, Context

__all__ = ["IMTL"]


class IMTL(GramMethod):
    """IMTL-G: the combination whose projections onto all task gradients are equal.

        <g, g_t> / ‖g_t‖ equal for all t        g = αᵀ G,  Σ α = 1        so  M α ∝ (‖g_1‖, …, ‖g_T‖)

    For linearly dependent gradients the α with the smallest ‖D^½ α‖ is taken (a pseudo-inverse; D the squared norms).
    α may be negative. If Σ α would be negative, the paper's formula reverses the direction, and if it would be zero
    there is none; the same happens here. Zero gradients take no part.

    `info` has `alpha`, `gram` and `residual`: how far the projections are from equal, relative to their size. If no α
    with Σ α = 1 exists (for opposed gradients, for example), the residual is infinite and α = 0.

    With IMTL-L (learned loss scales): `method.backward(imtl_l.scaled(losses))`, where
    `imtl_l = fastmtl.scalarization.IMTLL(T)`.

    Args:
        rtol: singular values of the unit gradients at most `rtol` times the largest are treated as zero. Default
            T · eps with eps of the gradients' dtype.

    Raises:
        TypeError: `rtol` is not a number.
        ValueError: a negative or non-finite `rtol`.
    """

    rtol: float | None = option(number(low=0, optional=True))

    def __init__(self, *, rtol: float | None = None) -> None:
        super().__init__()
        self.rtol = rtol

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"rtol={self.rtol}"

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        T = M.shape[-1]
        v, projections = ops.unit_solve(M, None, T * EPS[dtype] if self.rtol is None else self.rtol)
        there = is_present(M)
        residual = (projections - there.to(torch.float64)).abs().amax(-1)
        total = v.sum(-1, keepdim=True)
        # Relative to its parts: a sum that cancels to rounding is zero.
        none = total.abs() <= 4 * T * EPS[torch.float64] * v.abs().sum(-1, keepdim=True)
        alpha = torch.where(none, 0.0, v / total)
        residual = torch.where(none[..., 0] & there.any(-1), torch.inf, residual)
        return Info.of(alpha, M, residual=residual)
