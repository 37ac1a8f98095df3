"""The Gram matrix of gradients of unit length, and its pseudo-inverse."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmtl import ops

__all__ = ["Unit", "unit_gram"]

_EPS64 = torch.finfo(torch.float64).eps


class Unit(NamedTuple):
    """A Gram matrix M = D^½ C D^½ taken apart.

    Attributes:
        C: of the gradients at unit length, zeros where a gradient is zero, [..., T, T].
        inverse_norms: 1/‖g_t‖, zero where a gradient is zero, [..., T].
    """

    C: Tensor
    inverse_norms: Tensor

    def solve(self, right: Tensor, rtol: float) -> Tensor:
        """C⁺ right, [..., T]: singular values of the unit gradients at most `rtol` times the largest count as zero."""
        eigenvalues, V = ops.eigh(self.C)
        T = self.C.shape[-1]
        cut = eigenvalues[..., -1:] * max(rtol**2, 4 * T * _EPS64)  # less is the rounding of C itself
        inverse = torch.where(eigenvalues > cut, 1 / eigenvalues, 0.0)
        along = (right[..., None, :] @ V).squeeze(-2)
        x = (V @ (inverse * along)[..., None]).squeeze(-1)
        return x + 0 * eigenvalues.sum(-1, keepdim=True)  # NaN where C is


def unit_gram(M: Tensor) -> Unit:
    """M [..., T, T] as `Unit`, float64."""
    M = M.to(torch.float64)
    norms = M.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    inverse = torch.where(norms == 0, 0.0, 1 / norms)
    return Unit(M * inverse[..., :, None] * inverse[..., None, :], inverse)
