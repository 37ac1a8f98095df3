"""COSMOS: Scalable Pareto Front Approximation for Deep Multi-Objective Learning (Ruchte and Grabocka, ICDM 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.inputs import has_numbers
from fastmtl.options import Weights, number, option, show_weights
from fastmtl.scalarization.base import Derivative, masked
from fastmtl.scalarization.weighted import Weighted

__all__ = ["COSMOS"]


class COSMOS(Weighted):
    """COSMOS: the weighted sum of the losses, minus λ times the cosine between losses and weights.

        Σ_t w_t L_t - λ cos(w, L)

    Different weights then lead to different trade-offs, even on non-convex Pareto fronts. To learn the whole front
    with one network, the authors draw `cosmos.weights` from a Dirichlet distribution in every step and also pass them
    to the network as an input, which is up to the model.

    Source: Ruchte, Grabocka, "Scalable Pareto Front Approximation for Deep Multi-Objective Learning", ICDM 2021, Eq. 4.

    Args:
        weights: w: None or "mean" for 1/T each, "sum" for ones, or T numbers.
        lam: λ; the paper uses 0.01 to 8, depending on the data.

    Raises:
        TypeError: an option of another kind.
        ValueError: an unknown word, numbers that are not one-dimensional or not finite, a negative `lam`.
    """

    lam: float = option(number(low=0))

    _one_node = True

    def __init__(self, *, weights: Weights = None, lam: float = 1.0) -> None:
        super().__init__(weights)
        self.lam = lam

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[Tensor, Derivative]:
        w = masked(self._task_weights(L), here)
        L = masked(L, here)
        product, first, second = w @ L, torch.linalg.vector_norm(w), torch.linalg.vector_norm(L)
        lam = self.lam
        if not L.requires_grad and has_numbers(L) and (length := first.item() * (size := second.item())) > 0:
            cosine = product.item() / length
            slopes = 1 - lam / length, lam * cosine / size / size
        else:
            some = first * second.detach() != 0  # where one of them is zero, the cosine is
            cosine, slopes = torch.where(some, product, 0.0) / torch.where(some, first * second, 1.0), None

        def derivative(L: Tensor) -> Tensor:
            L = masked(L, here)
            if slopes is not None and not torch.is_grad_enabled():
                return torch.add(w * slopes[0], L, alpha=slopes[1])
            some = first * torch.linalg.vector_norm(L.detach()) != 0
            L = torch.where(some, L, 1.0)
            square = L @ L
            slope = torch.addcmul(w, L, (w @ L) / square, value=-1) / (first * square.sqrt())
            return w - lam * torch.where(some, slope, 0.0)

        return product - lam * cosine, derivative

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"weights={show_weights(self.weights)}, lam={self.lam}"
