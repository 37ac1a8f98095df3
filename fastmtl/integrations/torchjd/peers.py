"""Methods of `fastmtl` that treat zero rows as TorchJD does.

In `fastmtl`, a task whose gradient is zero is absent. In TorchJD it is a task like any other: these methods give it the
same weight as TorchJD's, which matters if a loss has gradients that the Gramian [m, m] does not contain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmtl import methods
from fastmtl.info import Info
from fastmtl.inputs import has_numbers
from fastmtl.methods.memory import Pieces
from fastmtl.rule import NOTHING, Context

__all__ = [
    "MGDA",
    "PCD",
    "CAGrad",
    "DualProj",
    "ExcessMTL",
    "FairGrad",
    "GradVac",
    "Krum",
    "MoDo",
    "NashMTL",
    "PCGrad",
    "SDMGrad",
    "TrimmedMean",
    "UPGrad",
]


def _zero_rows(M: Tensor) -> Tensor:
    return M.diagonal(dim1=-2, dim2=-1) == 0


class _Peer:
    """Mixed into a method: adapts its weights α [..., m] where rows are zero."""

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        info: Info = super().solve(M, dtype, context)  # type: ignore[misc]
        info.alpha = self._with_zero_rows(info.alpha, _zero_rows(M))
        return info

    def _with_zero_rows(self, alpha: Tensor, zero: Tensor) -> Tensor:
        raise NotImplementedError


class CAGrad(_Peer, methods.CAGrad):
    """A zero row makes all weights zero, since g_w is zero."""

    def _with_zero_rows(self, alpha: Tensor, zero: Tensor) -> Tensor:
        return alpha * ~zero.any(-1, keepdim=True)


class FairGrad(_Peer, methods.FairGrad):
    """A zero row has weight 0, except with fairness 0, the mean."""

    def _with_zero_rows(self, alpha: Tensor, zero: Tensor) -> Tensor:
        return alpha if self.fairness else alpha + zero / zero.shape[-1]


class MGDA(_Peer, methods.MGDA):
    """The first zero row is the shortest vector and gets all the weight."""

    def _with_zero_rows(self, alpha: Tensor, zero: Tensor) -> Tensor:
        first = zero & (zero.cumsum(-1) == 1)
        return alpha * ~zero.any(-1, keepdim=True) + first


class _Conflicts(_Peer):
    def _with_zero_rows(self, alpha: Tensor, zero: Tensor) -> Tensor:
        return alpha + zero


class PCGrad(_Conflicts, methods.PCGrad):
    """A zero row is in conflict with nothing: its weight is 1."""


class GradVac(_Conflicts, methods.GradVac):
    """A zero row is in conflict with nothing: its weight is 1."""


class _Projected(_Peer):
    def _with_zero_rows(self, alpha: Tensor, zero: Tensor) -> Tensor:
        m = zero.shape[-1]
        preferred = self.weights  # type: ignore[attr-defined]
        return alpha + zero * (preferred.to(alpha) if isinstance(preferred, Tensor) else 1 / m)


class UPGrad(_Projected, methods.UPGrad):
    """A zero row keeps its preferred weight."""


class DualProj(_Projected, methods.DualProj):
    """A zero row keeps its preferred weight."""


class Krum(methods.Krum):
    """A zero row is a point like any other."""

    def _is_there(self, square: float) -> bool:
        return True

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        """The weights: see `Rule.solve`."""
        if M.ndim == 2 and has_numbers(M) and min(M.diagonal().tolist()) > 0:
            return super().solve(M, dtype, context)
        # An extra parameter on which all rows depend alike changes no distance, and leaves no zero row.
        squares, zero = M.diagonal(dim1=-2, dim2=-1), _zero_rows(M)
        shortest = torch.where(zero, torch.inf, squares).amin(-1, keepdim=True)
        added = zero.any(-1, keepdim=True) * torch.where(zero.all(-1, keepdim=True), 1.0, shortest)
        return super().solve(M + added[..., None], dtype, context)


class NashMTL(methods.NashMTL):
    """A zero row leaves the weights unchanged, initially ones: TorchJD's solver fails on it."""

    remembers = True
    _first = 1.0

    def _solvable(self, M: Tensor) -> Tensor:
        return super()._solvable(M) & ~_zero_rows(M).any(-1)


class PCD(methods.PCD):
    """A zero row counts in the averages."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.steps is not None and not self.steps.ndim:  # from TorchJD, one number for all tasks
            self.steps = self.steps.expand_as(self.mean).clone()

    def _counted(self, M: Tensor) -> Tensor:
        return torch.ones_like(_zero_rows(M))


class _All:
    """Mixed into a method on matrices: all rows are present."""

    def _there(self, M: Tensor) -> None:
        pass


class MoDo(_All, methods.MoDo):
    """A zero row is a task like others."""


class SDMGrad(_All, methods.SDMGrad):
    """A zero row is a task like others."""


class ExcessMTL(methods.ExcessMTL):
    """A zero row is a task like others, whose excess risk is zero."""

    def _present(self, M: Tensor) -> tuple[Tensor, Tensor]:
        there, finite = super()._present(M)
        return torch.ones_like(there), finite


class TrimmedMean(methods.TrimmedMean):
    """A zero row has entries like others."""

    def _there(self, G: Pieces) -> Tensor:
        return torch.ones((*G.batch, G.T), dtype=torch.bool, device=G.out[0].device)
