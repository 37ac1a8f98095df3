"""SDMGrad: Direction-oriented Multi-objective Learning (Xiao et al., NeurIPS 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.info import Info
from fastmtl.methods.simplex import Shares, to_simplex
from fastmtl.methods.state import StatefulMethod
from fastmtl.methods.weighted import Weighted
from fastmtl.options import Weights, integer, number, option, show_weights
from fastmtl.rule import NOTHING, Context

__all__ = ["SDMGrad"]


class SDMGrad(Weighted, StatefulMethod):
    """SDMGrad: MGDA drawn towards a preferred direction, solved by a few warm-started steps.

        min_w ½ wᵀ M w + λ wᵀ M w̃    over    w >= 0, Σ w = 1        α = (w + λ w̃) / (1 + λ)

    by `iterations` steps of gradient descent with momentum and projection, on M / s² with s the mean of sqrt(M_tt).

    The authors take M = G₁ G₂ᵀ from two independent batches, an unbiased estimate of the full gradients' Gram matrix,
    and the direction from a third:

        alpha = method.weighting(G1.double() @ G2.double().T)        # need not be symmetric
        (alpha * torch.stack(losses_of_the_third_batch)).sum().backward()

    `backward` and the other calls have one batch, and M = G Gᵀ.

    The weights w are the state, 1/T at first. An absent task keeps its weight; the others share the rest.

    `info` has `alpha` and `gram`.

    Source: Xiao, Ban, Ji, "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms",
    NeurIPS 2023, Algorithm 1, and the authors' code.

    Args:
        lam: λ, how much the preferred direction counts; 0.3 in the authors' experiments. 0 is MGDA's problem.
        weights: the preferred direction w̃: None or "mean" for 1/T each, "sum" for ones, or T numbers.
        lr: step size of the weights; 10 in the authors' code (LibMTL: 5).
        momentum: momentum of the steps; every call starts from zero.
        iterations: how many steps a call makes.

    Raises:
        TypeError: an option of another kind.
        ValueError: `lam` is negative, `lr` is not positive, `momentum` is not in [0, 1], `iterations` is less than 1,
            weights that are not one-dimensional or not finite.
    """

    remembers = True
    w: Tensor  # float64 [T] or [B, T]

    lam: float = option(number(low=0))
    lr: float = option(number(above=0))
    momentum: float = option(number(low=0, below=1))
    iterations: int = option(integer(1))

    def __init__(
        self,
        *,
        lam: float = 0.3,
        weights: Weights = None,
        lr: float = 10.0,
        momentum: float = 0.5,
        iterations: int = 20,
    ) -> None:
        super().__init__(weights, "w")
        self.lam = lam
        self.lr = lr
        self.momentum = momentum
        self.iterations = iterations

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return (
            f"lam={self.lam}, weights={show_weights(self.weights)}, lr={self.lr}, momentum={self.momentum}, "
            f"iterations={self.iterations}"
        )

    def _there(self, M: Tensor) -> Tensor | None:
        """Which tasks are present, None for all. M need not be symmetric, so its diagonal says nothing."""
        return M.any(-1)

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        wide = M.to(torch.float64)
        state = self._kept("w", M.shape[:-1], torch.float64, M.device, 1 / M.shape[-1])
        T, there = M.shape[-1], self._there(wide)
        norms = wide.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        scale = norms.sum(-1) / (T if there is None else there.sum(-1).clamp_min(1))
        A = torch.where(scale > 0, 1 / scale, 0.0)[..., None, None]
        A = wide * A * A
        weights = self._task_weights(T, M)
        some = torch.ones_like(norms) if there is None else there.to(torch.float64)
        preferred = some / T if weights is None else some * weights
        shares = Shares(state, there)
        w = shares.now
        pull = shares.keep_out(self.lam * (A @ preferred[..., None]).squeeze(-1))[..., None]
        velocity = torch.zeros_like(pull)
        for _ in range(self.iterations):
            slope = torch.addmm(pull, A, w[:, None]) if A.ndim == 2 else torch.baddbmm(pull, A, w[..., None])
            velocity = slope.add_(velocity, alpha=self.momentum)
            w = to_simplex(torch.sub(w, velocity[..., 0], alpha=self.lr))
        w = shares.put_back(w)
        return Info.of((w + self.lam * preferred) / (1 + self.lam), M)
