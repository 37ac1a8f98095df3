"""DB-MTL: Dual-Balancing for Multi-Task Learning (Lin et al., 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.methods.memory import GradientMemory, Pieces, move, present
from fastmtl.options import flag, number, option
from fastmtl.rule import Context

__all__ = ["DBMTL"]


class DBMTL(GradientMemory):
    """DB-MTL: averaged gradients of the losses' logarithms, each scaled to the length of the longest.

        y_t ← β_k y_t + (1 - β_k) ∇ log L_t        g = Σ_t (max_i ‖y_i‖ / ‖y_t‖) y_t        β_k = β / k^b in step k

    ∇ log L_t is the gradient divided by the loss. Heads get the gradients of the losses as passed: to train
    them on log L_t too, as the authors do, pass logarithms and `log=False`. An absent task keeps its average, and takes
    no part in the step.

    `info` has `alpha`, the weights of the averages, and `gram`, the Gram matrix of the gradients.

    Source: Lin, Jiang, Ye, Zhang, Chen, Chen, Liu, Kwok, "Dual-Balancing for Multi-Task Learning", 2023, Algorithm 1,
    and their LibMTL.

    Args:
        beta: β, the share of the average that is kept; the default is LibMTL's (the authors try 0.1 to 0.9).
        beta_decay: b, how fast it falls.
        log: False if the losses are already logarithms, or to use the gradients unscaled.

    Raises:
        TypeError: an option of another kind.
        ValueError: `beta` is not in [0, 1], `beta_decay` is negative; (in a step) gradients whose sizes differ from the
            first step's.
    """

    y: Tensor  # the averages, [T, P] or [B, T, P]
    steps: Tensor  # int64 []

    beta: float = option(number(low=0, high=1))
    beta_decay: float = option(number(low=0))
    log: bool = option(flag)

    def __init__(self, *, beta: float = 0.9, beta_decay: float = 0.0, log: bool = True) -> None:
        super().__init__("y", "steps")
        self.beta = beta
        self.beta_decay = beta_decay
        self.log = log

    @property
    def needs_losses(self) -> bool:  # type: ignore[override]
        return self.log

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"beta={self.beta}, beta_decay={self.beta_decay}, log={self.log}"

    def _aggregate(self, G: Pieces, context: Context) -> Info:
        M = G.gram()
        there, finite = present(M)
        batch, T, device = G.batch, G.T, M.device
        y = self._kept("y", (*batch, T, G.P), G.kept, device)
        steps = self._kept("steps", batch, torch.int64, device)
        steps += finite[..., 0]
        k = steps.clamp_min(1).to(torch.float64)[..., None]
        scale: Tensor | float = 1.0 if context.grad_scale is None else context.grad_scale
        factor = torch.ones(M.shape[:-1], dtype=torch.float64, device=device) / scale
        if context.losses is not None:
            factor = factor / context.losses.to(device)
        move(y, G, there & finite, (1 - self.beta / k**self.beta_decay).expand_as(factor), factor)
        norms = ops.gram(y).diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        here = there & (norms > 0)
        longest = torch.where(here, norms, 0.0).amax(-1, keepdim=True)
        alpha = torch.where(here, longest / norms, 0.0)
        alpha = torch.where(finite, alpha, torch.nan)
        G.combine_rows(y, alpha if context.grad_scale is None else alpha * scale)
        return Info.of(alpha, M)
