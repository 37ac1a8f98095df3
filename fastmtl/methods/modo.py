"""MoDo: Three-Way Trade-Off in Multi-Objective Learning (Chen et al., NeurIPS 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.info import Info
from fastmtl.methods.simplex import Shares, to_simplex
from fastmtl.methods.state import StatefulMethod
from fastmtl.options import number, option
from fastmtl.rule import NOTHING, Context

__all__ = ["MoDo"]


class MoDo(StatefulMethod):
    """MoDo: weights that take one projected gradient step on MGDA's problem at a time.

        w ← Π(w - γ (M w + ρ w))        g = wᵀ G        Π onto w >= 0, Σ w = 1

    The authors take M = G₁ G₂ᵀ from two independent batches, an unbiased estimate of the full gradients' Gram matrix,
    and G from a third (or the mean of the two):

        alpha = method.weighting(G1.double() @ G2.double().T)        # need not be symmetric
        (alpha * torch.stack(losses_of_the_third_batch)).sum().backward()

    `backward` and the other calls have one batch: M = G Gᵀ, whose diagonal is too large by the variance of the
    gradients. Not homogeneous: with a loss scaler pass `grad_scale=`.

    The weights w are the state, 1/T at first. An absent task keeps its weight; the others share the rest.

    `info` has `alpha` and `gram`.

    Source: Chen, Fernando, Ying, Chen, "Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization
    and Conflict-Avoidance", NeurIPS 2023, Eq. 6, and the authors' code.

    Args:
        gamma: step size γ of the weights; the default is TorchJD's (LibMTL: 0.001).
        rho: ρ, the weight of ½ ‖w‖², which draws the weights together; 0.1 in both libraries.

    Raises:
        TypeError: an option is not a number.
        ValueError: `gamma` is not positive, `rho` is negative.
    """

    remembers = True
    w: Tensor  # float64 [T] or [B, T]

    gamma: float = option(number(above=0))
    rho: float = option(number(low=0))

    def __init__(self, *, gamma: float = 0.1, rho: float = 0.1) -> None:
        super().__init__("w")
        self.gamma = gamma
        self.rho = rho

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"gamma={self.gamma}, rho={self.rho}"

    def _there(self, M: Tensor) -> Tensor | None:
        """Which tasks are present, None for all. M need not be symmetric, so its diagonal says nothing."""
        return M.any(-1)

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        wide = context.unscaled(M)
        state = self._kept("w", M.shape[:-1], torch.float64, M.device, 1 / M.shape[-1])
        shares = Shares(state, self._there(wide))
        w = shares.now
        if wide.ndim == 2:
            slope = torch.addmv(w, wide, w, beta=self.rho)
        else:
            slope = torch.baddbmm(w[..., None], wide, w[..., None], beta=self.rho)[..., 0]
        w = to_simplex(torch.sub(w, shares.keep_out(slope), alpha=self.gamma))
        return Info.of(shares.put_back(w), M)
