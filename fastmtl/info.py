"""What a method saw and did in one step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Info"]


class Info:
    """What a method saw and did in one step; all tensors lie on the gradients' device, and nothing waits for them.

    `Info(T)` makes buffers for `fan_out(..., info=...)`, NaN until a backward has filled them. With `groups=` every
    field has a leading dimension, one entry a group. A field that a method does not have is None.

    Args:
        tasks: number of tasks T.
        device: where the buffers lie: the gradients' device.

    Attributes:
        alpha: task weights α, float64 [T]: the committed gradient is αᵀ G.
        gram: Gram matrix of the task gradients, float64 [T, T].
        eigenvalues: its eigenvalues, float64 [T], descending; the first `rank` are kept.
        rank: number of independent task gradients under the method's rank rule, int64 [].
        residual: how far α is from satisfying the method's own optimality conditions, relative, float64 []: infinite
            where these have no solution, NaN where the gradients are not finite. None for methods that solve nothing.
        explicit: names of the shared parameters whose T gradients `engine="gramian"` formed because it knows no closed
            form for their use; None without that engine.
        names: of the tasks, where they have names: `backward({"seg": ..., "depth": ...})`.
    """

    SOLVED = 1e-8  # a residual up to this counts as converged

    # Typed for the methods that have them, so that reading one needs no test for None.
    alpha: Tensor
    gram: Tensor
    eigenvalues: Tensor
    rank: Tensor
    residual: Tensor
    explicit: tuple[str, ...] | None = None
    names: tuple[str, ...] | None = None

    def __init__(self, tasks: int, device: torch.device | str | None = None) -> None:
        self.alpha = torch.full((tasks,), math.nan, dtype=torch.float64, device=device)
        self.gram = torch.full((tasks, tasks), math.nan, dtype=torch.float64, device=device)
        self.eigenvalues = torch.full((tasks,), math.nan, dtype=torch.float64, device=device)
        self.rank = torch.zeros((), dtype=torch.int64, device=device)
        self.residual = torch.full((), math.nan, dtype=torch.float64, device=device)

    @classmethod
    def of(
        cls,
        alpha: Tensor | None = None,
        gram: Tensor | None = None,
        eigenvalues: Tensor | None = None,
        rank: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Info:
        """An info that holds these very tensors."""
        info = cls.__new__(cls)
        info.alpha, info.gram = alpha, gram  # type: ignore[assignment]
        info.eigenvalues, info.rank = eigenvalues, rank  # type: ignore[assignment]
        info.residual = residual  # type: ignore[assignment]
        return info

    @property
    def converged(self) -> Tensor:
        """Whether `residual` is at most `SOLVED`, bool []; None for methods that solve nothing."""
        return None if self.residual is None else self.residual <= self.SOLVED

    def copy_(self, other: Info) -> Info:
        """Overwrites the buffers with what `other` has; fields that it does not have keep their content."""
        for mine, its in zip(self._fields(), other._fields(), strict=True):
            if mine is not None and its is not None:
                mine.copy_(its)
        return self

    def _fields(self) -> tuple[Tensor | None, ...]:
        return self.alpha, self.gram, self.eigenvalues, self.rank, self.residual

    def __repr__(self) -> str:
        return (
            f"Info(alpha={self.alpha}, gram={self.gram}, eigenvalues={self.eigenvalues}, rank={self.rank}, "
            f"residual={self.residual})"
        )
