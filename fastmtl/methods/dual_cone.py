"""What UPGrad and DualProj share: projections onto the dual cone of the task gradients."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.methods.base import GramMethod
from fastmtl.methods.weighted import Weighted
from fastmtl.ops.reference.present import is_present
from fastmtl.options import Weights, number, option, show_weights
from fastmtl.rule import NOTHING, Context

__all__ = ["DualCone"]


class DualCone(Weighted, GramMethod):
    """A method that projects onto the dual cone, solved exactly by active sets in float64."""

    _each: ClassVar[bool]  # whether to project each weighted gradient, or their sum

    ridge: float = option(number(low=0))

    def __init__(self, *, weights: Weights = None, ridge: float = 0.0) -> None:
        super().__init__(weights)
        self.ridge = ridge

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        ridge = f", ridge={self.ridge}" if self.ridge else ""
        return f"weights={show_weights(self.weights)}{ridge}"

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        alpha, residual = ops.dual_cone(self._ridged(M), self._task_weights(M.shape[-1], M), self._each)
        return Info.of(alpha, M, residual=residual)

    def _ridged(self, M: Tensor) -> Tensor:
        if not self.ridge:
            return M
        M = M.to(torch.float64)
        diagonal = M.diagonal(dim1=-2, dim2=-1)
        added = self.ridge * diagonal.sum(-1, keepdim=True)
        return M + torch.diag_embed(torch.where(is_present(M), added, 0.0))  # an absent task stays absent
