"""Bloop: Careful with that Scalpel: Improving Gradient Surgery with an EMA (Hsieh et al., ICML 2024)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.methods.memory import GradientMemory, Pieces, move, present
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
    an EMA", ICML 2024, Algorithm 1.

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
        shares = self.lam * there.to(torch.float64)
        shares[..., 0] = 0
        first, counted = (steps == 0)[..., None], there[..., :1] & finite
        products, squared = self._products(G, mean, shares)
        # In the first step m is g_0, which M has the products with.
        square, own = M[..., :1, 0], (shares * M[..., 0]).sum(-1, keepdim=True)
        own = torch.where(square > 0, own / square, 0.0)
        part = torch.where((squared > 0) & ~first, products / squared, 0.0)
        alpha = shares.clone()
        alpha[..., :1] = torch.where(there[..., :1], 1 - torch.where(first, own, 0.0), 0.0)
        self._write(G, torch.where(finite, alpha, torch.nan), mean, torch.where(finite, part, 0.0).to(mean.dtype))
        step = torch.where(first, 1.0, self.rho)
        move(mean[..., None, :], G.first(), counted, step, torch.ones_like(step) / scale)
        steps += counted[..., 0]
        shares[..., 0] = there[..., 0].to(torch.float64)
        return Info.of(torch.where(finite, shares, torch.nan), M)

    def _write(self, G: Pieces, alpha: Tensor, mean: Tensor, part: Tensor) -> None:
        """Writes αᵀ G - part m."""
        if all(target.dtype is mean.dtype for target in G.out):
            G.combine(alpha)
            for (start, stop), target in zip(G.spans, G.out, strict=True):
                target.addcmul_(mean[..., start:stop].view(target.shape), part, value=-1)
            return
        flat = mean * -part  # results of 16 bits are rounded once
        for t, start, stop, g in G:
            if g is not None:
                flat[..., start:stop] += (g.to(flat.dtype) * alpha[..., t, None].to(flat.dtype)).sum(-2)
        G.write(flat)

    def _products(self, G: Pieces, mean: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """<Σ_t shares_t g_t, m> and ‖m‖², float64 [..., 1]."""
        products = torch.zeros_like(shares)
        for t, start, stop, g in G:
            if g is not None:
                products[..., t] += (g.to(torch.float64) * mean[..., None, start:stop]).sum(-1)
        squared = ops.gram(mean[..., None, :])[..., 0]
        return (shares * products).sum(-1, keepdim=True), squared
