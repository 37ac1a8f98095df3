"""MGDA: Multi-Task Learning as Multi-Objective Optimization (Sener and Koltun, NeurIPS 2018; Désidéri 2012)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl._options import choice, option
from fastmtl.info import Info
from fastmtl.weighting._context import NOTHING, Context
from fastmtl.weighting._method import GramMethod

__all__ = ["MGDA"]


class MGDA(GramMethod):
    """MGDA: the shortest vector in the convex hull of the task gradients.

        α = argmin ‖αᵀ G‖²    over    α >= 0, Σ α = 1        g = αᵀ G

    It is a descent direction for every task, or zero at a Pareto-stationary point. Solved exactly on the Gram matrix,
    by active sets in float64, not by Frank-Wolfe steps. With `fan_out` or `representation=` this is MGDA-UB.

    `info` has `alpha`, `gram` and `residual` (the largest violation of the optimality conditions, relative to gradients
    of unit length).

    Args:
        normalization: what each gradient is divided by before α is computed (as in the authors' code the combination is
            of the gradients as they are): "none"; "l2", its norm; "loss", its task's loss; or "loss+", both. With
            "loss" and "loss+" the losses are needed: see `losses=`, and `FanOut.total`. A loss of zero makes its
            gradient infinitely long, so that its task gets no weight.

    Raises:
        ValueError: unknown `normalization`.
    """

    normalization: str = option(choice("none", "l2", "loss", "loss+"))

    def __init__(self, *, normalization: str = "none") -> None:
        self.normalization = normalization

    @property
    def _needs_losses(self) -> bool:  # type: ignore[override]
        return self.normalization in ("loss", "loss+")

    def __repr__(self) -> str:
        return f"MGDA(normalization={self.normalization!r})"

    def _weigh(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        alpha, residual = ops.mgda(M if self.normalization == "none" else self._normalized(M, context))
        return Info.of(alpha, M, residual=residual)

    def _normalized(self, M: Tensor, context: Context) -> Tensor:
        divisor = torch.ones((), dtype=torch.float64, device=M.device)
        if context.losses is not None:
            divisor = context.losses.to(M.device)
        if self.normalization != "loss":
            divisor = divisor * M.diagonal(dim1=-2, dim2=-1).clamp_min(0).to(torch.float64).sqrt()
        # A zero gradient stays one. A loss that is not finite is no task that is absent.
        inverse = torch.where(divisor == 0, 0.0, torch.where(divisor.isfinite(), 1 / divisor, torch.nan))
        return M * inverse[..., :, None] * inverse[..., None, :]
