"""Bloop: Careful with that Scalpel: Improving Gradient Surgery with an EMA (Hsieh et al., ICML 2024)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastmtl.info import Info
from fastmtl.methods.memory import GradientMemory, Pieces, present
from fastmtl.options import number, option
from fastmtl.rule import Context

__all__ = ["Bloop"]


class Bloop(GradientMemory):
    """Bloop: the first task's gradient, and of the others' what is orthogonal to its moving average.

        g = g_0 + λ (a - (<a, m> / ‖m‖²) m)        a = Σ_{t > 0} g_t        m ← (1 - ρ) m + ρ g_0

    The first task is the one that counts; the others (auxiliary losses) are minimized where that costs it nothing. m is
    the average before this step, in the first step g_0 itself. Where the first task is absent, m stays as it was.

    `info` has `gram`; `alpha` is 1 for the first task and λ for the others, whose gradients are projected.

    Source: Hsieh, Thornton, Ndiaye, Klein, Cuturi, Ablin, "Careful with that Scalpel: Improving Gradient Surgery with
        an
    EMA", ICML 2024, Algorithm 1.

    Args:
        lam: λ, the weight of the auxiliary direction.
        rho: ρ, how much a new gradient counts in the average; the authors' default is 0.01.

    Raises:
        TypeError: an option is no number.
        ValueError: `lam` is negative, `rho` is not in [0, 1]; (in a step) gradients of other sizes than in the first
            one.
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
        M = G.gram()
        there, finite = present(M)
        mean = self._kept("mean", (*G.batch, G.P), G.kept, M.device)
        steps = self._kept("steps", G.batch, torch.int64, M.device)
        scale: Tensor | float = 1.0 if context.grad_scale is None else context.grad_scale
        others = self.lam * there.to(torch.float64)
        others[..., 0] = 0
        auxiliary = mean.new_zeros(mean.shape)
        main = mean.new_zeros(mean.shape)
        for t, start, stop, g in G:
            if g is not None:
                target = main if t == 0 else auxiliary
                target[..., start:stop] += (g / scale).to(mean.dtype)
        first, counted = steps == 0, there[..., 0] & finite[..., 0]
        along = torch.where(first[..., None], main, mean)
        product = (auxiliary.double() * along).sum(-1, keepdim=True)
        squared = along.double().square().sum(-1, keepdim=True)
        part = torch.where(squared > 0, product / squared, 0.0).to(mean.dtype)
        result = (main + self.lam * (auxiliary - part * along)) * scale
        G.write(torch.where(finite, result, torch.nan))  # all of it, where one is not
        moved = torch.where(first[..., None], main, torch.lerp(mean, main, self.rho))
        mean.copy_(torch.where(counted[..., None], moved, mean))
        steps += counted
        alpha = torch.where(there, others, 0.0)
        alpha[..., 0] = there[..., 0].to(torch.float64)
        alpha = torch.where(finite, alpha, torch.nan)
        return Info.of(alpha, M)
