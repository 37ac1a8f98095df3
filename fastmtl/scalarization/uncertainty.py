"""Uncertainty weighting (Kendall, Gal, Cipolla, CVPR 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmtl.options import integer, number, option
from fastmtl.scalarization.base import Scalarization, masked

__all__ = ["Uncertainty"]


class Uncertainty(Scalarization):
    """Uncertainty weighting: Σ_t ½ exp(-s_t) L_t + ½ s_t, with learned log-variances s = log σ².

    `s` is a parameter: give `parameters()` to the optimizer along with the model's. An absent task's s gets no
    gradient. A loss that stays negative makes its s fall without bound.

    Source: Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
    Semantics", CVPR 2018, Section 3.2.

    Args:
        tasks: number of tasks T.
        initial: initial s, usually 0 (LibMTL: -0.5).

    Raises:
        TypeError: `tasks` is not an int, `initial` is not a number.
        ValueError: `tasks` is less than 1, `initial` is not finite.
    """

    tasks: int = option(integer(1), fixed=True)
    initial: float = option(number())

    def __init__(self, tasks: int, *, initial: float = 0.0) -> None:
        super().__init__(tasks)
        self.initial = initial
        self.s: nn.Parameter = nn.Parameter(torch.full((self.tasks,), self.initial))

    @torch.no_grad()
    def reset(self) -> None:
        """Resets s to `initial`."""
        super().reset()
        self.s.fill_(self.initial)

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[Tensor, Tensor]:
        w = 0.5 * torch.exp(-self.s)
        return masked(w * L + 0.5 * self.s, here).sum(), masked(w, here)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"tasks={self.tasks}, initial={self.initial}"
