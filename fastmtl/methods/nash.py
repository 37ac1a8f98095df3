"""Nash-MTL: Multi-Task Learning as a Bargaining Game (Navon et al., ICML 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

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
    """Nash-MTL: the bargaining solution, in which the product of the tasks' improvements is largest.

        M α = 1/α    (elementwise, α > 0; their Eq. 2)        M the Gram matrix

    There is exactly one such α where zero does not lie in the convex hull of the gradients, else none: then α = 0, and
    `info.converged` is false. Found by damped Newton steps on the convex problem behind it, to rounding;
    `info.residual` is max |α_t (Mα)_t - 1| of this step's solution, before the options below are applied. The result
    has the norm sqrt(T), whatever the gradients' size, and then `max_norm`.

    Not homogeneous, because of `max_norm`: with a loss scaler pass `grad_scale=`.

    Args:
        max_norm: the result is shortened to this norm where it is longer; 0 to leave it as it is. The authors' is 1.
        every: solve in every k-th step and keep the weights in between, where `backward` then takes one pass in place
            of T (see its `every`), with the same result. The only state: `reset()` forgets it. In a step in which a
            task is there that has no weight yet, it is solved as well. Elsewhere (`method(G)`, `fan_out`,
            `representation=`, `groups=`) a task that is absent when it is solved keeps the weight that it had.

    Raises:
        TypeError: an option of another kind.
        ValueError: `max_norm` < 0 or not finite, `every` < 1.
    """

    solution: Tensor  # α of the last one, float64 [T]; only with every > 1
    steps: Tensor  # how many steps it has had, int64 [], or [B] for B matrices: a step that is not finite is none

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

    def _state_of(self, shape: Sequence[int]) -> dict[str, Any]:
        if self.every == 1 and not self._first:
            return {}
        return {"solution": (shape[:-1], torch.float64, self._first), "steps": (shape[:-2], torch.int64)}

    def _solvable(self, M: Tensor) -> Tensor:
        """For which matrices [...] there is a solution; for others the last one is kept."""
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
        # Rounding may leave a tiny negative number of a zero; a zero needs no shortening.
        return alpha * (self.max_norm / squared.clamp_min(self.max_norm**2).sqrt())

    def _held(self, alpha: Tensor, M: Tensor, due: bool) -> Tensor:
        """The weights of the last step that was to solve; this one's, if it is."""
        solution, steps = self._state(M.shape, M.device)
        finite = M.isfinite().all(-1).all(-1)
        there = is_present(M)
        now = (steps % self.every == 0) | (there & (solution == 0)).any(-1) | due
        kept = torch.where((self._solvable(M) & now)[..., None] & there, alpha, solution)
        solution.copy_(torch.where(finite[..., None], kept, solution))
        steps.add_(finite)
        return torch.where(finite[..., None], torch.where(there, kept, 0.0), torch.nan)
