"""GradVac: Gradient Vaccine (Wang et al., ICLR 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops, options
from fastmtl.info import Info
from fastmtl.methods.state import StatefulMethod
from fastmtl.options import number, option
from fastmtl.rule import NOTHING, Context, draw_seed

__all__ = ["GradVac"]


class GradVac(StatefulMethod):
    """GradVac: turns pairs of gradients towards each other, up to the usual cosine of the pair.

    For each task i and the other tasks j in random order: if cos(g_i, g_j) is below its target φ_ij, a multiple of
    g_j is added to g_i to raise it to φ_ij; then φ_ij ← (1-β) φ_ij + β cos(g_i, g_j) (Algorithm 1 of the paper). The
    result is the sum of the g_i. All of it is done on task weights, with the Gram matrix.

    The state is the targets φ [T, T]. There is one set for the whole model, or with `groups=` one for each group of
    parameters (layer-wise targets, the paper's all_layer).

    `info` has `alpha` and `gram`.

    Args:
        beta: weight β of the new cosine.
        generator: source of randomness, on the gradients' device; default: torch's global one.

    Raises:
        TypeError: an option of another kind.
        ValueError: `beta` is not in [0, 1].
    """

    remembers = True
    targets: Tensor  # φ, float64 [T, T] or [B, T, T]

    beta: float = option(number(low=0, high=1))
    generator: torch.Generator | None = option(options.generator)

    def __init__(self, *, beta: float = 0.5, generator: torch.Generator | None = None) -> None:
        super().__init__("targets")
        self.beta = beta
        self.generator = generator

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"beta={self.beta}"

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        wide = M.to(torch.float64)
        targets = self._kept("targets", M.shape, torch.float64, M.device)
        alpha = ops.gradvac(wide, draw_seed(wide, self.generator, context), self.beta, targets)
        return Info.of(alpha, M)
