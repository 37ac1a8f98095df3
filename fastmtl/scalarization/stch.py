"""Smooth Tchebycheff scalarization (Lin et al., ICML 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmtl import options
from fastmtl.options import Numbers, Weights, integer, number, numbers, option, show_weights
from fastmtl.scalarization.base import Derivative, Scalarization, masked, number_of

__all__ = ["STCH"]


class STCH(Scalarization):
    """Smooth Tchebycheff scalarization: a smooth maximum of the weighted losses.

        μ log Σ_t exp(λ_t (L_t - z_t) / μ)

    It lies between max_t λ_t (L_t - z_t) and that maximum plus μ log T. With `warmup=` it follows the authors' code for
    deep multi-task learning: Σ_t log L_t for `warmup` epochs and one more, whose average losses become n_t; after that

        T μ log Σ_t exp(log(L_t / n_t) / μ)

    The user calls `end_epoch()` after every epoch; with a warm-up the losses must be positive. If a task has no loss in
    the averaged epoch, its next loss becomes n_t. T is the number of tasks present.

    Source: Lin, Zhang, Yang, Liu, Wang, Zhang, "Smooth Tchebycheff Scalarization for Multi-Objective Optimization",
    ICML 2024, and the authors' code.

    Args:
        tasks: number of tasks T; only needed with `warmup`.
        mu: smoothing μ; the smaller, the closer to the maximum. The paper tries 0.01 to 1; the authors' code uses 1
            with a warm-up.
        weights: preferences λ: None or "mean" for 1/T each, "sum" for ones, or T numbers.
        reference: ideal point z, T numbers below the losses; default: zeros.
        warmup: None for the paper's formula, or a number of epochs (the authors: 4); `weights` and `reference` then
            have to be None.

    Raises:
        TypeError: an option of another kind.
        ValueError: `mu` is not positive, `warmup` is negative, numbers that are not one-dimensional or not finite or
            disagree in length, options that exclude each other, `warmup` without `tasks`.
    """

    total: Tensor  # of the losses that are averaged, [T]
    count: Tensor  # how many those are, [T]
    epochs: Tensor  # []
    mu: float = option(number(above=0))
    warmup: int | None = option(integer(0, optional=True), fixed=True)
    weights: Tensor | str = option(options.weights, fixed=True)
    reference: Tensor | None = option(lambda x, name: None if x is None else numbers(x, name), fixed=True)

    _one_node = True

    def __init__(
        self,
        tasks: int | None = None,
        *,
        mu: float = 0.1,
        weights: Weights = None,
        reference: Numbers | None = None,
        warmup: int | None = None,
    ) -> None:
        given_weights = options.weights(weights, "weights")
        lengths = {"tasks": integer(1, optional=True)(tasks, "tasks")}
        for name, given in (("weights", given_weights), ("reference", reference)):
            if given is not None and not isinstance(given, str):
                expected = next((n for n in lengths.values() if n is not None), None)
                lengths[name] = numbers(given, name, tasks=expected).shape[0]
        super().__init__(next((n for n in lengths.values() if n is not None), None))
        self.mu = mu
        self.warmup = warmup
        self.weights = weights  # type: ignore[assignment]
        self.reference = reference  # type: ignore[assignment]
        self._copies = options.Copies()
        if warmup is None:
            return
        if weights is not None or reference is not None:
            raise ValueError(f"warmup: expected None where weights or reference is given, got {warmup}")
        if self.tasks is None:
            raise ValueError("tasks: expected the number of tasks T, which warmup needs, got None")
        self.register_buffer("total", torch.zeros(self.tasks, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(self.tasks, dtype=torch.int64))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))

    def reset(self) -> None:
        """Returns to the first epoch."""
        super().reset()
        if self.warmup is not None:
            for buffer in (self.total, self.count, self.epochs):
                buffer.zero_()

    def end_epoch(self) -> None:
        """Ends an epoch, which the warm-up counts."""
        if self.warmup is not None:
            self.epochs.add_(1)

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[Tensor, Derivative]:
        if self.warmup is not None:
            return self._scalarize_logs(L, here, self.warmup)
        if isinstance(self.weights, str):
            preference: Tensor | float = 1.0 if self.weights == "sum" else 1 / L.shape[0]
        else:
            preference = self._copies.get(self.weights, L).to(L.dtype)
        z = None if self.reference is None else self._copies.get(self.reference, L).to(L.dtype)
        value, shares = self._smooth_maximum(preference * (L if z is None else L - z), here)
        return value, lambda L: shares(preference * (L if z is None else L - z)) * preference

    def _scalarize_logs(self, L: Tensor, here: Tensor | None, warmup: int) -> tuple[Tensor, Derivative]:
        n = number_of(L, here)
        warm = self.epochs <= warmup
        # Where there is no average yet, whatever stands in for it must be harmless to the gradient.
        average = torch.where(self.count > 0, self.total / self.count, L.detach()).to(L.dtype)
        start = torch.where(warm, 1.0, average).log()
        logs = L.log()
        value, shares = self._smooth_maximum(logs - start, here)

        def derivative(L: Tensor) -> Tensor:
            return masked(torch.where(warm, 1.0, n * shares(L.log() - start)) / L, here)

        return torch.where(warm, masked(logs, here).sum(), n * value), derivative

    def _smooth_maximum(self, y: Tensor, here: Tensor | None) -> tuple[Tensor, Derivative]:
        """μ log Σ exp(y / μ), and its derivative; y is centred before the division, which could otherwise overflow."""
        y, mu = masked(y, here, -math.inf), self.mu
        largest = y.detach().max()
        value = mu * ((y - largest) / mu).logsumexp(0) + largest
        return value, lambda y: ((masked(y, here, -math.inf) - largest) / mu).softmax(0)

    def _remember(self, L: Tensor, valid: Tensor | None) -> None:
        if self.warmup is not None:
            averaged = (self.epochs == self.warmup) | ((self.epochs > self.warmup) & (self.count == 0))
            averaged = averaged if valid is None else averaged & valid
            self.total.add_(torch.where(averaged, L, 0.0))
            self.count.add_(averaged)

    @property
    def _positive(self) -> bool | None:  # type: ignore[override]
        return None if self.warmup is None else True

    def _needs(self, t: int) -> str:
        return "a loss > 0, since with warmup= STCH takes logarithms"

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        if self.warmup is not None:
            return f"mu={self.mu}, warmup={self.warmup}, tasks={self.tasks}"
        weights, reference = show_weights(self.weights), show_weights(self.reference)
        return f"mu={self.mu}, weights={weights}, reference={reference}, tasks={self.tasks}"
