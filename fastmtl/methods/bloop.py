"""Bloop: Careful with that Scalpel: Improving Gradient Surgery with an EMA (Hsieh et al., ICML 2024)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastmtl.info import Info
from fastmtl.methods.memory import GradientMemory, Pieces, move, present
from fastmtl.options import number, option
from fastmtl.rule import Context

__all__ = ["Bloop"]


class Bloop(GradientMemory):
    """Bloop: the first task's gradient, plus the part of the others' that is orthogonal to its moving average.

        g = g_0 + λ (a - (<a, m> / ‖m‖²) m)        a = Σ_{t > 0} g_t        m ← (1 - ρ) m + ρ g_0

    The first task has priority; the others (auxiliary losses) are minimized where that costs it nothing. m is the
    average before this step, or g_0 itself in the first step. If the first task is absent, m stays as it was.

    `info` has `gram`; `alpha` is 1 for the first task, and λ for the others' projected gradients.

    Source: Hsieh, Thornton, Ndiaye, Klein, Cuturi, Ablin, "Careful with that Scalpel: Improving Gradient Surgery with
    an EMA", ICML 2024, Algorithm 1.

    Args:
        lam: λ, the weight of the auxiliary direction.
        rho: ρ, how much a new gradient counts in the average; the authors' default is 0.01.

    Raises:
        TypeError: an option is not a number.
        ValueError: `lam` is negative, `rho` is not in [0, 1]; (in a step) gradients whose sizes differ from the first
            step's.
    """

    memory: ClassVar[str] = "P"
    mean: Tensor  # m, [P] or [B, P]
    steps: Tensor  # how many gradients it has, int64 []

    lam: float = option(number(low=0))
    rho: float = option(number(low=0, high=1))

    def __init__(self, *, lam: float = 1.0, rho: float = 0.01) -> None:
        super().__init__("mean", "steps")
        self.lam = lam
        self.rho = rho

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"lam={self.lam}, rho={self.rho}"

    def _aggregate(self, G: Pieces, context: Context) -> Info:
        mean = self._kept("mean", (*G.batch, G.P), G.kept, G.out[0].device)
        steps = self._kept("steps", G.batch, torch.int64, mean.device)
        M, products, square = G.gram_with(mean)
        there, finite = present(M)
        scale: Tensor | float = 1.0 if context.grad_scale is None else context.grad_scale
        shares = self.lam * there.to(torch.float64)
        shares[..., 0].zero_()  # assigning a number would copy it from the host
        first, counted = (steps == 0)[..., None], there[..., :1] & finite
        # In the first step m is g_0, whose products are in M.
        products, square = torch.where(first, M[..., 0], products), torch.where(first, M[..., :1, 0], square)
        part = torch.where(square > 0, (shares * products).sum(-1, keepdim=True) / square, 0.0)
        alpha = shares.clone()
        alpha[..., :1] = torch.where(there[..., :1], 1 - torch.where(first, part, 0.0), 0.0)
        part = torch.where(finite & ~first, part, 0.0)
        G.combine_with(mean, torch.where(finite, alpha, torch.nan), -part)
        step = torch.where(first, 1.0, self.rho)
        move(mean[..., None, :], G.first(), counted, step, torch.ones_like(step) / scale)
        steps += counted[..., 0]
        shares[..., 0] = there[..., 0].to(torch.float64)
        return Info.of(torch.where(finite, shares, torch.nan), M)
