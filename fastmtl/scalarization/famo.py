"""FAMO: Fast Adaptive Multitask Optimization (Liu et al., NeurIPS 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastmtl import options
from fastmtl.inputs import has_numbers
from fastmtl.losses import Losses
from fastmtl.options import Numbers, integer, number, numbers, option
from fastmtl.rule import checked_scale
from fastmtl.scalarization.adam import Adam
from fastmtl.scalarization.base import Derivative, Scalarization, divided, masked

__all__ = ["FAMO"]

_EPS = 1e-8  # added to the losses, as the authors do


class FAMO(Scalarization):
    """FAMO: decreases all losses at an equal rate, with weights learned from the losses alone.

        c Σ_t z_t log D_t        z = softmax(ξ)        D = L - b + 1e-8        1/c = Σ_t z_t / D_t

    z and c are constants in the derivative, so the task weights c z_t / D_t sum to one. ξ is learned in `update`, from
    the change of the losses in the model's step:

        δ_t = log D_t(before) - log D_t(after)        ξ: an Adam step along z ∘ (δ - zᵀδ) + γ ξ

    A training step evaluates the losses of the same batch once more:

        famo.backward(losses(batch)); optimizer.step()
        with torch.no_grad():
            famo.update(losses(batch))

    To avoid that evaluation, use the next batch's losses instead, at the price of noise in δ:

        current = losses(batch); famo.update(current); famo.backward(current); optimizer.step()

    The authors clip the norm of the shared parameters' gradient at 1 before the step (`clip_grad_norm_`).

    Source: Liu, Feng, Stone, Liu, "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023, Eq. 10 to 12, and the
    authors' code.

    Args:
        tasks: number of tasks T.
        lr: Adam's learning rate for ξ.
        weight_decay: γ, Adam's weight decay: 0.001 as in the paper (0.01 there for CityScapes and in the code).
        min_losses: lower bounds b, T numbers; default: zeros. Losses must not fall below them.

    Raises:
        TypeError: `tasks` is not an int, another option is not a number.
        ValueError: `tasks` is less than 1, `lr` or `weight_decay` is negative, `min_losses` is not of shape [T].
    """

    logits: Tensor  # ξ
    previous: Tensor  # the losses that `update` compares with; NaN where there are none
    tasks: int = option(integer(1), fixed=True)
    lr: float = option(number(low=0))
    weight_decay: float = option(number(low=0))
    min_losses: Tensor = option(numbers, fixed=True)

    _one_node = True

    def __init__(
        self,
        tasks: int,
        *,
        lr: float = 0.025,
        weight_decay: float = 1e-3,
        min_losses: Numbers | None = None,
    ) -> None:
        super().__init__(tasks)
        self.lr = lr
        self.weight_decay = weight_decay
        self.min_losses = numbers(
            [0.0] * self.tasks if min_losses is None else min_losses, "min_losses", tasks=self.tasks
        )
        self._copies = options.Copies()
        self.register_buffer("logits", torch.zeros(self.tasks, dtype=torch.float64))
        self.register_buffer("previous", torch.full((self.tasks,), math.nan, dtype=torch.float64))
        self.adam: Adam = Adam(self.tasks)

    def reset(self) -> None:
        """Returns to equal weights; forgets the losses and Adam's state."""
        super().reset()
        self.logits.zero_()
        self.previous.fill_(math.nan)
        self.adam.reset()

    def after_step(self, losses: Callable[[], Losses]) -> None:
        """`update(losses())`."""
        self.update(losses())

    @torch.no_grad()
    def update(self, losses: Losses, *, grad_scale: Tensor | float | None = None) -> None:
        """Learns from the change of the losses since the last call; only the first update after a call counts.

        Args:
            losses: the T losses after the model's step, as in `forward`. A task that was absent in either call learns
                nothing.
            grad_scale: the factor S by which these losses are scaled.

        Raises:
            TypeError: as `forward`.
            ValueError: as `forward`.
        """
        L, here = self._stacked(losses)
        L = divided(L, checked_scale(grad_scale))
        both = known = None
        numbers: list[float] | None = L.tolist() if here is None and has_numbers(L) else None
        change = self._above(self.previous).log() - self._above(L).log()
        # NaN before the first call and after an update: there is nothing to compare with.
        if numbers is None or not self._inside(numbers) or not math.isfinite(sum(numbers) + change.sum().item()):
            self._within(L, here)
            both = masked(~self.previous.isnan(), here, False)
            change = torch.where(both, change, 0.0)
            known = both & change.isfinite().all()
        z = masked(self.logits, both, -math.inf).softmax(0)
        self.logits.copy_(self.adam.step(self.logits, z * (change - z @ change), known, self.lr, self.weight_decay))
        if known is None:
            self.previous.fill_(math.nan)
        else:
            self.previous.masked_fill_(known.any(), math.nan)

    def _above(self, L: Tensor) -> Tensor:
        return L.to(torch.float64) - self._copies.get(self.min_losses, L) + _EPS

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[Tensor, Derivative]:
        D, z = self._above(L), masked(self.logits, here, -math.inf).softmax(0)
        shares = z / (z / D.detach()).sum()
        value = masked(shares * D.log(), here).sum()
        return value.to(L.dtype), lambda L: masked(shares / self._above(L), here).to(L.dtype)

    def _remember(self, L: Tensor, valid: Tensor | None) -> None:
        # An absent task has no loss in this call, whatever it had before.
        if valid is not None:
            L = torch.where(valid, L, torch.where(valid.any(), math.nan, self.previous))
        self.previous.copy_(L)

    def _inside(self, numbers: list[float]) -> bool:
        highest: float = max(self.min_losses.tolist())
        return min(numbers) - highest + _EPS > 0

    def _outside(self, L: Tensor) -> Tensor:
        return self._above(L) <= 0

    def _needs(self, t: int) -> str:
        return f"a loss >= {self.min_losses[t].item():g}, its bound in min_losses, since FAMO takes logarithms"

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return (
            f"tasks={self.tasks}, lr={self.lr}, weight_decay={self.weight_decay}, min_losses={self.min_losses.tolist()}"
        )
