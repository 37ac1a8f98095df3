"""RLW: Reasonable Effectiveness of Random Weighting (Lin et al., TMLR 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl import ops, options
from fastmtl.info import Info
from fastmtl.methods.base import GramMethod
from fastmtl.options import option
from fastmtl.rule import NOTHING, Context

__all__ = ["RLW"]


class RLW(GramMethod):
    """RLW on gradients (the authors' RGW): task weights drawn anew in every step.

        α = softmax(z),  z ~ N(0, 1)        g = αᵀ G

    The same draw on the losses needs a single backward pass: `fastmtl.scalarization.RLW`.

    `info` has `alpha` and `gram`.

    Args:
        generator: source of randomness, on the gradients' device; default: torch's global one.

    Raises:
        TypeError: `generator` of another kind.
    """

    generator: torch.Generator | None = option(options.generator)

    def __init__(self, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = generator

    def draw(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Task weights [..., T], independent of the gradients."""
        return torch.randn(shape, dtype=dtype, device=device, generator=self.generator).softmax(-1)

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        alpha = self.draw(M.shape[:-1], torch.float64, M.device)
        if context.agree is not None:
            alpha = context.agree(alpha)
        return Info.of(ops.constant(M, alpha), M)
