"""ReLoBRaLo: Multi-Objective Loss Balancing for Physics-Informed Deep Learning (Bischof and Kraus, 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmtl.options import integer, number, option
from fastmtl.scalarization.base import Scalarization, chosen, masked, number_of

__all__ = ["ReLoBRaLo"]


class ReLoBRaLo(Scalarization):
    """ReLoBRaLo: more weight for losses that fell little since the last step, or now and then since the first.

        w(k) = α (ρ w(k-1) + (1 - ρ) ŵ(k, 0)) + (1 - α) ŵ(k, k-1)        ŵ(k, j) = T softmax(L(k) / (τ L(j)))

    with ρ drawn in every step: 1 with probability `lookback`, else 0. As in the authors' code w(0) is 1 and w(1) is
    ŵ(1, 0). Draws come from torch's generator. Losses must be positive. The state of an absent task does not change;
    its initial loss is that of the first step in which it is present.

    Source: Bischof, Kraus, "Multi-Objective Loss Balancing for Physics-Informed Deep Learning", 2021 (CMAME 2025), Eq.
    14, and the authors' code.

    Args:
        tasks: number of tasks T.
        alpha: α, how slowly weights change.
        temperature: τ; the larger, the more even the weights.
        lookback: the expectation of ρ.

    Raises:
        TypeError: `tasks` is not an int, another option is not a number.
        ValueError: `tasks` is less than 1, `alpha` or `lookback` is not in [0, 1], `temperature` is not positive.
    """

    w: Tensor  # [T]
    first: Tensor  # losses of the first step and of the last one, [T]; NaN where there are none yet
    last: Tensor
    steps: Tensor  # []
    tasks: int = option(integer(1), fixed=True)
    alpha: float = option(number(low=0, high=1))
    temperature: float = option(number(above=0))
    lookback: float = option(number(low=0, high=1))

    _positive = True

    def __init__(self, tasks: int, *, alpha: float = 0.999, temperature: float = 0.1, lookback: float = 0.999) -> None:
        super().__init__(tasks)
        self.alpha = alpha
        self.temperature = temperature
        self.lookback = lookback
        self._new: Tensor | None = None
        self.register_buffer("w", torch.ones(self.tasks, dtype=torch.float64))
        for name in ("first", "last"):
            self.register_buffer(name, torch.full((self.tasks,), math.nan, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def reset(self) -> None:
        """Returns to weights 1; forgets all losses."""
        super().reset()
        self.w.fill_(1)
        self.first.fill_(math.nan)
        self.last.fill_(math.nan)
        self.steps.zero_()

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[None, Tensor]:
        w = self.w
        if self.training:
            current = L.detach().to(torch.float64)
            rho = (torch.rand((), dtype=torch.float64, device=L.device) < self.lookback).to(torch.float64)
            rho = torch.where(self.steps <= 1, 1.0, rho)
            alpha = self.alpha * (self.steps != 1).to(torch.float64)
            history = rho * w + (1 - rho) * self._relative(current, self.first, here)
            mixed = alpha * history + (1 - alpha) * self._relative(current, self.last, here)
            w = self._new = torch.where(self.steps == 0, w, masked(mixed, here, 1.0))
        return None, masked(w, here).to(L.dtype)

    def _relative(self, L: Tensor, before: Tensor, here: Tensor | None) -> Tensor:
        ratio = torch.where(before.isnan(), 1.0, L / before) / self.temperature
        return number_of(L, here) * masked(ratio, here, -math.inf).softmax(0)

    def _remember(self, L: Tensor, valid: Tensor | None) -> None:
        assert self._new is not None  # in training mode
        new = self.first.isnan()
        self.w.copy_(chosen(valid, self._new, self.w))
        self.first.copy_(torch.where(new if valid is None else new & valid, L, self.first))
        self.last.copy_(chosen(valid, L, self.last))
        self.steps.add_(1 if valid is None else valid.any())
        self._new = None

    def _needs(self, t: int) -> str:
        return "a loss > 0, since ReLoBRaLo divides by it"

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"tasks={self.tasks}, alpha={self.alpha}, temperature={self.temperature}, lookback={self.lookback}"
