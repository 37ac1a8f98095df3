"""CAGrad: Conflict-Averse Gradient Descent for Multi-task Learning (Liu et al., NeurIPS 2021)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.methods.base import GramMethod
from fastmtl.options import choice, number, option
from fastmtl.rule import NOTHING, Context

__all__ = ["CAGrad"]


class CAGrad(GramMethod):
    """CAGrad: the direction around the mean gradient that improves the worst task most.

        g = argmax min_t <g_t, d>    over    ‖d - g0‖ <= c ‖g0‖        g0 the mean gradient

    By duality g = g0 + c ‖g0‖ g_w / ‖g_w‖, where w minimises <g_w, g0> + c ‖g0‖ ‖g_w‖ over the simplex (their Eq. 4).
    Solved exactly by active sets, in float64. If the optimal g_w is zero, w does not determine g: then g is the
    point of the ball closest to g0 that harms no task.

    `info` has `alpha`, `gram` and `residual` (the relative duality gap).

    Args:
        c: radius of the ball, relative to ‖g0‖ (the authors' code: 0.4 on NYUv2 and Cityscapes, 0.5 for the toy).
        rescale: 1 divides the result by 1 + c², as the authors' training code does; 0 does not.

    Raises:
        TypeError: `c` is not a number.
        ValueError: `c` is negative or not finite, unknown `rescale`.
    """

    c: float = option(number(low=0))
    rescale: Literal[0, 1] = option(choice(0, 1))

    def __init__(self, *, c: float = 0.5, rescale: Literal[0, 1] = 1) -> None:
        super().__init__()
        self.c = c
        self.rescale = rescale

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"c={self.c}, rescale={self.rescale}"

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        alpha, residual = ops.cagrad(M, self.c)
        return Info.of(alpha / (1 + self.c**2) if self.rescale else alpha, M, residual=residual)
