"""COSMOS: Scalable Pareto Front Approximation for Deep Multi-Objective Learning (Ruchte and Grabocka, ICDM 2021)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmtl import options
from fastmtl.inputs import has_numbers
from fastmtl.options import Weights, number, option, show_weights
from fastmtl.scalarization.base import Scalarization, masked

__all__ = ["COSMOS"]


class COSMOS(Scalarization):
    """COSMOS: the weighted sum of the losses, less the cosine of their vector and the weights.

        Σ_t w_t L_t - λ cos(w, L)

    so that different weights lead to different trade-offs, also where the Pareto front is not convex. To learn all of
    it with one network the authors draw `cosmos.weights` from a Dirichlet distribution in every step, and give them to
    the network as an input, which is the model's affair.

    Source: Ruchte, Grabocka, "Scalable Pareto Front Approximation for Deep Multi-Objective Learning", ICDM 2021, Eq. 4.

    Args:
        weights: w: None or "mean" for 1/T each, "sum" for ones, or T numbers.
        lam: λ; the paper has 0.01 to 8, depending on the data.

    Raises:
        TypeError: an option of another kind.
        ValueError: an unknown word, numbers that are not one-dimensional or not finite, a negative `lam`.
    """

    weights: Tensor | str = option(options.weights)
    lam: float = option(number(low=0))

    def __init__(self, *, weights: Weights = None, lam: float = 1.0) -> None:
        super().__init__()
        self.weights = weights  # type: ignore[assignment]
        self.lam = lam
        self._copies = options.Copies()

    def check_tasks(self, T: int) -> None:
        """Raises ValueError where the weights are of another number of tasks."""
        options.check_weights(self.weights, T)

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[Tensor, Callable[[], Tensor]]:
        w = masked(preferred(self.weights, self._copies, L), here)
        L = masked(L, here)
        product, length = w @ L, torch.linalg.vector_norm(w) * torch.linalg.vector_norm(L)
        fixed, lam, shared = L.detach(), self.lam, product
        if not (has_numbers(fixed) and length.item() > 0):
            some = length.detach() > 0  # where one of them is zero, the cosine is
            shared, length = torch.where(some, product, 0.0), torch.where(some, length, 1.0)
        value, length = product - lam * (shared / length), length.detach()

        def weights() -> Tensor:
            square = fixed @ fixed
            slope = w / length - (w @ fixed) / length * fixed / square
            return w - lam * torch.where((square > 0) & (w != 0).any(), slope, 0.0)

        return value, weights

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"weights={show_weights(self.weights)}, lam={self.lam}"


def preferred(weights: Tensor | str, copies: options.Copies, L: Tensor) -> Tensor:
    """Weights [T] of the losses L [T], in their dtype."""
    if isinstance(weights, str):
        return torch.full_like(L, 1.0 if weights == "sum" else 1 / L.shape[0], requires_grad=False)
    return copies.get(weights, L).to(L.dtype)
