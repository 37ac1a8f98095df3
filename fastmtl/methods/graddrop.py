"""GradDrop: Just Pick a Sign (Chen et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl import ops, options
from fastmtl.info import Info
from fastmtl.methods.base import Method
from fastmtl.options import option
from fastmtl.rule import Context, draw_seed

__all__ = ["GradDrop"]


def _checked_leak(leak: object, name: str) -> float | Tensor:
    what, shape = "a number, T numbers or None", "one number or shape [T]"
    return 0.0 if leak is None else options.fractions(leak, name, what, shape)


class GradDrop(Method):
    """GradDrop: in every coordinate, sums only the gradients of one sign.

    The sign is drawn at random: positive with probability P = ½ (1 + Σ_t g_t / Σ_t |g_t|), the sign purity of the
    coordinate. Gradients of the other sign are scaled by ℓ_t, the leak of task t (Chen et al. 2020, Algorithm 1,
    applied to the parameters' gradients):

        g = Σ_t (ℓ_t + (1 - ℓ_t) [g_t has the drawn sign]) g_t

    It works on the gradients, not on their Gram matrix, so `info` is empty. It takes one pass over them, in float64.
    The draws depend only on the state of the generator, not on the number of threads or the device's blocks.

    Args:
        leak: ℓ, one number in [0, 1] for all tasks, or T of them (a tensor [T], an array or a sequence). None is 0, the
            authors' default; 1 gives the sum of the gradients.
        generator: source of randomness, on the gradients' device; default: torch's global one there.

    Raises:
        TypeError: `leak` or `generator` of another kind.
        ValueError: `leak` is not within [0, 1] or not one-dimensional.
    """

    leak: float | Tensor = option(_checked_leak)
    generator: torch.Generator | None = option(options.generator)

    def __init__(
        self, *, leak: float | options.Numbers | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.leak = leak  # type: ignore[assignment]
        self.generator = generator
        self._copies = options.Copies()

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"leak={options.show_weights(self.leak)}" if isinstance(self.leak, Tensor) or self.leak else ""

    def check_tasks(self, T: int) -> None:
        options.check_weights(self.leak, T, "leak")

    def aggregate_matrix(self, G: Tensor, out: Tensor, context: Context) -> None:
        ops.sign_drop(G, draw_seed(G, self.generator, context), self._task_leak(G.shape[-2], G), out)

    def aggregate_list(
        self, grads: Sequence[Tensor | None], T: int, dtype: torch.dtype, out: list[Tensor], context: Context
    ) -> Info:
        ops.sign_drop_rows(grads, T, draw_seed(out[0], self.generator, context), self._task_leak(T, out[0]), out)
        return Info.of()

    def _task_leak(self, T: int, like: Tensor) -> Tensor | None:
        """The leaks [T] for the ops, on the device of `like`; None if nothing leaks."""
        if isinstance(self.leak, float):
            return like.new_full((T,), self.leak, dtype=torch.float64) if self.leak else None
        self.check_tasks(T)
        return self._copies.get(self.leak, like)
