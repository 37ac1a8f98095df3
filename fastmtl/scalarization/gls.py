"""Geometric loss strategy (Chennupati et al., CVPR Workshops 2019)."""

from __future__ import annotations

from torch import Tensor

from fastmtl.scalarization.base import Derivative, Scalarization, masked, number_of

__all__ = ["GLS"]


class GLS(Scalarization):
    """Geometric loss strategy: the geometric mean (Π_t L_t)^(1/T), by logarithms, so that no product overflows.

    The losses must be positive: at zero the mean is zero and has no derivative. With n tasks present it is the
    n-th root of their product.

    Source: Chennupati, Sistu, Yogamani, Rawashdeh, "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss
    Strategy for Multi-Task Learning", CVPR Workshops 2019.

    Args:
        tasks: expected number of tasks T; None for any.
    """

    _positive = True

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[Tensor, Derivative]:
        n = number_of(L, here)

        def mean(L: Tensor) -> Tensor:
            return (L.log().mean() if here is None else masked(L.log(), here).sum() / n).exp()

        return mean(L), lambda L: masked(mean(L) / n / L, here)

    def _needs(self, t: int) -> str:
        return "a loss > 0, since the geometric mean has no derivative at zero"
