"""Weights of the rows of a Jacobian [m, n], from its Gramian [m, m]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchjd import Stateful
from torchjd.aggregation import Weighting
from torchjd.linalg import DualConeProjector

from fastmtl import methods
from fastmtl.inputs import describe
from fastmtl.integrations.torchjd import peers
from fastmtl.integrations.torchjd.configured import Configured, argument, at_least, naming, positive
from fastmtl.integrations.torchjd.linalg import ActiveSetProjector, ridge_of
from fastmtl.integrations.torchjd.tasks import ConstantWeighting, MeanWeighting, vector
from fastmtl.methods.aligned import RankRule, Scale
from fastmtl.methods.base import GramMethod
from fastmtl.options import integer

__all__ = [
    "AlignedMTLWeighting",
    "CAGradWeighting",
    "ConFIGWeighting",
    "DualProjWeighting",
    "FairGradWeighting",
    "GradVacWeighting",
    "GramWeighting",
    "IMTLGWeighting",
    "KrumWeighting",
    "MGDAWeighting",
    "NashMTLWeighting",
    "PCDWeighting",
    "PCGradWeighting",
    "StatefulWeighting",
    "UPGradWeighting",
]


class GramWeighting(Configured, Weighting[Tensor]):
    """Weights from a Gramian [m, m], in its dtype."""

    _differentiable: ClassVar[bool] = False  # whether TorchJD's is: a derivative must not get lost silently

    def __call__(self, gramian: Tensor, /) -> Tensor:
        """The weights [m], through all registered hooks."""
        with torch.set_grad_enabled(self._differentiable and torch.is_grad_enabled()):
            return super().__call__(gramian)

    def forward(self, gramian: Tensor, /) -> Tensor:
        """The weights [m]."""
        if gramian.shape == (0, 0):
            self.method.check_tasks(0)
            return gramian.new_zeros(0)
        # Aggregators compute the Gramian in float64, and note the gradients' dtype on it.
        of = getattr(gramian, "gradients_dtype", gramian.dtype)
        with naming(self._options):
            return self._weights(gramian, of).to(gramian.dtype)

    def _weights(self, gramian: Tensor, dtype: torch.dtype) -> Tensor:
        alpha: Tensor = self.method.weighting(gramian.to(torch.float64), dtype)
        return alpha


class StatefulWeighting(GramWeighting, Stateful):
    """Weights that depend on earlier steps; another number of tasks resets them."""

    def reset(self) -> None:
        """Forgets everything: the next step is the first."""
        self.method.reset()

    def _weights(self, gramian: Tensor, dtype: torch.dtype) -> Tensor:
        m = gramian.shape[-1]
        if any(x is not None and x.ndim and x.shape[-1] != m for x in self.method.buffers()):
            self.reset()
        return super()._weights(gramian, dtype)


class Preferring(Configured):
    """With a preference vector, which is available as a weighting too."""

    pref_vector: Tensor | None

    @property
    def weighting(self) -> ConstantWeighting | MeanWeighting:
        """The weighting that gives the preference vector."""
        return MeanWeighting() if self.pref_vector is None else ConstantWeighting(self.pref_vector)


def _projector_or_ours(value: Any, name: str) -> DualConeProjector:
    """The projector, or ours for None."""
    if value is not None and not isinstance(value, DualConeProjector):
        raise TypeError(f"{name}: expected a torchjd.linalg.DualConeProjector or None, got {describe(value)}")
    return ActiveSetProjector() if value is None else value


class Projecting(Preferring, GramWeighting):
    """Weights from projections onto the dual cone."""

    _each: ClassVar[bool]  # whether each row is projected, or their sum
    pref_vector: Tensor | None = argument(vector)
    projector: Any = argument(_projector_or_ours)

    def __init__(self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None) -> None:
        super().__init__(pref_vector=pref_vector, projector=projector)

    def _weights(self, gramian: Tensor, dtype: torch.dtype) -> Tensor:
        if ridge_of(self.projector) is not None:
            return super()._weights(gramian, dtype)
        # A projector of unknown kind may project onto another cone.
        preferred = self.weighting(gramian).to(gramian.dtype)
        U = torch.diag(preferred) if self._each else preferred
        projected: Tensor = self.projector(U, gramian)
        return projected.sum(0) if projected.ndim == 2 else projected


def _ridge(projector: DualConeProjector) -> float:
    return ridge_of(projector) or 0.0


class AlignedMTLWeighting(Preferring, GramWeighting):
    """The weights of `AlignedMTL`.

    Args:
        pref_vector: weights [m] of the tasks; None for 1/m each.
        scale_mode: "min", "median" or "rmse": see `fastmtl.AlignedMTL`.
        rank_rule: which gradients count as dependent. "normalized" looks at them at unit length, so that a large one
            does not make small ones vanish; "gram" is TorchJD's rule.

    Raises:
        ValueError: unknown `scale_mode` or `rank_rule`, a `pref_vector` that is not a finite vector.
    """

    _differentiable = True
    _extra = {"rank_rule": "normalized"}  # noqa: RUF012
    pref_vector: Tensor | None = argument(vector)
    scale_mode: Scale = argument()
    rank_rule: RankRule = argument()

    def __init__(
        self, pref_vector: Tensor | None = None, scale_mode: Scale = "min", *, rank_rule: RankRule = "normalized"
    ) -> None:
        super().__init__(pref_vector=pref_vector, scale_mode=scale_mode, rank_rule=rank_rule)

    def _make(self, options: Mapping[str, Any]) -> GramMethod:
        return methods.AlignedMTL(
            weights=options["pref_vector"], scale=options["scale_mode"], rank_rule=options["rank_rule"]
        )


class CAGradWeighting(GramWeighting):
    """The weights of `CAGrad`.

    Args:
        c: radius of the ball around the mean gradient, relative to its norm.
        norm_eps: no effect. (TorchJD's weights are zero where the gradients, or the combination in the solver, are
            shorter than this.)

    Raises:
        ValueError: `c` is negative or not finite.
    """

    c: float = argument()
    norm_eps: float = argument(at_least(0))

    def __init__(self, c: float, norm_eps: float = 0.0001) -> None:
        super().__init__(c=c, norm_eps=norm_eps)

    def _make(self, options: Mapping[str, Any]) -> GramMethod:
        return peers.CAGrad(c=options["c"], rescale=0)


class ConFIGWeighting(Preferring, GramWeighting):
    """The weights of `ConFIG` (TorchJD has only the aggregator).

    Args:
        pref_vector: the ratio [m] of the cosines; None for equal ones.

    Raises:
        ValueError: a `pref_vector` that is not a finite vector.
    """

    pref_vector: Tensor | None = argument(vector)

    def __init__(self, pref_vector: Tensor | None = None) -> None:
        super().__init__(pref_vector=pref_vector)

    def _make(self, options: Mapping[str, Any]) -> GramMethod:
        return methods.ConFIG(weights=options["pref_vector"])


class DualProjWeighting(Projecting):
    """The weights of `DualProj`.

    Args:
        pref_vector: weights [m] of the tasks; None for 1/m each.
        projector: its `reg_eps` is added to the diagonal of the Gramian, relative to the trace; None means TorchJD's
            default. With `QuadprogProjector(reg_eps=0.0)`, projections are exact. Its `norm_eps` has no effect: short
            gradients are projected like long ones.

    Raises:
        TypeError: `projector` is not a projector.
        ValueError: a `pref_vector` that is not a finite vector.
    """

    _each = False

    def _make(self, options: Mapping[str, Any]) -> GramMethod:
        return peers.DualProj(weights=options["pref_vector"], ridge=_ridge(options["projector"]))


class FairGradWeighting(GramWeighting):
    """The weights of `FairGrad`: zero where no direction improves all tasks.

    Args:
        alpha: the fairness; 0 is the mean.
        max_iters: no effect.

    Raises:
        ValueError: `alpha` is negative or not finite.
    """

    alpha: float = argument()
    max_iters: int | None = argument(integer(1, optional=True))

    def __init__(self, alpha: float, max_iters: int | None = None) -> None:
        super().__init__(alpha=alpha, max_iters=max_iters)

    def _make(self, options: Mapping[str, Any]) -> GramMethod:
        return peers.FairGrad(fairness=options["alpha"])


class GradVacWeighting(StatefulWeighting):
    """The weights of `GradVac`; the targets are in `state_dict()`, and are reset by another number of tasks.

    Args:
        beta: weight of the new cosine in the targets.
        eps: no effect: zero gradients are skipped, and nothing is added to denominators.

    Raises:
        ValueError: `beta` is not in [0, 1].
    """

    _kept = {"targets": "_phi_t"}  # noqa: RUF012

    beta: float = argument()
    eps: float = argument(at_least(0))

    def __init__(self, beta: float = 0.5, eps: float = 1e-8) -> None:
        super().__init__(beta=beta, eps=eps)

    def _make(self, options: Mapping[str, Any]) -> GramMethod:
        return peers.GradVac(beta=options["beta"])


class IMTLGWeighting(GramWeighting):
    """The weights of `IMTLG`."""

    def __init__(self) -> None:
        super().__init__()

    def _make(self, options: Mapping[str, Any]) -> GramMethod:
        return methods.IMTL()


class KrumWeighting(GramWeighting):
    """The weights of `Krum`.

    Args:
        n_byzantine: number of rows that may be arbitrary; m has to be at least `n_byzantine + 3`.
        n_selected: how many rows are averaged.

    Raises:
        ValueError: `n_byzantine` < 0 or `n_selected` < 1; (in a step) too few rows.
    """

    _differentiable = True
    n_byzantine: int = argument()
    n_selected: int = argument()

    def __init__(self, n_byzantine: int, n_selected: int = 1) -> None:
        super().__init__(n_byzantine=n_byzantine, n_selected=n_selected)

    def _make(self, options: Mapping[str, Any]) -> GramMethod:
        return peers.Krum(byzantine=options["n_byzantine"], selected=options["n_selected"], squared=False)


class MGDAWeighting(GramWeighting):
    """The weights of `MGDA`.

    Args:
        epsilon: no effect.
        max_iters: no effect.
    """

    _differentiable = True
    epsilon: float = argument(positive)
    max_iters: int = argument(integer(1))

    def __init__(self, epsilon: float = 0.001, max_iters: int = 100) -> None:
        super().__init__(epsilon=epsilon, max_iters=max_iters)

    def _make(self, options: Mapping[str, Any]) -> GramMethod:
        return peers.MGDA()


class NashMTLWeighting(StatefulWeighting):
    """The weights of `NashMTL` (TorchJD has only the aggregator): zero where no direction improves all tasks.

    A zero row leaves the weights as they were, at first ones, as there. The weights in use are in `state_dict()`.

    Args:
        n_tasks: number m of tasks.
        max_norm: a longer result is shortened to this norm; 0 never shortens.
        update_weights_every: solve in every k-th step and keep the weights in between.
        optim_niter: no effect.

    Raises:
        ValueError: `n_tasks` < 1, `max_norm` < 0 or `update_weights_every` < 1; (in a step) another number of tasks.
    """

    n_tasks: int = argument(integer(1))
    max_norm: float = argument()
    update_weights_every: int = argument()
    optim_niter: int = argument(integer(1))

    def __init__(
        self, n_tasks: int, max_norm: float = 1.0, update_weights_every: int = 1, optim_niter: int = 20
    ) -> None:
        super().__init__(
            n_tasks=n_tasks, max_norm=max_norm, update_weights_every=update_weights_every, optim_niter=optim_niter
        )

    def _make(self, options: Mapping[str, Any]) -> GramMethod:
        return peers.NashMTL(max_norm=options["max_norm"], every=options["update_weights_every"])

    def _weights(self, gramian: Tensor, dtype: torch.dtype) -> Tensor:
        if gramian.shape[-1] != self.n_tasks:
            raise ValueError(f"n_tasks: expected {self.n_tasks} tasks, got {gramian.shape[-1]}")
        return super()._weights(gramian, dtype)


class PCDWeighting(StatefulWeighting):
    """The weights of `PCD`; the first row is that of the primary objective.

    Args:
        tau: the share of progress of each of the other objectives, one number in [0, 1] or m - 1 of them.
        beta: decay of the moving average of squared norms, in [0, 1).
        eps: added to it.

    Raises:
        ValueError: an argument out of its range; (in a step) a `tau` of another length than m - 1.
    """

    _kept = {"mean": "_sq_norm_ema", "steps": "_n_steps"}  # noqa: RUF012
    tau: float | Tensor = argument()
    beta: float = argument()
    eps: float = argument()

    def __init__(self, tau: float | Tensor = 0.02, beta: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__(tau=tau, beta=beta, eps=eps)

    def _make(self, options: Mapping[str, Any]) -> GramMethod:
        return peers.PCD(tau=options["tau"], beta=options["beta"], eps=options["eps"])


class PCGradWeighting(GramWeighting):
    """The weights of `PCGrad`."""

    def __init__(self) -> None:
        super().__init__()

    def _make(self, options: Mapping[str, Any]) -> GramMethod:
        return peers.PCGrad()


class UPGradWeighting(Projecting):
    """The weights of `UPGrad`.

    Args:
        pref_vector: weights [m] of the tasks; None for 1/m each.
        projector: its `reg_eps` is added to the diagonal of the Gramian, relative to the trace; None means TorchJD's
            default. With `QuadprogProjector(reg_eps=0.0)`, projections are exact. Its `norm_eps` has no effect: short
            gradients are projected like long ones.

    Raises:
        TypeError: `projector` is not a projector.
        ValueError: a `pref_vector` that is not a finite vector.
    """

    _each = True

    def _make(self, options: Mapping[str, Any]) -> GramMethod:
        return peers.UPGrad(weights=options["pref_vector"], ridge=_ridge(options["projector"]))
