"""IMTL-L: the loss balance of Towards Impartial Multi-Task Learning (Liu et al., ICLR 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmtl.scalarization._scalarization import Scalarization

__all__ = ["IMTLL"]


class IMTLL(Scalarization):
    """IMTL-L: Σ_t exp(s_t) L_t - s_t, with learned s; at its optimum all scaled losses exp(s_t) L_t are 1.

    `s` is a parameter: give `parameters()` to the optimizer along with the model's. The losses must be positive, or s
    grows without bound.

    Source: Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang, "Towards Impartial Multi-Task Learning", ICLR 2021.

    Args:
        tasks: number of tasks T.

    Raises:
        TypeError: `tasks` is not an int.
        ValueError: `tasks` is less than 1.
    """

    def __init__(self, tasks: int) -> None:
        super().__init__(tasks)
        self.s = nn.Parameter(torch.zeros(tasks))

    @torch.no_grad()
    def reset(self) -> None:
        """Puts s back to zero."""
        self.s.zero_()

    def _scalarize(self, L: Tensor) -> tuple[Tensor, Tensor]:
        w = self.s.exp()
        return (w * L - self.s).sum(), w

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"tasks={self.tasks}"
