"""Weights of the rows of a Jacobian [m, n], from its Gramian [m, m] or from their number alone."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchjd import Stateful
from torchjd.aggregation import Weighting
from torchjd.linalg import DualConeProjector, QuadprogProjector

from fastmtl import methods
from fastmtl.inputs import describe
from fastmtl.integrations.torchjd import peers
from fastmtl.integrations.torchjd.configured import Configured, naming
from fastmtl.methods.aligned import RankRule, Scale
from fastmtl.methods.base import GramMethod

__all__ = [
    "AlignedMTLWeighting",
    "CAGradWeighting",
    "ConFIGWeighting",
    "ConstantWeighting",
    "DualProjWeighting",
    "FairGradWeighting",
    "GradVacWeighting",
    "GramWeighting",
    "IMTLGWeighting",
    "KrumWeighting",
    "MGDAWeighting",
    "MeanWeighting",
    "NashMTLWeighting",
    "PCGradWeighting",
    "RandomWeighting",
    "StatefulWeighting",
    "SumWeighting",
    "TaskWeighting",
    "UPGradWeighting",
]


class GramWeighting(Configured, Weighting[Tensor]):
    """Weights from a Gramian [m, m], in its dtype."""

    method: GramMethod
    _differentiable: ClassVar[bool] = False  # whether TorchJD's has a derivative, which must not be lost silently

    def __call__(self, gramian: Tensor, /, *, dtype: torch.dtype | None = None) -> Tensor:
        """The weights [m], through all registered hooks.

        Args:
            gramian: the Gramian of the Jacobian, [m, m].
            dtype: that of the Jacobian, if the Gramian has another: it sets default tolerances.
        """
        # As a keyword: hooks see the Gramian alone, as from TorchJD's weightings.
        with torch.set_grad_enabled(self._differentiable and torch.is_grad_enabled()):
            alpha: Tensor = nn.Module.__call__(self, gramian, dtype=dtype)
        return alpha

    def forward(self, gramian: Tensor, /, *, dtype: torch.dtype | None = None) -> Tensor:
        """The weights [m]."""
        with naming(self._options):
            return self.method.weighting(gramian.to(torch.float64), dtype or gramian.dtype).to(gramian.dtype)


class StatefulWeighting(GramWeighting, Stateful):
    """Weights that depend on the steps before."""

    method: Any

    def reset(self) -> None:
        """Forgets everything: the next step is the first."""
        self.method.reset()


class TaskWeighting(Configured, Weighting[Tensor]):
    """Weights that depend on the number of tasks alone: from a Jacobian [m, n] or a Gramian [m, m], in its dtype."""

    method: GramMethod

    def forward(self, matrix: Tensor, /) -> Tensor:
        """The weights [m]."""
        m = matrix.shape[0]
        some = torch.ones(m, m, dtype=torch.float64, device=matrix.device)
        return self.method.weighting(some).to(matrix.dtype)


def _ridge(projector: DualConeProjector | None) -> float:
    """What TorchJD's projector adds to the diagonal of the Gramian, relative to its trace."""
    if projector is None:
        return float(inspect.signature(QuadprogProjector).parameters["reg_eps"].default)
    if not isinstance(projector, DualConeProjector):
        raise TypeError(f"projector: expected a torchjd.linalg.DualConeProjector or None, got {describe(projector)}")
    return getattr(projector, "reg_eps", 0.0)


class AlignedMTLWeighting(GramWeighting):
    """The weights of `AlignedMTL`.

    Args:
        pref_vector: weights [m] of the tasks; None for 1/m each.
        scale_mode: "min", "median" or "rmse": see `fastmtl.AlignedMTL`.
        rank_rule: which gradients count as dependent. "normalized" looks at them at unit length, so that a large one
            does not make small ones vanish; "gram" is TorchJD's rule.

    Raises:
        ValueError: unknown `scale_mode` or `rank_rule`, a `pref_vector` that is no finite vector.
    """

    _differentiable = True

    @staticmethod
    def _make(
        pref_vector: Tensor | None = None, scale_mode: Scale = "min", *, rank_rule: RankRule = "normalized"
    ) -> GramMethod:
        return methods.AlignedMTL(weights=pref_vector, scale=scale_mode, rank_rule=rank_rule)


class CAGradWeighting(GramWeighting):
    """The weights of `CAGrad`.

    Args:
        c: radius of the ball around the mean gradient, relative to its norm.
        norm_eps: no effect. (TorchJD's weights are zero where the gradients, or the combination in the solver, are
            shorter than this.)

    Raises:
        ValueError: `c` is negative or not finite.
    """

    @staticmethod
    def _make(c: float, norm_eps: float = 0.0001) -> GramMethod:
        return peers.CAGrad(c=c, rescale=0)


class ConFIGWeighting(GramWeighting):
    """The weights of `ConFIG` (TorchJD has only the aggregator).

    Args:
        pref_vector: the ratio [m] of the cosines; None for equal ones.

    Raises:
        ValueError: a `pref_vector` that is no finite vector.
    """

    @staticmethod
    def _make(pref_vector: Tensor | None = None) -> GramMethod:
        return methods.ConFIG(weights=pref_vector)


class DualProjWeighting(GramWeighting):
    """The weights of `DualProj`.

    Args:
        pref_vector: weights [m] of the tasks; None for 1/m each.
        projector: its `reg_eps` is what is added to the diagonal of the Gramian, relative to the trace; for None that
            of TorchJD's default. With `QuadprogProjector(reg_eps=0.0)` projections are exact. Its `norm_eps` has no
            effect: short gradients are projected like long ones.

    Raises:
        TypeError: `projector` is no projector.
        ValueError: a `pref_vector` that is no finite vector.
    """

    @staticmethod
    def _make(pref_vector: Tensor | None = None, projector: DualConeProjector | None = None) -> GramMethod:
        return peers.DualProj(weights=pref_vector, ridge=_ridge(projector))


class FairGradWeighting(GramWeighting):
    """The weights of `FairGrad`: zero where no direction improves all tasks.

    Args:
        alpha: the fairness; 0 is the mean.
        max_iters: no effect.

    Raises:
        ValueError: `alpha` is negative or not finite.
    """

    @staticmethod
    def _make(alpha: float, max_iters: int | None = None) -> GramMethod:
        return peers.FairGrad(fairness=alpha)


class GradVacWeighting(StatefulWeighting):
    """The weights of `GradVac`; the targets are in `state_dict()`, and begin anew with another number of tasks.

    Args:
        beta: weight of the new cosine in the targets.
        eps: no effect: zero gradients are skipped, and nothing is added to denominators.

    Raises:
        ValueError: `beta` is not in [0, 1].
    """

    method: methods.GradVac

    @staticmethod
    def _make(beta: float = 0.5, eps: float = 1e-8) -> GramMethod:
        return peers.GradVac(beta=beta)

    def forward(self, gramian: Tensor, /, *, dtype: torch.dtype | None = None) -> Tensor:
        """The weights [m]."""
        if self.method.targets is not None and self.method.targets.shape != gramian.shape:
            self.reset()
        return super().forward(gramian, dtype=dtype)


class IMTLGWeighting(GramWeighting):
    """The weights of `IMTLG`."""

    @staticmethod
    def _make() -> GramMethod:
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

    @staticmethod
    def _make(n_byzantine: int, n_selected: int = 1) -> GramMethod:
        return peers.Krum(byzantine=n_byzantine, selected=n_selected, squared=False)


class MGDAWeighting(GramWeighting):
    """The weights of `MGDA`.

    Args:
        epsilon: no effect.
        max_iters: no effect.
    """

    _differentiable = True

    @staticmethod
    def _make(epsilon: float = 0.001, max_iters: int = 100) -> GramMethod:
        return peers.MGDA()


class NashMTLWeighting(StatefulWeighting):
    """The weights of `NashMTL` (TorchJD has only the aggregator): zero where no direction improves all tasks.

    With `update_weights_every` > 1 the weights in use are in `state_dict()`.

    Args:
        n_tasks: number m of tasks.
        max_norm: the result is shortened to this norm where it is longer; 0 to leave it as it is.
        update_weights_every: solve in every k-th step and keep the weights in between.
        optim_niter: no effect.

    Raises:
        ValueError: `n_tasks` < 1, `max_norm` < 0 or `update_weights_every` < 1; (in a step) another number of tasks.
    """

    @staticmethod
    def _make(n_tasks: int, max_norm: float = 1.0, update_weights_every: int = 1, optim_niter: int = 20) -> GramMethod:
        if not isinstance(n_tasks, int) or n_tasks < 1:
            raise ValueError(f"n_tasks: expected an integer >= 1, got {n_tasks!r}")
        return methods.NashMTL(max_norm=max_norm, every=update_weights_every)

    def forward(self, gramian: Tensor, /, *, dtype: torch.dtype | None = None) -> Tensor:
        """The weights [m]."""
        if gramian.shape[-1] != self._options["n_tasks"]:
            raise ValueError(f"n_tasks: expected {self._options['n_tasks']} tasks, got {gramian.shape[-1]}")
        return super().forward(gramian, dtype=dtype)


class PCGradWeighting(GramWeighting):
    """The weights of `PCGrad`."""

    @staticmethod
    def _make() -> GramMethod:
        return peers.PCGrad()


class UPGradWeighting(GramWeighting):
    """The weights of `UPGrad`.

    Args:
        pref_vector: weights [m] of the tasks; None for 1/m each.
        projector: its `reg_eps` is what is added to the diagonal of the Gramian, relative to the trace; for None that
            of TorchJD's default. With `QuadprogProjector(reg_eps=0.0)` projections are exact. Its `norm_eps` has no
            effect: short gradients are projected like long ones.

    Raises:
        TypeError: `projector` is no projector.
        ValueError: a `pref_vector` that is no finite vector.
    """

    @staticmethod
    def _make(pref_vector: Tensor | None = None, projector: DualConeProjector | None = None) -> GramMethod:
        return peers.UPGrad(weights=pref_vector, ridge=_ridge(projector))


class ConstantWeighting(TaskWeighting):
    """The weights of `Constant`.

    Args:
        weights: the weights [m].

    Raises:
        ValueError: `weights` are no finite vector; (in a step) of another length than m.
    """

    @staticmethod
    def _make(weights: Tensor) -> GramMethod:
        return methods.Uniform(weights=weights)


class MeanWeighting(TaskWeighting):
    """The weights of `Mean`: 1/m each."""

    @staticmethod
    def _make() -> GramMethod:
        return methods.Uniform(weights="mean")


class RandomWeighting(TaskWeighting):
    """The weights of `Random`: the softmax of normal numbers, drawn anew in every step."""

    @staticmethod
    def _make() -> GramMethod:
        return methods.RLW()


class SumWeighting(TaskWeighting):
    """The weights of `Sum`: ones."""

    @staticmethod
    def _make() -> GramMethod:
        return methods.Uniform(weights="sum")
