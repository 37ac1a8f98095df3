"""Krum: Machine Learning with Adversaries (Blanchard et al., NeurIPS 2017)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.inputs import has_numbers
from fastmtl.methods.base import GramMethod
from fastmtl.ops.reference.present import is_present
from fastmtl.options import flag, integer, option
from fastmtl.rule import NOTHING, Context

__all__ = ["Krum"]

_FEW = 16  # up to this many tasks, comparing in Python is faster than two dozen small tensors


class Krum(GramMethod):
    """(Multi-)Krum: the mean of the gradients closest to their neighbours; the others may be adversarial.

    A gradient's score is the sum of its squared distances to its T - f - 2 nearest gradients; the `selected` gradients
    with the lowest scores are averaged. Distances come from the Gram matrix: ‖g_i - g_j‖² = M_ii + M_jj - 2 M_ij.

    Absent tasks (zero gradients) are neither selected nor neighbours: T is then the number of the others. If that
    is too small for the options, one neighbour counts, and each share of the average stays 1 / `selected`.

    `info` has `alpha` and `gram`.

    Args:
        byzantine: number f of gradients that may be arbitrary; T has to be at least f + 3.
        selected: how many gradients are averaged: 1 is Krum, more is Multi-Krum.
        squared: False sums the plain distances, as TorchJD does.

    Raises:
        TypeError: an option of another kind.
        ValueError: `byzantine` < 0 or `selected` < 1; (in a step) too few tasks.
    """

    byzantine: int = option(integer(0))
    selected: int = option(integer(1))
    squared: bool = option(flag)

    def __init__(self, *, byzantine: int = 0, selected: int = 1, squared: bool = True) -> None:
        super().__init__()
        self.byzantine = byzantine
        self.selected = selected
        self.squared = squared

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"byzantine={self.byzantine}, selected={self.selected}, squared={self.squared}"

    def _is_there(self, square: float) -> bool:
        """Whether a gradient with this squared norm belongs to a task that is present."""
        return square > 0

    def _weights_of_few(self, M: list[list[float]]) -> list[float]:
        """The same as `solve`, in Python."""
        if not all(math.isfinite(x) for row in M for x in row):
            return [math.nan] * len(M)
        there = [t for t, row in enumerate(M) if self._is_there(row[t])]
        neighbours = max(len(there) - self.byzantine - 2, 1)
        scores = [math.inf] * len(M)
        for i in there:
            apart = sorted(max(M[i][i] - 2 * M[i][j] + M[j][j], 0.0) for j in there if j != i)[:neighbours]
            scores[i] = sum(apart if self.squared else map(math.sqrt, apart))
        # Ties are broken as torch breaks them, here as elsewhere.
        of_all = torch.tensor(scores, dtype=torch.float64, device="cpu")
        chosen = of_all.topk(self.selected, largest=False).indices.tolist()
        return [1 / self.selected if i in there and i in chosen else 0.0 for i in range(len(M))]

    def check_tasks(self, T: int) -> None:
        least = max(self.byzantine + 3, self.selected)
        if least > T:
            raise ValueError(f"{self!r}: expected at least {least} tasks, got {T}")

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        T = M.shape[-1]
        if M.ndim == 2 and T <= _FEW and has_numbers(M):
            return Info.of(M.new_tensor(self._weights_of_few(M.tolist()), dtype=torch.float64), M)
        wide = M.to(torch.float64)
        squares = wide.diagonal(dim1=-2, dim2=-1)
        distances = torch.add(squares[..., None], wide, alpha=-2).add_(squares[..., None, :]).clamp_min_(0)
        if not self.squared:
            distances.sqrt_()
        there = is_present(M)
        apart = there[..., None] & there[..., None, :] & ~torch.eye(T, dtype=torch.bool, device=M.device)
        nearest = torch.where(apart, distances, torch.inf).sort(-1).values
        neighbours = (there.sum(-1) - self.byzantine - 2).clamp_min(1)[..., None, None]
        counted = (torch.arange(T, device=M.device) < neighbours) & nearest.isfinite()
        scores = torch.where(there, torch.where(counted, nearest, 0.0).sum(-1), torch.inf)
        chosen = scores.topk(self.selected, largest=False).indices
        alpha = torch.zeros_like(scores).scatter(-1, chosen, 1 / self.selected)
        return Info.of(ops.constant(M, alpha), M)  # 0 for absent tasks if fewer are present than selected
