"""Geometric loss strategy (Chennupati et al., CVPR Workshops 2019)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmtl.scalarization._scalarization import Scalarization

__all__ = ["GLS"]


class GLS(Scalarization):
    """Geometric loss strategy: the geometric mean (Π_t L_t)^(1/T), by logarithms, so that no product overflows.

    The losses must be positive; one that is not makes the result NaN.

    Source: Chennupati, Sistu, Yogamani, Rawashdeh, "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss
    Strategy for Multi-Task Learning", CVPR Workshops 2019.
    """

    def _scalarize(self, L: Tensor) -> tuple[Tensor, Tensor]:
        # A zero loss has a logarithm, but no derivative.
        value = L.log().mean().exp() * torch.where((L.detach() > 0).all(), 1.0, math.nan)
        return value, value / L / L.shape[0]
