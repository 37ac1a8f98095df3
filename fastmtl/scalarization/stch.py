"""Smooth Tchebycheff scalarization (Lin et al., ICML 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl._inputs import describe
from fastmtl.scalarization._scalarization import Scalarization, check_number, check_numbers

__all__ = ["STCH"]


class STCH(Scalarization):
    """Smooth Tchebycheff scalarization: a smooth maximum of the weighted losses.

        μ log Σ_t exp(λ_t (L_t - z_t) / μ)

    It lies between max_t λ_t (L_t - z_t) and that plus μ log T. With `warmup=` it is what the authors' code does for
    deep multi-task learning: Σ_t log L_t over the first `warmup` epochs and one more, in which the losses are averaged
    to n_t; from then on

        T μ log Σ_t exp(log(L_t / n_t) / μ)

    The user calls `epoch()` at the end of every epoch; the losses must then be positive, or the result is NaN.

    Source: Lin, Zhang, Yang, Liu, Wang, Zhang, "Smooth Tchebycheff Scalarization for Multi-Objective Optimization",
    ICML 2024, and the authors' code.

    Args:
        mu: smoothing μ; the smaller, the closer to the maximum. The paper tries 0.01 to 1; the authors' code has 1 with
            a warm-up.
        weights: preferences λ: None or "mean" for 1/T each, "sum" for ones, or T numbers.
        reference: ideal point z, T numbers below the losses; default: zeros.
        warmup: None for the paper's formula, or a number of epochs (the authors: 4); `weights` and `reference` then
            have to be None.
        tasks: number of tasks T; only needed with `warmup`.

    Raises:
        TypeError: an option of another kind.
        ValueError: `mu` is not positive, `warmup` is negative, numbers that are not one-dimensional or not finite or
            disagree in length, options that exclude each other, `warmup` without `tasks`.
    """

    preference: Tensor | None
    reference: Tensor | None
    total: Tensor
    count: Tensor
    epochs: Tensor

    def __init__(
        self,
        mu: float = 0.1,
        weights: Tensor | Sequence[float] | str | None = None,
        reference: Tensor | Sequence[float] | None = None,
        warmup: int | None = None,
        tasks: int | None = None,
    ) -> None:
        super().__init__(tasks)
        self.mu = check_number(mu, "mu", positive=True)
        if warmup is not None:
            if not isinstance(warmup, int) or isinstance(warmup, bool):
                raise TypeError(f"warmup: expected an int or None, got {describe(warmup)}")
            if warmup < 0:
                raise ValueError(f"warmup: expected a number of epochs >= 0, got {warmup}")
            if weights is not None or reference is not None:
                raise ValueError("warmup: expected None together with weights or reference, which it has no place for")
            if tasks is None:
                raise ValueError("tasks: expected the number of tasks T, which warmup needs, got None")
        self.warmup = warmup
        preference = None
        if weights is not None and not isinstance(weights, str):
            preference = check_numbers(weights, "weights", self.tasks)
            self.tasks = preference.shape[0]
        elif weights not in (None, "mean", "sum"):
            raise ValueError(f'weights: expected None, "mean", "sum" or T numbers, got {weights!r}')
        self.rule = weights if isinstance(weights, str) else "mean"
        if reference is not None:
            reference = check_numbers(reference, "reference", self.tasks)
            self.tasks = reference.shape[0]
        self.register_buffer("preference", preference, persistent=False)  # options, not state
        self.register_buffer("reference", reference, persistent=False)
        if warmup is not None and tasks is not None:
            self.register_buffer("total", torch.zeros(tasks, dtype=torch.float64))
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))
            self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))

    def reset(self) -> None:
        """Back to the first epoch."""
        if self.warmup is not None:
            for buffer in (self.total, self.count, self.epochs):
                buffer.zero_()

    def epoch(self) -> None:
        """Ends an epoch.

        Raises:
            RuntimeError: there is no warm-up to count epochs for.
        """
        if self.warmup is None:
            raise RuntimeError(f"epoch: {self} has no warm-up and counts no epochs")
        self.epochs += 1

    def _scalarize(self, L: Tensor) -> tuple[Tensor, Tensor]:
        if self.warmup is not None:
            return self._scalarize_logs(L, self.warmup)
        T = L.shape[0]
        if self.preference is not None:
            preference: Tensor | float = self.preference.to(L.dtype)
        else:
            preference = 1.0 if self.rule == "sum" else 1 / T
        y = preference * (L if self.reference is None else L - self.reference.to(L.dtype))
        value, shares = self._smooth_maximum(y)
        return value, shares * preference

    def _scalarize_logs(self, L: Tensor, warmup: int) -> tuple[Tensor, Tensor]:
        T = L.shape[0]
        warm = self.epochs <= warmup
        # While it warms up there is no average yet: whatever stands in for it must be harmless to the gradient.
        average = torch.where(warm, 1.0, self.total / self.count).to(L.dtype)
        logs = L.log()
        value, shares = self._smooth_maximum(logs - average.log())
        return torch.where(warm, logs.sum(), T * value), torch.where(warm, 1.0, T * shares) / L

    def _smooth_maximum(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """μ log Σ exp(y / μ) and its derivative; centred before the division, which could overflow."""
        largest = y.detach().max()
        centred = (y - largest) / self.mu
        return self.mu * centred.logsumexp(0) + largest, centred.softmax(0)

    def _remember(self, L: Tensor, valid: Tensor) -> None:
        if self.warmup is not None:
            averaging = valid & (self.epochs == self.warmup)
            self.total += torch.where(averaging, L, 0.0)
            self.count += averaging

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        if self.warmup is not None:
            return f"mu={self.mu}, warmup={self.warmup}, tasks={self.tasks}"
        weights = repr(self.rule) if self.preference is None else self.preference.tolist()
        reference = None if self.reference is None else self.reference.tolist()
        return f"mu={self.mu}, weights={weights}, reference={reference}, tasks={self.tasks}"
