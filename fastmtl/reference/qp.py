"""Quadratic problems in the task weights: the shortest vector of the convex hull, projections on the dual cone, CAGrad."""

from __future__ import annotations

from torch import Tensor

__all__ = ["cagrad", "dual_cone", "mgda"]


def mgda(M: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


def dual_cone(M: Tensor, weights: Tensor | None, each: bool) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


def cagrad(M: Tensor, c: float) -> tuple[Tensor, Tensor]:
    raise NotImplementedError
