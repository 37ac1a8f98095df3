"""Dynamic weight average (Liu, Johns, Davison, CVPR 2019)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmtl.inputs import has_numbers
from fastmtl.options import integer, number, option
from fastmtl.scalarization.base import Derivative, Scalarization, chosen, masked, number_of

__all__ = ["DWA"]


class DWA(Scalarization):
    """Dynamic weight average: Σ_t w_t L_t, with more weight for tasks whose losses fall more slowly.

        w = T · softmax(r / τ)        r_t = L_t(k-1) / L_t(k-2)

    where L_t(k) is the loss of task t, averaged over epoch k or over the k-th window of n steps. The user calls
    `end_epoch()` after every epoch. The first two epochs (windows) have weights 1.

    The losses must not be negative. A loss that rises from zero has r = ∞: it gets all the weight. A loss that stays
    zero has r = 1, and so has a task that has not yet been present in two epochs; epochs in which a task is absent do
    not count for it. The weights of n present tasks sum to n.

    Source: Liu, Johns, Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, Eq. 7.

    Args:
        tasks: number of tasks T.
        temperature: τ; the larger, the more even the weights.
        window: None for epochs (the authors'), or n: averages over consecutive windows of n steps.

    Raises:
        TypeError: `tasks` or `window` is not an int, `temperature` is not a number.
        ValueError: one of them is not positive.
    """

    total: Tensor  # of this epoch's losses, [T]
    count: Tensor  # how many those are, [T]
    steps: Tensor  # of this epoch, []
    newer: Tensor  # the averages of the last epoch and of the one before, [T]; NaN where there is none yet
    older: Tensor
    tasks: int = option(integer(1), fixed=True)
    temperature: float = option(number(above=0))
    window: int | None = option(integer(1, optional=True))

    _positive = False

    def __init__(self, tasks: int, *, temperature: float = 2.0, window: int | None = None) -> None:
        super().__init__(tasks)
        self.temperature = temperature
        self.window = window
        self._seen: tuple[tuple[int, int] | None, bool] = (None, False)
        self.register_buffer("total", torch.zeros(self.tasks, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(self.tasks, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        for name in ("newer", "older"):
            self.register_buffer(name, torch.full((self.tasks,), math.nan, dtype=torch.float64))

    def reset(self) -> None:
        """Forgets all losses."""
        super().reset()
        for name, buffer in self.named_buffers():
            buffer.fill_(math.nan) if name in ("newer", "older") else buffer.zero_()

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Ends an epoch; an epoch without a finite step does not count. Windows end by themselves."""
        if self.window is None:
            self._end(self.steps > 0)

    def _end(self, when: Tensor) -> None:
        seen = when & (self.count > 0)
        self.older.copy_(torch.where(seen, self.newer, self.older))
        self.newer.copy_(torch.where(seen, self.total / self.count, self.newer))
        for buffer in (self.total, self.count, self.steps):
            buffer.masked_fill_(when, 0)

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[Tensor | None, Tensor | Derivative]:
        if here is None and self._are_first():  # as below, at once
            return L.sum(), torch.ones_like
        known = ~self.older.isnan()
        ratio = torch.where(known & (self.newer != self.older), self.newer / self.older, 1.0)
        shares = masked((ratio / self.temperature).clamp_max(1e300), here, -math.inf).softmax(0)
        return None, masked(torch.where(known.any(), number_of(L, here) * shares, 1.0), here).to(L.dtype)

    def _are_first(self) -> bool:
        """Whether these are known to be the first two epochs; checked once per epoch."""
        older = self.older
        if not has_numbers(older):
            return False
        stamp = id(older), older._version
        if self._seen[0] != stamp:
            self._seen = stamp, bool(older.isnan().all())
        return self._seen[1]

    def _remember(self, L: Tensor, valid: Tensor | None) -> None:
        # In place: to a module, `self.count += 1` is another buffer to register.
        self.total.add_(chosen(valid, L, 0.0))
        if valid is None:
            torch._foreach_add_((self.count, self.steps), 1)
        else:
            self.count.add_(valid)
            self.steps.add_(valid.any())
        if self.window is not None:
            self._end(self.steps >= self.window)

    def _needs(self, t: int) -> str:
        return "a loss >= 0, since DWA weighs by ratios of losses"

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"tasks={self.tasks}, temperature={self.temperature}, window={self.window}"
