"""LibMTL's weightings that look at losses."""

from __future__ import annotations

from torch import Tensor

from fastmtl import scalarization
from fastmtl.integrations.libmtl.weighting import Weighting
from fastmtl.scalarization import Scalarization

__all__ = ["DWA", "EW", "FAMO", "GLS", "RLW", "STCH", "UW"]


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
    """`fastmtl.scalarization.FAMO`; the trainer calls `update_w` with the losses after the optimizer's step."""

    @staticmethod
    def make(tasks: int, FAMO_w_lr: float = 0.025, FAMO_w_gamma: float = 1e-3) -> Scalarization:
        """See the class."""
        return scalarization.FAMO(tasks, lr=FAMO_w_lr, weight_decay=FAMO_w_gamma)

    def update_w(self, curr_losses: Tensor) -> None:
        """Learns from the losses [T] of the same batch after the step."""
        self.method.update(curr_losses)
