"""TorchJD's weightings whose input is not a Gramian, but a Jacobian [m, n] or J₁ J₂ᵀ [m, m] of two batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchjd import Stateful
from torchjd.aggregation import Weighting

from fastmtl.inputs import describe, has_numbers
from fastmtl.integrations.torchjd import peers
from fastmtl.integrations.torchjd.configured import Configured, argument, naming
from fastmtl.integrations.torchjd.tasks import vector
from fastmtl.options import check_number

__all__ = ["CRMOGMWeighting", "ExcessMTLWeighting", "MoDoWeighting", "SDMGradWeighting"]


class _MatrixWeighting(Configured, Weighting[Tensor], Stateful):
    def __call__(self, matrix: Tensor, /) -> Tensor:
        """The weights [m], through all registered hooks."""
        with torch.no_grad():
            return super().__call__(matrix)

    def reset(self) -> None:
        """Forgets everything: the next step is the first."""
        self.method.reset()


class _CrossWeighting(_MatrixWeighting):
    def forward(self, matrix: Tensor, /) -> Tensor:
        """The weights [m] from J₁ J₂ᵀ [m, m]."""
        if matrix.shape == (0, 0):
            return matrix.new_zeros(0)
        method = self.method
        if method.w is not None and method.w.shape[-1] != matrix.shape[-1]:
            self.reset()
        with naming(self._options):
            alpha: Tensor = method.weighting(matrix.to(torch.float64), matrix.dtype)
        return alpha.to(matrix.dtype)


class MoDoWeighting(_CrossWeighting):
    """`fastmtl.MoDo` as TorchJD's `MoDoWeighting`; another number of tasks resets it.

    Args:
        gamma: step size of the weights.
        rho: weight of ½ ‖w‖².

    Raises:
        TypeError: an argument is not a number.
        ValueError: `gamma` is not positive, `rho` is negative; (in a step) a matrix that is not square.
    """

    _kept = {"w": "_lambda"}  # noqa: RUF012

    gamma: float = argument()
    rho: float = argument()

    def __init__(self, gamma: float = 0.1, rho: float = 0.1) -> None:
        super().__init__(gamma=gamma, rho=rho)

    def _make(self, options: Mapping[str, Any]) -> peers.MoDo:
        return peers.MoDo(**options)


class SDMGradWeighting(_CrossWeighting):
    """`fastmtl.SDMGrad` as TorchJD's `SDMGradWeighting`; another number of tasks resets it.

    Args:
        lr: step size of the weights.
        momentum: of the steps.
        n_iter: how many steps a call makes.
        lambda_: how much the preferred direction counts.
        pref_vector: weights [m] of the preferred direction; None for 1/m each.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an argument out of its range; (in a step) a matrix that is not square, a `pref_vector` of another
            length than m.
    """

    _kept = {"w": "_w"}  # noqa: RUF012

    lr: float = argument()
    momentum: float = argument()
    n_iter: int = argument()
    lambda_: float = argument()
    pref_vector: Tensor | None = argument(vector)

    def __init__(
        self,
        lr: float = 10.0,
        momentum: float = 0.5,
        n_iter: int = 20,
        lambda_: float = 0.3,
        pref_vector: Tensor | None = None,
    ) -> None:
        super().__init__(lr=lr, momentum=momentum, n_iter=n_iter, lambda_=lambda_, pref_vector=pref_vector)

    def _make(self, options: Mapping[str, Any]) -> peers.SDMGrad:
        return peers.SDMGrad(
            lam=options["lambda_"],
            weights=options["pref_vector"],
            lr=options["lr"],
            momentum=options["momentum"],
            iterations=options["n_iter"],
        )


class ExcessMTLWeighting(_MatrixWeighting):
    """`fastmtl.ExcessMTL` as TorchJD's `ExcessMTLWeighting`, from a Jacobian [m, n]; another shape resets it.

    Args:
        robust_step_size: step size of the weights.
        n_warmup_steps: how many steps only collect risks.

    Raises:
        TypeError: an argument of another kind.
        ValueError: `robust_step_size` is not positive, `n_warmup_steps` is negative.
    """

    robust_step_size: float = argument()
    n_warmup_steps: int = argument()

    def __init__(self, robust_step_size: float = 1.0, n_warmup_steps: int = 0) -> None:
        super().__init__(robust_step_size=robust_step_size, n_warmup_steps=n_warmup_steps)

    def _make(self, options: Mapping[str, Any]) -> peers.ExcessMTL:
        return peers.ExcessMTL(step_size=options["robust_step_size"], warmup=options["n_warmup_steps"])

    def forward(self, matrix: Tensor, /) -> Tensor:
        """The weights [m]."""
        if matrix.ndim == 2 and not matrix.shape[0]:
            return matrix.new_zeros(0)
        method = self.method
        if method.squares is not None and method.squares.shape != matrix.shape:
            self.reset()
        alpha: Tensor = method.weighting(matrix.detach())
        return alpha.to(matrix.dtype)


class CRMOGMWeighting(Weighting[Tensor], Stateful):
    """A moving average of another weighting's weights, as TorchJD's `CRMOGMWeighting`.

    Weights that are not finite are returned as they are, and leave the average as it was.

    Args:
        weighting: any weighting, from here or from TorchJD.
        alpha: how much of the average is kept, in [0, 1].
        initial_weights: the average at the start, [m]; None for the first weights.

    Raises:
        TypeError: `weighting` is not a weighting, or another argument is of another kind.
        ValueError: `alpha` is outside [0, 1]; (in a step) `initial_weights` of another length than m, another number
            of tasks than before.
    """

    _lambda: Tensor | None

    def __init__(self, weighting: Weighting[Any], alpha: float = 0.9, initial_weights: Tensor | None = None) -> None:
        super().__init__()
        if not isinstance(weighting, Weighting):
            raise TypeError(f"weighting: expected a torchjd.aggregation.Weighting, got {describe(weighting)}")
        self.weighting = weighting
        self.alpha = alpha
        self._initial_weights = vector(initial_weights, "initial_weights")
        self.register_buffer("_lambda", None)

    @property
    def alpha(self) -> float:
        """How much of the average is kept."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._alpha = float(check_number(value, "alpha", low=0, high=1) or 0)

    def reset(self) -> None:
        """Forgets the average, and resets the other weighting."""
        if isinstance(self.weighting, Stateful):
            self.weighting.reset()
        self._lambda = None

    def forward(self, stat: Tensor, /) -> Tensor:
        """The averaged weights [m]."""
        weights = self.weighting(stat)
        before = self._lambda
        if before is None:
            before = weights if self._initial_weights is None else self._initial_weights.to(weights)
        if before.shape != weights.shape:
            name, rest = ("initial_weights", "") if self._lambda is None else ("weighting", "; reset() begins anew")
            raise ValueError(f"{name}: expected {len(before)} weights for every step, got {len(weights)}{rest}")
        before = before.to(weights)
        mixed = self._alpha * before + (1 - self._alpha) * weights
        fixed = mixed.detach()
        if has_numbers(fixed) and math.isfinite(sum(fixed.tolist())):
            self._lambda = mixed
            return mixed
        # A non-finite first step leaves NaN here, which the next finite one replaces; the host does not wait.
        known = before.detach().isfinite().all()
        mixed = torch.where(known, mixed, weights)
        self._lambda = torch.where(weights.detach().isfinite().all(), mixed, before)
        return mixed

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        value = state_dict.get(f"{prefix}_lambda")
        self._lambda = None if value is None else value.detach().clone()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
