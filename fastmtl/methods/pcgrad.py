"""PCGrad: Gradient Surgery for Multi-Task Learning (Yu et al., NeurIPS 2020)."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from fastmtl import ops, options
from fastmtl.info import Info
from fastmtl.methods.base import GramMethod
from fastmtl.options import choice, option
from fastmtl.rule import NOTHING, Context, draw_seed

__all__ = ["PCGrad"]

Order: TypeAlias = Literal["task", "step"]
Reduction: TypeAlias = Literal["sum", "mean"]


class PCGrad(GramMethod):
    """PCGrad: projects each gradient off every other one that it conflicts with, in random order; then sums them.

        g_i ← g_i - min(0, <g_i, g_j>) / ‖g_j‖² · g_j    for the other tasks j in random order        g = Σ_i g_i

    (Algorithm 1 of the paper; g_j are the original gradients.) The projections are done on task weights, with the
    Gram matrix: T² steps of T numbers, no further products of gradients.

    `info` has `alpha` and `gram`.

    Args:
        order: "task", a random order for each task (the paper's algorithm), or "step", the same for all tasks of a
            step (as in the authors' first code).
        reduction: "sum" (the paper's) or "mean" over tasks.
        generator: source of randomness, on the gradients' device; default: torch's global one.

    Raises:
        TypeError: `generator` of another kind.
        ValueError: unknown `order` or `reduction`.
    """

    order: Order = option(choice(*get_args(Order)))
    reduction: Reduction = option(choice(*get_args(Reduction)))
    generator: torch.Generator | None = option(options.generator)

    def __init__(
        self, *, order: Order = "task", reduction: Reduction = "sum", generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.order = order
        self.reduction = reduction
        self.generator = generator

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"order={self.order!r}, reduction={self.reduction!r}"

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        alpha = ops.pcgrad(M, draw_seed(M, self.generator, context), self.order == "task")
        return Info.of(alpha / M.shape[-1] if self.reduction == "mean" else alpha, M)
