"""CR-MOGM: On the Convergence of Stochastic Multi-Objective Gradient Manipulation (Zhou et al., NeurIPS 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.info import Info
from fastmtl.inputs import describe
from fastmtl.methods.base import GramMethod
from fastmtl.methods.mgda import MGDA
from fastmtl.methods.state import StatefulMethod
from fastmtl.ops.reference.present import is_present
from fastmtl.options import number, option
from fastmtl.rule import NOTHING, Context

__all__ = ["CRMOGM"]


class CRMOGM(StatefulMethod):
    """CR-MOGM: the weights of another method, averaged over steps so that they depend less on a single batch.

        λ_k = m λ_{k-1} + (1 - m) λ̂_k        g = λ_kᵀ G        λ̂_k the other method's weights

    A task's λ starts as λ̂ of its first step. The paper lets m grow from near 0 towards 1 as the learning rate falls:
    `method.momentum = 1 - lr / first_lr`. An absent task keeps its λ.

    `info` has `alpha` and `gram`, and the other method's `residual`.

    Source: Zhou, Zhang, Jiang, Zhong, Gu, Zhu, "On the Convergence of Stochastic Multi-Objective Gradient Manipulation
    and Beyond", NeurIPS 2022, Algorithm 1.

    Args:
        method: a method on the Gram matrix; None for `MGDA()`. It becomes part of this one, with its state.
        momentum: m, in [0, 1]; the default is TorchJD's.

    Raises:
        TypeError: `method` is not a method on the Gram matrix, `momentum` is not a number.
        ValueError: `momentum` is outside [0, 1].
    """

    remembers = True
    average: Tensor  # λ, float64 [T] or [B, T]
    known: Tensor  # which tasks have a λ, bool

    momentum: float = option(number(low=0, high=1))

    def __init__(self, *, method: GramMethod | None = None, momentum: float = 0.9) -> None:
        super().__init__("average", "known")
        method = MGDA() if method is None else method
        if not isinstance(method, GramMethod):
            raise TypeError(f"method: expected a method on the Gram matrix or None, got {describe(method)}")
        self.inner = method
        self.momentum = momentum

    @property
    def method(self) -> GramMethod:
        """The other method."""
        return self.inner

    @method.setter
    def method(self, value: object) -> None:
        raise AttributeError(f"method: expected to stay {self.inner!r}, which the state depends on: make a new one")

    @property
    def needs_losses(self) -> bool:  # type: ignore[override]
        return self.inner.needs_losses

    def reset(self) -> None:
        """Returns to the state of a new instance, and resets the other method too."""
        super().reset()
        self.inner.reset()

    def check_tasks(self, T: int) -> None:
        self.inner.check_tasks(T)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"method={self.inner!r}, momentum={self.momentum}"

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        info = self.inner.solve(M, dtype, context)
        average = self._kept("average", M.shape[:-1], torch.float64, M.device)
        known = self._kept("known", M.shape[:-1], torch.bool, M.device)
        alpha = info.alpha.to(torch.float64)
        finite = alpha.isfinite().all(-1, keepdim=True)
        there = is_present(M)
        mixed = torch.where(known, self.momentum * average + (1 - self.momentum) * alpha, alpha)
        average.copy_(torch.where(finite & there, mixed, average))
        known.logical_or_(finite & there)
        mixed = torch.where(there, mixed, 0.0)
        return Info.of(torch.where(finite, mixed, torch.nan), M, residual=info.residual)
