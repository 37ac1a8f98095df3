"""PBI, penalty-based boundary intersection: MOEA/D (Zhang and Li, IEEE TEVC 2007)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmtl import options
from fastmtl.inputs import has_numbers
from fastmtl.options import Numbers, Weights, number, numbers, option, show_weights
from fastmtl.scalarization.base import Derivative, masked
from fastmtl.scalarization.weighted import Weighted

__all__ = ["PBI"]


class PBI(Weighted):
    """PBI: the distance of the losses along a direction, plus θ times their distance from it.

        d₁ + θ d₂        d₁ = <L - z, u>        d₂ = ‖L - z - d₁ u‖        u = w / ‖w‖

    Minimizing it leads to the point of the Pareto front in direction w from z. On the direction itself d₂ has no
    derivative; its part of the gradient is zero there.

    Source: Zhang, Li, "MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition", IEEE Transactions on
    Evolutionary Computation 2007, section III.

    Args:
        weights: w: None or "mean" or "sum" for equal ones, or T numbers.
        theta: θ; 5 in the paper.
        reference: ideal point z, T numbers below the losses; default: zeros.

    Raises:
        TypeError: an option of another kind.
        ValueError: an unknown word, numbers that are not one-dimensional or not finite, a negative `theta`; (in a step)
            numbers whose length is not T.
    """

    theta: float = option(number(low=0))
    reference: Tensor | None = option(lambda x, name: None if x is None else numbers(x, name))

    _one_node = True

    def __init__(self, *, weights: Weights = None, theta: float = 5.0, reference: Numbers | None = None) -> None:
        super().__init__(weights)
        self.theta = theta
        self.reference = reference  # type: ignore[assignment]

    def check_tasks(self, T: int) -> None:
        """Raises ValueError if the weights or the reference are for another number of tasks."""
        super().check_tasks(T)
        if self.reference is not None:
            options.check_weights(self.reference, T, "reference")

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[Tensor, Derivative]:
        w = masked(self._task_weights(L), here)
        norm, host = torch.linalg.vector_norm(w), has_numbers(L.detach())
        u = w / norm if host and norm.item() > 0 else torch.where(norm > 0, w / norm, 0.0)
        z = None if self.reference is None else self._copies.get(self.reference, L).to(L.dtype)

        def parted(L: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            F = masked(L if z is None else L - z, here)
            along = F @ u
            apart = torch.addcmul(F, along, u, value=-1)
            return along, apart, apart @ apart

        along, first, squared = parted(L)
        # Not what rounding makes of losses in this very direction.
        rounding, length = (8 * torch.finfo(L.dtype).eps) ** 2, 0.0
        distance: Tensor | float
        if host and (square := squared.item()) > rounding * (square + along.item() ** 2):
            length = math.sqrt(square)
            distance, off = squared.sqrt() if L.requires_grad else length, None
        else:
            off = ~(squared.detach() <= rounding * (squared.detach() + along.detach().square()))
            distance = torch.where(off, torch.where(off, squared, 1.0).sqrt(), 0.0)
        theta = self.theta

        def derivative(L: Tensor) -> Tensor:
            if off is None and not torch.is_grad_enabled():
                return masked(torch.add(u, first, alpha=theta / length), here)
            _, apart, squared = parted(L)
            if off is not None:
                apart, squared = torch.where(off, apart, 0.0), torch.where(off, squared, 1.0)
            return masked(torch.addcmul(u, apart, squared.rsqrt(), value=theta), here)

        return along + theta * distance, derivative

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"weights={show_weights(self.weights)}, theta={self.theta}, reference={show_weights(self.reference)}"
