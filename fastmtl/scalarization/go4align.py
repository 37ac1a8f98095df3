"""GO4Align: Group Optimization for Multi-Task Alignment (Shen et al., NeurIPS 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmtl.options import integer, number, option
from fastmtl.scalarization.base import Scalarization, chosen, masked

__all__ = ["GO4Align"]


class GO4Align(Scalarization):
    """GO4Align: tasks whose losses have fallen alike form a group, with one weight.

        γ_t = p_t Σ_i L_i / L_t        p ∝ p exp(-η L)        w_t = the mean of γ in t's group        Σ_t w_t L_t

    Groups come from k-means clustering of the numbers γ with k = `groups`. In one dimension it is solved exactly:
    groups are intervals of the sorted numbers. p is the state, 1/T at first. Losses must be positive. An absent task
    keeps its p, and is in no group.

    Source: Shen, Xiao, Worring, Snoek et al., "GO4Align: Group Optimization for Multi-Task Alignment", NeurIPS 2024,
    and the authors' code.

    Args:
        tasks: number of tasks T.
        groups: number of groups, at most T; 1 is one weight for all.
        step_size: η; the authors use 0.0001.

    Raises:
        TypeError: `tasks` or `groups` is not an int, `step_size` is not a number.
        ValueError: `tasks` or `groups` is less than 1, `step_size` is negative.
    """

    logits: Tensor  # log p, [T]
    tasks: int = option(integer(1), fixed=True)
    groups: int = option(integer(1))
    step_size: float = option(number(low=0))

    _positive = True

    def __init__(self, tasks: int, *, groups: int = 2, step_size: float = 1e-4) -> None:
        super().__init__(tasks)
        self.groups = groups
        self.step_size = step_size
        self.register_buffer("logits", torch.zeros(self.tasks, dtype=torch.float64))

    def reset(self) -> None:
        """Returns to equal p."""
        super().reset()
        self.logits.zero_()

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[None, Tensor]:
        fixed = L.detach().to(torch.float64)
        logits = self.logits - self.step_size * fixed if self.training else self.logits
        p = masked(logits, here, -math.inf).softmax(0)
        indicator = p * masked(fixed, here).sum() / fixed
        means = _group_means(indicator, here, min(self.groups, L.shape[0]))
        return None, masked(means, here).to(L.dtype)

    def _remember(self, L: Tensor, valid: Tensor | None) -> None:
        self.logits.copy_(chosen(valid, self.logits - self.step_size * L, self.logits))

    def _needs(self, t: int) -> str:
        return "a loss > 0, since GO4Align divides by it"

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"tasks={self.tasks}, groups={self.groups}, step_size={self.step_size}"


def _group_means(x: Tensor, here: Tensor | None, groups: int) -> Tensor:
    """The mean of each number's cluster, [T], for the `groups` clusters with the smallest sum of squares.

    By dynamic programming over intervals [i, j) of the sorted numbers; absent ones come last and cost nothing.
    """
    T = x.shape[0]
    there = torch.ones_like(x, dtype=torch.bool) if here is None else here
    order = torch.where(there, x, math.inf).argsort()
    y = torch.where(there, x, 0.0)[order]
    counted = there[order].to(x.dtype)
    zero = x.new_zeros(1)
    sums, squares, counts = (torch.cat([zero, v.cumsum(0)]) for v in (y, y.square(), counted))
    n = (counts[None] - counts[:, None]).clamp_min(1)
    total = sums[None] - sums[:, None]
    ends = torch.arange(T + 1, device=x.device)
    cost = torch.where(ends[None] > ends[:, None], squares[None] - squares[:, None] - total.square() / n, math.inf)
    best, cuts = cost[0], []  # best[j]: of the first j numbers
    for _ in range(groups - 1):
        with_cut = best[:, None] + cost
        # A further group never costs more: where it gains nothing, the last cut is at j itself.
        best, cut = torch.minimum(with_cut.amin(0), best), with_cut.argmin(0)
        cuts.append(torch.where(with_cut.amin(0) <= best, cut, 0))
    label, j = torch.zeros_like(order), torch.full((), T, device=x.device)
    for cut in reversed(cuts):
        j = cut.gather(0, j[None])[0]  # an index on the device, for which nothing waits
        label += ends[:-1] >= j
    means = torch.zeros_like(y).index_add(0, label, y) / torch.zeros_like(y).index_add(0, label, counted).clamp_min(1)
    return torch.empty_like(x).scatter(0, order, means[label])
