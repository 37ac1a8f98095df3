"""A projector onto the dual cone for TorchJD's aggregators, by this package's solver.

from torchjd.aggregation import UPGrad
from fastmtl.integrations.torchjd.linalg import ActiveSetProjector

aggregator = UPGrad(projector=ActiveSetProjector())
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from torchjd.linalg import DualConeProjector, QuadprogProjector

from fastmtl import ops
from fastmtl.inputs import describe
from fastmtl.options import check_number

__all__ = ["ActiveSetProjector", "ridge_of"]

_DEFAULTS = {name: p.default for name, p in inspect.signature(QuadprogProjector).parameters.items()}


class ActiveSetProjector(DualConeProjector):
    """Projects like TorchJD's `QuadprogProjector`, but exactly and on the Gramian's device: on a GPU without the host.

    It needs neither quadprog nor NumPy, and computes in float64.

    Args:
        norm_eps: no effect: short gradients are projected like long ones.
        reg_eps: added to the diagonal of the Gramian, relative to its trace; TorchJD's default is 1e-4. With 0,
            projections are exact.

    Raises:
        TypeError: an argument is not a number.
        ValueError: one is negative or not finite.
    """

    def __init__(self, *, norm_eps: float = _DEFAULTS["norm_eps"], reg_eps: float = _DEFAULTS["reg_eps"]) -> None:
        self.norm_eps = norm_eps
        self.reg_eps = reg_eps

    @property
    def norm_eps(self) -> float:
        """No effect."""
        return self._norm_eps

    @norm_eps.setter
    def norm_eps(self, value: float) -> None:
        self._norm_eps = float(check_number(value, "norm_eps", low=0) or 0)

    @property
    def reg_eps(self) -> float:
        """What is added to the diagonal, relative to the trace."""
        return self._reg_eps

    @reg_eps.setter
    def reg_eps(self, value: float) -> None:
        self._reg_eps = float(check_number(value, "reg_eps", low=0) or 0)

    def __call__(self, U: Tensor, G: Tensor) -> Tensor:
        """The weights w [..., m] of the projections of Jᵀu: the w >= u with the smallest wᵀ G w.

        Args:
            U: weights u of the vectors to project, [..., m].
            G: the Gramian [m, m] of the Jacobian J.

        Raises:
            ValueError: shapes that do not fit together.
        """
        m = G.shape[-1]
        if G.ndim != 2 or G.shape[0] != m or not U.ndim or U.shape[-1] != m:
            raise ValueError(
                f"U: expected shape [..., m] with a Gramian of shape [m, m], got {describe(U)}, {describe(G)}"
            )
        if not m:
            return U.clone()
        M = G.detach().to(torch.float64)
        M = M + self.reg_eps * M.diagonal().sum() * torch.eye(m, dtype=M.dtype, device=M.device)
        rows = U.detach().to(torch.float64).reshape(-1, m)
        # A zero row of the Gramian is in no conflict: its weight stays.
        zero = M.diagonal() == 0
        solved = [torch.where(zero, u, ops.dual_cone(M, u.contiguous(), False)[0]) for u in rows]
        w = torch.stack(solved) if solved else rows
        return w.reshape(U.shape).to(G.dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(norm_eps={self.norm_eps}, reg_eps={self.reg_eps})"


def ridge_of(projector: DualConeProjector) -> float | None:
    """What a projector of a known kind adds to the diagonal; None for other kinds."""
    if type(projector) in (QuadprogProjector, ActiveSetProjector):
        return float(projector.reg_eps)  # type: ignore[attr-defined]
    return None
