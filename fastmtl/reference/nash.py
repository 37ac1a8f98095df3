"""The bargaining solution: Mα = α^-p."""

from __future__ import annotations

from torch import Tensor

__all__ = ["nash"]


def nash(M: Tensor, power: float) -> tuple[Tensor, Tensor]:
    raise NotImplementedError
