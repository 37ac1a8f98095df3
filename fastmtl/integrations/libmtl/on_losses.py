"""LibMTL's weightings that look at losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fastmtl import scalarization
from fastmtl.integrations.libmtl.weighting import Weighting, one_by_one
from fastmtl.scalarization import Scalarization

__all__ = ["DWA", "EW", "FAMO", "GLS", "RLW", "STCH", "UW", "GradNorm"]


class EW(Weighting):
    """The plain sum of the losses: `fastmtl.scalarization.LS`."""

    @staticmethod
    def make(tasks: int) -> Scalarization:
        """See the class."""
        return scalarization.LS(weights="sum")


class RLW(Weighting):
    """`fastmtl.scalarization.RLW`; `dist` has LibMTL's names ("Normal", "Uniform", …) or this package's."""

    @staticmethod
    def make(tasks: int, dist: str = "Normal") -> Scalarization:
        """See the class."""
        return scalarization.RLW(distribution=dist.lower())  # type: ignore[arg-type]  # which checks it


class DWA(Weighting):
    """`fastmtl.scalarization.DWA` over the trainer's epochs; `T` is the temperature."""

    _counts_epochs = True

    @staticmethod
    def make(tasks: int, T: float = 2.0) -> Scalarization:
        """See the class."""
        return scalarization.DWA(tasks, temperature=T)


class UW(Weighting):
    """`fastmtl.scalarization.Uncertainty`, starting at LibMTL's -0.5."""

    @staticmethod
    def make(tasks: int) -> Scalarization:
        """See the class."""
        return scalarization.Uncertainty(tasks, initial=-0.5)


class GLS(Weighting):
    """`fastmtl.scalarization.GLS`."""

    @staticmethod
    def make(tasks: int) -> Scalarization:
        """See the class."""
        return scalarization.GLS(tasks)


class STCH(Weighting):
    """`fastmtl.scalarization.STCH` with the authors' warm-up, in the trainer's epochs."""

    _counts_epochs = True

    @staticmethod
    def make(tasks: int, STCH_mu: float = 1.0, STCH_warmup_epoch: int = 4) -> Scalarization:
        """See the class."""
        return scalarization.STCH(mu=STCH_mu, warmup=STCH_warmup_epoch, tasks=tasks)


class FAMO(Weighting):
    """`fastmtl.scalarization.FAMO`.

    The trainer calls `update_w` with the losses after the optimizer's step where the weighting is named FAMO. Under any
    other name it learns in the next step instead, from the losses of the next batch.
    """

    @staticmethod
    def make(tasks: int, FAMO_w_lr: float = 0.025, FAMO_w_gamma: float = 1e-3) -> Scalarization:
        """See the class."""
        return scalarization.FAMO(tasks, lr=FAMO_w_lr, weight_decay=FAMO_w_gamma)

    def init_param(self) -> None:
        """See `Weighting.init_param`."""
        super().init_param()
        self._waiting = False

    def backward(self, losses: Tensor | Sequence[Tensor], **kwargs: Any) -> np.ndarray | None:
        """See `Weighting.backward`."""
        losses = one_by_one(losses)
        if self._waiting:
            self.method.update([loss.detach() for loss in losses])
        weights = super().backward(losses, **kwargs)
        self._waiting = True
        return weights

    def update_w(self, curr_losses: Tensor) -> None:
        """Learns from the losses [T] of the same batch after the step."""
        self._waiting = False
        self.method.update(curr_losses)


class GradNorm(Weighting):
    """`fastmtl.scalarization.GradNorm`.

    It looks at the last weight of the shared parameters, or with `rep_grad=True` at the representation, from the first
    step on, and learns by an optimizer of its own. (LibMTL's begins in the second epoch, takes the norms over all
    shared parameters, and learns a softmax by the trainer's optimizer.)
    """

    @staticmethod
    def make(tasks: int, alpha: float = 1.5, lr: float = 0.025) -> Scalarization:
        """See the class."""
        return scalarization.GradNorm(tasks, alpha=alpha, lr=lr)

    def _total(self, losses: list[Tensor], copies: list[Tensor]) -> Tensor:
        total: Tensor = self.method(losses, copies if self.method.training else None)
        return total
