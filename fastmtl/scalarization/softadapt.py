"""SoftAdapt: Techniques for Adaptive Loss Weighting (Heydari et al., 2019)."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from fastmtl.options import choice, integer, number, option
from fastmtl.scalarization.base import Scalarization, chosen, masked

__all__ = ["SoftAdapt"]

Variant: TypeAlias = Literal["plain", "normalized", "loss-weighted"]


class SoftAdapt(Scalarization):
    """SoftAdapt: more weight for losses that fall more slowly than the others, or rise.

        w = softmax(β s)        s_t = L_t(k-1) - L_t(k-2)

    from the losses of the previous two steps; in the first two the weights are 1/T. Variants: "normalized" divides s by
    Σ |s_t|, so its size does not matter; "loss-weighted" has w_t ∝ L_t(k-1) exp(β s_t), which also depends on the
    size of the losses. A task that was absent in one of the two steps has s = 0. The weights of the present tasks sum
    to one.

    Source: Heydari, Thompson, Mehmood, "SoftAdapt: Techniques for Adaptive Loss Weighting of Neural Networks with
    Multi-Part Loss Functions", 2019, Algorithm 1.

    Args:
        tasks: number of tasks T.
        beta: β; the authors use 0.1; a negative value favours the losses that fall fastest.
        variant: "plain", "normalized" or "loss-weighted".

    Raises:
        TypeError: `tasks` is not an int, `beta` is not a number.
        ValueError: `tasks` is less than 1, `beta` is not finite, an unknown `variant`.
    """

    newer: Tensor  # the last two losses, [T]; NaN where there is none yet
    older: Tensor
    tasks: int = option(integer(1), fixed=True)
    beta: float = option(number())
    variant: Variant = option(choice(*get_args(Variant)))

    def __init__(self, tasks: int, *, beta: float = 0.1, variant: Variant = "plain") -> None:
        super().__init__(tasks)
        self.beta = beta
        self.variant = variant
        for name in ("newer", "older"):
            self.register_buffer(name, torch.full((self.tasks,), math.nan, dtype=torch.float64))

    def reset(self) -> None:
        """Forgets all losses."""
        super().reset()
        self.newer.fill_(math.nan)
        self.older.fill_(math.nan)

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[None, Tensor]:
        known = ~(self.newer - self.older).isnan()
        rate = masked(torch.where(known, self.newer - self.older, 0.0), here)
        if self.variant == "normalized":
            total = rate.abs().sum()
            rate = torch.where(total > 0, rate / total, 0.0)
        exponent = self.beta * rate
        if self.variant == "loss-weighted":
            size = torch.where(self.newer.isnan(), 1.0, self.newer).clamp_min(0)
            exponent = torch.where(known.any(), exponent + size.log(), exponent)
        w = masked(exponent, here, -math.inf).softmax(0)
        # NaN where all losses were zero.
        return None, masked(torch.where(w.isnan(), 1 / L.shape[0], w), here).to(L.dtype)

    def _remember(self, L: Tensor, valid: Tensor | None) -> None:
        self.older.copy_(chosen(valid, self.newer, self.older))
        self.newer.copy_(chosen(valid, L, self.newer))

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"tasks={self.tasks}, beta={self.beta}, variant={self.variant!r}"
