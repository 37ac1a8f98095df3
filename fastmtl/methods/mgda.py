"""MGDA: Multi-Task Learning as Multi-Objective Optimization (Sener and Koltun, NeurIPS 2018; Désidéri 2012)."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.inputs import has_numbers
from fastmtl.methods.base import GramMethod
from fastmtl.ops.reference.present import is_present
from fastmtl.options import choice, option
from fastmtl.rule import NOTHING, Context

__all__ = ["MGDA"]

Normalization: TypeAlias = Literal["none", "l2", "loss", "loss+"]


class MGDA(GramMethod):
    """MGDA: the shortest vector in the convex hull of the task gradients.

        α = argmin ‖αᵀ G‖²    over    α >= 0, Σ α = 1        g = αᵀ G

    It is a descent direction for every task, or zero at a Pareto-stationary point. Solved exactly on the Gram matrix
    by active sets in float64, not by Frank-Wolfe steps. With `fan_out` or `representation=` this is MGDA-UB.

    `info` has `alpha`, `gram` and `residual` (the largest violation of the optimality conditions, relative to gradients
    of unit length).

    Args:
        normalization: what each gradient is divided by before α is computed: "none"; "l2", its norm; "loss", its task's
            loss; or "loss+", both. α then combines the unscaled gradients, as in the authors' code. "loss" and "loss+"
            need the losses: see `losses=`, and `FanOut.total`. A loss of zero makes its gradient infinitely long, so
            its task gets no weight. A negative loss is an error if losses are on the CPU, and makes α NaN elsewhere.

    Raises:
        ValueError: unknown `normalization`; (in a step) a negative loss.
    """

    normalization: Normalization = option(choice(*get_args(Normalization)))

    def __init__(self, *, normalization: Normalization = "none") -> None:
        super().__init__()
        self.normalization = normalization

    @property
    def needs_losses(self) -> bool:  # type: ignore[override]
        return self.normalization in ("loss", "loss+")

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"normalization={self.normalization!r}"

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        alpha, residual = ops.mgda(M if self.normalization == "none" else self._normalized(M, context))
        return Info.of(alpha, M, residual=residual)

    def _normalized(self, M: Tensor, context: Context) -> Tensor:
        there = is_present(M)
        divisor = torch.ones((), dtype=torch.float64, device=M.device)
        if context.losses is not None:
            divisor = context.losses.to(M.device)
            negative = there & divisor.isfinite() & (divisor < 0)
            if has_numbers(negative) and bool(negative.any()):
                t = negative.reshape(-1, M.shape[-1]).any(0).tolist().index(True)
                got = divisor[t].item()
                raise ValueError(f"losses[{t}]: expected a loss >= 0, by which {self!r} divides, got {got:.6g}")
        if self.normalization != "loss":
            divisor = divisor * M.diagonal(dim1=-2, dim2=-1).clamp_min(0).to(torch.float64).sqrt()
        # A loss that is not finite does not make its task absent.
        inverse = torch.where(divisor.isfinite() & (divisor >= 0), 1 / divisor, torch.nan)
        inverse = torch.where(there & (divisor != 0), inverse, 0.0)
        return M * inverse[..., :, None] * inverse[..., None, :]
