"""MoCo: Mitigating Gradient Bias in Multi-objective Learning (Fernando et al., ICLR 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.methods.memory import GradientMemory, Pieces, move, present
from fastmtl.methods.simplex import Shares
from fastmtl.options import flag, number, option
from fastmtl.rule import Context

__all__ = ["MoCo"]


class MoCo(GradientMemory):
    """MoCo: MGDA's weights, moved a little in every step, on moving averages of the gradients.

        y_t ← y_t - β_k (y_t - g_t L_t / ‖g_t‖)        w ← softmax(w - γ_k (Y Yᵀ + ρ I) w)        g = wᵀ Y

    with β_k = β / k^b and γ_k = γ / k^c in step k. (As in the authors' code, each gradient is scaled to the length of
    its loss; `normalize=False` leaves gradients unscaled, which is the paper's formula.) An absent task keeps its
    average and its weight, and takes no part in the step.

    `info` has `alpha`, the weights of the averages, and `gram`, the Gram matrix of the gradients.

    Source: Fernando, Shen, Liu, Chaudhury, Murugesan, Chen, "Mitigating Gradient Bias in Multi-objective Learning: A
    Provably Convergent Approach", ICLR 2023, Eq. 9 and 11, and LibMTL, which has the authors' code.

    Args:
        beta: β, the step size of the averages.
        beta_decay: b, how fast it falls.
        gamma: γ, the step size of the weights.
        gamma_decay: c, how fast it falls.
        rho: ρ, the weight of ½ ‖w‖².
        normalize: whether to scale gradients to the length of their losses, which are then needed: see `losses=`.

    Raises:
        TypeError: an option of another kind.
        ValueError: `beta` is not in [0, 1], another number is negative; (in a step) gradients whose sizes differ from
            the first step's.
    """

    y: Tensor  # the averages, [T, P] or [B, T, P]
    w: Tensor  # float64 [T] or [B, T]
    steps: Tensor  # int64 []

    beta: float = option(number(low=0, high=1))
    beta_decay: float = option(number(low=0))
    gamma: float = option(number(low=0))
    gamma_decay: float = option(number(low=0))
    rho: float = option(number(low=0))
    normalize: bool = option(flag)

    def __init__(
        self,
        *,
        beta: float = 0.5,
        beta_decay: float = 0.5,
        gamma: float = 0.1,
        gamma_decay: float = 0.5,
        rho: float = 0.0,
        normalize: bool = True,
    ) -> None:
        super().__init__("y", "w", "steps")
        self.beta = beta
        self.beta_decay = beta_decay
        self.gamma = gamma
        self.gamma_decay = gamma_decay
        self.rho = rho
        self.normalize = normalize

    @property
    def needs_losses(self) -> bool:  # type: ignore[override]
        return self.normalize

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return (
            f"beta={self.beta}, beta_decay={self.beta_decay}, gamma={self.gamma}, gamma_decay={self.gamma_decay}, "
            f"rho={self.rho}, normalize={self.normalize}"
        )

    def _aggregate(self, G: Pieces, context: Context) -> Info:
        M = G.gram()
        there, finite = present(M)
        batch, T, device = G.batch, G.T, M.device
        y = self._kept("y", (*batch, T, G.P), G.kept, device)
        w = self._kept("w", (*batch, T), torch.float64, device, 1 / T)
        steps = self._kept("steps", batch, torch.int64, device)
        steps += finite[..., 0]
        k = steps.clamp_min(1).to(torch.float64)[..., None]
        scale: Tensor | float = 1.0 if context.grad_scale is None else context.grad_scale
        factor = torch.ones_like(w) / scale
        if context.losses is not None:
            norms = M.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
            factor = torch.where(there, context.losses.to(device) / norms, 0.0)
        move(y, G, there & finite, (self.beta / k**self.beta_decay).expand_as(w), factor)
        N = ops.gram(y)
        shares = Shares(w, there)
        now = shares.now
        step = (self.gamma / k**self.gamma_decay) * ((N @ now[..., None]).squeeze(-1) + self.rho * now)
        alpha = shares.put_back((now - shares.keep_out(step)).softmax(-1), finite[..., 0])
        G.combine_rows(y, alpha if context.grad_scale is None else alpha * scale)
        return Info.of(alpha, M)
