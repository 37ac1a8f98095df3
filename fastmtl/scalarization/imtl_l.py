"""IMTL-L: the loss balance of Towards Impartial Multi-Task Learning (Liu et al., ICLR 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmtl.inputs import describe
from fastmtl.options import integer, option
from fastmtl.scalarization.base import Scalarization, masked, present

__all__ = ["IMTLL"]


class IMTLL(Scalarization):
    """IMTL-L: Σ_t exp(s_t) L_t - s_t, with learned s; at its optimum all scaled losses exp(s_t) L_t are 1.

    `s` is a parameter: give `parameters()` to the optimizer along with the model's. An absent task's s gets no
    gradient. The losses must not be negative; if one stays zero, its s grows without bound.

    Source: Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang, "Towards Impartial Multi-Task Learning", ICLR 2021.

    Args:
        tasks: number of tasks T.

    Raises:
        TypeError: `tasks` is not an int.
        ValueError: `tasks` is less than 1.
    """

    tasks: int = option(integer(1), fixed=True)

    _positive = False

    def __init__(self, tasks: int) -> None:
        super().__init__(tasks)
        self.s: nn.Parameter = nn.Parameter(torch.zeros(self.tasks))

    @torch.no_grad()
    def reset(self) -> None:
        """Resets s to zero."""
        super().reset()
        self.s.zero_()

    def scaled(self, losses: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The losses exp(s_t) L_t - s_t one by one, for a method that balances their gradients: IMTL with both halves.

            fastmtl.IMTL().backward(scales.scaled(losses))

        Each of them reads its own entry of s, so `backward` does not take s for a shared parameter.

        Args:
            losses: T scalar tensors, None for absent tasks.

        Returns:
            T scalars, None for absent tasks.

        Raises:
            TypeError: `losses` is not a sequence of floating tensors.
            ValueError: not T scalars, or (on the CPU) one that is negative.
        """
        if isinstance(losses, Tensor):  # whose entries would share one graph: each pass would reach all heads
            raise TypeError(f"losses: expected a sequence of T scalar tensors, got {describe(losses)}")
        L, _ = self._stacked(losses)
        self._within(L.detach())
        parts = self._parts(losses)
        return [
            self.s[t].exp() * loss.reshape(()) - self.s[t] if loss is not None and here else None
            for t, (loss, here) in enumerate(zip(parts, present(parts), strict=True))
        ]

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[Tensor, Tensor]:
        w = self.s.exp()
        return masked(w * L - self.s, here).sum(), masked(w, here)

    def _needs(self, t: int) -> str:
        return "a loss >= 0, since s is learned to make exp(s) times it one"

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"tasks={self.tasks}"
