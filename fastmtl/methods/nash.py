"""Nash-MTL: Multi-Task Learning as a Bargaining Game (Navon et al., ICML 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.methods.state import StatefulMethod
from fastmtl.ops.reference.present import is_present
from fastmtl.options import integer, number, option
from fastmtl.rule import NOTHING, Context

__all__ = ["NashMTL"]


class NashMTL(StatefulMethod):
    """Nash-MTL: the Nash bargaining solution, which maximizes the product of the tasks' improvements.

        M α = 1/α    (elementwise, α > 0; their Eq. 2)        M the Gram matrix

    If zero lies in the convex hull of the gradients, there is no such α: then α = 0, and `info.converged` is false.
    Otherwise there is exactly one, found by damped Newton steps on the underlying convex problem, to rounding.
    `info.residual` is max |α_t (Mα)_t - 1| of this step's solution, before the options below are applied. The result
    has norm sqrt(T), whatever the gradients' size, before `max_norm` shortens it.

    Not homogeneous, because of `max_norm`: with a loss scaler pass `grad_scale=`.

    Args:
        max_norm: a longer result is shortened to this norm; 0 never shortens. The authors use 1.
        every: solve in every k-th step and keep the weights in between; `backward` then takes one pass instead of T
            (see its `every`), with the same result. These weights are the only state; `reset()` forgets them. A step
            with a task that has no weight yet is solved as well. Elsewhere (`method(G)`, `fan_out`,
            `representation=`, `groups=`) a task that is absent when weights are solved keeps its old weight.

    Raises:
        TypeError: an option of another kind.
        ValueError: `max_norm` < 0 or not finite, `every` < 1.
    """

    solution: Tensor  # α of the last one, float64 [T]; only with every > 1
    steps: Tensor  # number of steps so far, int64 [], or [B] for B matrices; steps that are not finite do not count

    _first: ClassVar[float] = 0.0  # the weights before the first solution, if they are ever used

    max_norm: float = option(number(low=0))
    every: int = option(integer(1))

    def __init__(self, *, max_norm: float = 1.0, every: int = 1) -> None:
        super().__init__("solution", "steps")
        self.max_norm = max_norm
        self.every = every

    @property
    def remembers(self) -> bool:  # type: ignore[override]
        return self.every > 1

    @property
    def holds(self) -> int:  # type: ignore[override]
        return self.every

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"max_norm={self.max_norm}, every={self.every}"

    def _solvable(self, M: Tensor) -> Tensor:
        """Which matrices [...] have a solution; for the others the last one is kept."""
        return M.isfinite().all(-1).all(-1)

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        wide = context.unscaled(M)
        alpha, residual = ops.nash(wide, 1.0)
        if self.every > 1 or self._first:
            alpha = self._held(alpha, wide, context.due)
        info = Info.of(self._shortened(alpha, wide), M, residual=residual)
        info.lasting = alpha
        return info

    def shortening(self, norm: Callable[[], Tensor]) -> Tensor | None:
        return self.max_norm / norm().clamp_min(self.max_norm) if self.max_norm else None

    def _shortened(self, alpha: Tensor, M: Tensor) -> Tensor:
        if not self.max_norm:
            return alpha
        squared = (alpha[..., None, :] @ M @ alpha[..., None]).squeeze(-1)
        # Rounding may turn a zero into a tiny negative number; a zero needs no shortening.
        return alpha * (self.max_norm / squared.clamp_min(self.max_norm**2).sqrt())

    def _held(self, alpha: Tensor, M: Tensor, due: bool) -> Tensor:
        """The weights of the last step that was due to be solved, possibly this one."""
        solution = self._kept("solution", M.shape[:-1], torch.float64, M.device, self._first)
        steps = self._kept("steps", M.shape[:-2], torch.int64, M.device)
        finite = M.isfinite().all(-1).all(-1)
        there = is_present(M)
        now = (steps % self.every == 0) | (there & (solution == 0)).any(-1) | due
        kept = torch.where((self._solvable(M) & now)[..., None] & there, alpha, solution)
        solution.copy_(torch.where(finite[..., None], kept, solution))
        steps.add_(finite)
        return torch.where(finite[..., None], torch.where(there, kept, 0.0), torch.nan)
