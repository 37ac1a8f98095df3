"""Dynamic weight average (Liu, Johns, Davison, CVPR 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.scalarization._scalarization import Scalarization, check_number

__all__ = ["DWA"]


class DWA(Scalarization):
    """Dynamic weight average: Σ_t w_t L_t, with more weight for tasks whose losses fall more slowly.

        w = T · softmax(r / τ)        r_t = L_t(k-1) / L_t(k-2)

    where L_t(k) is the loss of task t averaged over epoch k, of which the user tells by calling `epoch()` at its end,
    or over the k-th window of n steps. The first two epochs (windows) have weights 1.

    Source: Liu, Johns, Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, Eq. 7.

    Args:
        tasks: number of tasks T.
        temperature: τ; the larger, the more even the weights.
        window: None for epochs (the authors'), or n: averages over consecutive windows of n steps.

    Raises:
        TypeError: `tasks` or `window` is not an int, `temperature` is no number.
        ValueError: one of them is not positive.
    """

    total: Tensor
    count: Tensor
    newer: Tensor
    older: Tensor
    epochs: Tensor
    tasks: int

    def __init__(self, tasks: int, temperature: float = 2.0, window: int | None = None) -> None:
        super().__init__(tasks)
        self.temperature = check_number(temperature, "temperature", positive=True)
        if window is not None and (not isinstance(window, int) or isinstance(window, bool)):
            raise TypeError(f"window: expected an int or None, got {type(window).__name__}")
        if window is not None and window < 1:
            raise ValueError(f"window: expected at least one step, got {window}")
        self.window = window
        for name in ("total", "newer", "older"):
            self.register_buffer(name, torch.zeros(tasks, dtype=torch.float64))
        for name in ("count", "epochs"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def reset(self) -> None:
        """Forgets all losses."""
        for buffer in self.buffers():
            buffer.zero_()

    @torch.no_grad()
    def epoch(self) -> None:
        """Ends an epoch; one without any (finite) step does not count.

        Raises:
            RuntimeError: this instance averages over windows, which end by themselves.
        """
        if self.window is not None:
            raise RuntimeError(f"epoch: {self} averages over windows of {self.window} steps, not over epochs")
        self._end(self.count > 0)

    def _end(self, when: Tensor) -> None:
        self.older.copy_(torch.where(when, self.newer, self.older))
        self.newer.copy_(torch.where(when, self.total / self.count, self.newer))
        self.total.copy_(torch.where(when, 0.0, self.total))
        self.count.copy_(torch.where(when, 0, self.count))
        self.epochs += when

    def _scalarize(self, L: Tensor) -> tuple[Tensor, Tensor]:
        w = self.tasks * torch.softmax(self.newer / self.older / self.temperature, 0)
        w = torch.where(self.epochs >= 2, w, 1.0).to(L.dtype)
        return (w * L).sum(), w

    def _remember(self, L: Tensor, valid: Tensor) -> None:
        self.total += torch.where(valid, L, 0.0)
        self.count += valid
        if self.window is not None:
            self._end(self.count >= self.window)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"tasks={self.tasks}, temperature={self.temperature}, window={self.window}"
