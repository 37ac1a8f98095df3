"""Aggregators: a Jacobian [m, n] becomes a vector [n]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchjd import Stateful
from torchjd.aggregation import Aggregator, GramianWeightedAggregator, WeightedAggregator, Weighting
from torchjd.linalg import DualConeProjector

from fastmtl import methods, ops
from fastmtl.inputs import check_matrix
from fastmtl.integrations.torchjd import peers, weightings
from fastmtl.integrations.torchjd.configured import Configured, argument, part_of, suffix_of
from fastmtl.integrations.torchjd.on_matrices import ExcessMTLWeighting
from fastmtl.integrations.torchjd.tasks import vector
from fastmtl.integrations.torchjd.weightings import GramWeighting, StatefulWeighting
from fastmtl.methods.aligned import RankRule, Scale

__all__ = [
    "IMTLG",
    "MGDA",
    "PCD",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "ExcessMTL",
    "FairGrad",
    "GradDrop",
    "GradVac",
    "Krum",
    "NashMTL",
    "PCGrad",
    "TrimmedMean",
    "UPGrad",
]


class ByGramian(Weighting[Tensor]):
    """Weights from a Jacobian [m, n]: those of a weighting for its Gramian, which is computed in float64."""

    def __init__(self, weighting: GramWeighting) -> None:
        super().__init__()
        self.weighting = weighting

    def forward(self, matrix: Tensor, /) -> Tensor:
        if not matrix.shape[0]:
            return self.weighting(matrix.new_zeros(0, 0))
        check_matrix(matrix)
        gramian = ops.gram(matrix)
        gramian.gradients_dtype = matrix.dtype  # type: ignore[attr-defined]
        alpha = self.weighting(gramian)
        weights = alpha.to(matrix.dtype)
        # `jac_to_grad` returns these weights in the Jacobian's dtype. If gradients cancel, the result needs more:
        # `_combine` takes the weights from before this rounding, unless a hook has changed them.
        if weights is not alpha:
            weights.exact = alpha, None if weights.is_inference() else weights._version  # type: ignore[attr-defined]
        return weights


class GramAggregator(GramianWeightedAggregator):
    """Combines rows with weights from their Gramian, in float64."""

    gramian_weighting: GramWeighting
    weighting: Weighting[Tensor]

    def __init__(self, weighting: GramWeighting) -> None:
        super().__init__(weighting)
        self.weighting = ByGramian(weighting)

    def __call__(self, matrix: Tensor, /) -> Tensor:
        """The aggregation [n] of a Jacobian [m, n], through all registered hooks."""
        with torch.set_grad_enabled(self.gramian_weighting._differentiable and torch.is_grad_enabled()):
            return super().__call__(matrix)

    @staticmethod
    def _combine(matrix: Tensor, weights: Tensor) -> Tensor:
        if not matrix.shape[0]:
            return matrix.new_zeros(matrix.shape[1], requires_grad=False)
        out = matrix.new_empty(matrix.shape[1], requires_grad=False)
        exact, version = getattr(weights, "exact", (weights, None))
        if version is None or version != weights._version:
            exact = weights.to(torch.float64)
        ops.combine(matrix, exact, out)
        return out

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.gramian_weighting._arguments()})"


class StatefulAggregator(GramAggregator, Stateful):
    gramian_weighting: StatefulWeighting

    def reset(self) -> None:
        """Forgets everything: the next step is the first."""
        self.gramian_weighting.reset()


class Preferring(GramAggregator):
    pref_vector: Tensor | None = part_of("gramian_weighting", "pref_vector")

    def __str__(self) -> str:
        return type(self).__name__ + suffix_of(self.pref_vector)


class AlignedMTL(Preferring):
    """`fastmtl.AlignedMTL` as TorchJD's `AlignedMTL`. For the arguments see `AlignedMTLWeighting`."""

    gramian_weighting: weightings.AlignedMTLWeighting
    scale_mode: Scale = part_of("gramian_weighting", "scale_mode")
    rank_rule: RankRule = part_of("gramian_weighting", "rank_rule")

    def __init__(
        self, pref_vector: Tensor | None = None, scale_mode: Scale = "min", *, rank_rule: RankRule = "normalized"
    ) -> None:
        super().__init__(weightings.AlignedMTLWeighting(pref_vector, scale_mode, rank_rule=rank_rule))


class CAGrad(GramAggregator):
    """`fastmtl.CAGrad`, not rescaled, as TorchJD's `CAGrad`. For the arguments see `CAGradWeighting`."""

    gramian_weighting: weightings.CAGradWeighting
    c: float = part_of("gramian_weighting", "c")
    norm_eps: float = part_of("gramian_weighting", "norm_eps")

    def __init__(self, c: float, norm_eps: float = 0.0001) -> None:
        super().__init__(weightings.CAGradWeighting(c, norm_eps))

    def __str__(self) -> str:
        return f"CAGrad{str(self.c).removesuffix('.0')}"


class ConFIG(Preferring):
    """`fastmtl.ConFIG` as TorchJD's `ConFIG`. For the arguments see `ConFIGWeighting`."""

    gramian_weighting: weightings.ConFIGWeighting

    def __init__(self, pref_vector: Tensor | None = None) -> None:
        super().__init__(weightings.ConFIGWeighting(pref_vector))


class DualProj(Preferring):
    """`fastmtl.DualProj` as TorchJD's `DualProj`. For the arguments see `DualProjWeighting`."""

    gramian_weighting: weightings.DualProjWeighting
    projector: Any = part_of("gramian_weighting", "projector")

    def __init__(self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None) -> None:
        super().__init__(weightings.DualProjWeighting(pref_vector, projector))


class FairGrad(GramAggregator):
    """`fastmtl.FairGrad` as TorchJD's `FairGrad`. For the arguments see `FairGradWeighting`."""

    gramian_weighting: weightings.FairGradWeighting
    alpha: float = part_of("gramian_weighting", "alpha")
    max_iters: int | None = part_of("gramian_weighting", "max_iters")

    def __init__(self, alpha: float, max_iters: int | None = None) -> None:
        super().__init__(weightings.FairGradWeighting(alpha, max_iters))

    def __str__(self) -> str:
        return f"{self.alpha}-FairGrad"


class GradVac(StatefulAggregator):
    """`fastmtl.GradVac` as TorchJD's `GradVac`. For the arguments see `GradVacWeighting`."""

    gramian_weighting: weightings.GradVacWeighting
    beta: float = part_of("gramian_weighting", "beta")
    eps: float = part_of("gramian_weighting", "eps")

    def __init__(self, beta: float = 0.5, eps: float = 1e-8) -> None:
        super().__init__(weightings.GradVacWeighting(beta, eps))


class IMTLG(GramAggregator):
    """`fastmtl.IMTL` as TorchJD's `IMTLG`."""

    gramian_weighting: weightings.IMTLGWeighting

    def __init__(self) -> None:
        super().__init__(weightings.IMTLGWeighting())


class Krum(GramAggregator):
    """`fastmtl.Krum`, on distances that are not squared, as TorchJD's `Krum`. For the arguments see `KrumWeighting`."""

    gramian_weighting: weightings.KrumWeighting
    n_byzantine: int = part_of("gramian_weighting", "n_byzantine")
    n_selected: int = part_of("gramian_weighting", "n_selected")

    def __init__(self, n_byzantine: int, n_selected: int = 1) -> None:
        super().__init__(weightings.KrumWeighting(n_byzantine, n_selected))

    def __str__(self) -> str:
        return f"Krum{self.n_byzantine}-{self.n_selected}"


class MGDA(GramAggregator):
    """`fastmtl.MGDA` as TorchJD's `MGDA`. For the arguments see `MGDAWeighting`."""

    gramian_weighting: weightings.MGDAWeighting
    epsilon: float = part_of("gramian_weighting", "epsilon")
    max_iters: int = part_of("gramian_weighting", "max_iters")

    def __init__(self, epsilon: float = 0.001, max_iters: int = 100) -> None:
        super().__init__(weightings.MGDAWeighting(epsilon, max_iters))


class NashMTL(StatefulAggregator):
    """`fastmtl.NashMTL` as TorchJD's `NashMTL`. For the arguments see `NashMTLWeighting`."""

    gramian_weighting: weightings.NashMTLWeighting
    n_tasks: int = part_of("gramian_weighting", "n_tasks")
    max_norm: float = part_of("gramian_weighting", "max_norm")
    update_weights_every: int = part_of("gramian_weighting", "update_weights_every")
    optim_niter: int = part_of("gramian_weighting", "optim_niter")

    def __init__(
        self, n_tasks: int, max_norm: float = 1.0, update_weights_every: int = 1, optim_niter: int = 20
    ) -> None:
        super().__init__(weightings.NashMTLWeighting(n_tasks, max_norm, update_weights_every, optim_niter))


class PCD(StatefulAggregator):
    """`fastmtl.PCD` as TorchJD's `PCD`. For the arguments see `PCDWeighting`."""

    gramian_weighting: weightings.PCDWeighting
    tau: float | Tensor = part_of("gramian_weighting", "tau")
    beta: float = part_of("gramian_weighting", "beta")
    eps: float = part_of("gramian_weighting", "eps")

    def __init__(self, tau: float | Tensor = 0.02, beta: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__(weightings.PCDWeighting(tau, beta, eps))


class PCGrad(GramAggregator):
    """`fastmtl.PCGrad` as TorchJD's `PCGrad`."""

    gramian_weighting: weightings.PCGradWeighting

    def __init__(self) -> None:
        super().__init__(weightings.PCGradWeighting())


class UPGrad(Preferring):
    """`fastmtl.UPGrad` as TorchJD's `UPGrad`. For the arguments see `UPGradWeighting`."""

    gramian_weighting: weightings.UPGradWeighting
    projector: Any = part_of("gramian_weighting", "projector")

    def __init__(self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None) -> None:
        super().__init__(weightings.UPGradWeighting(pref_vector, projector))


class ExcessMTL(WeightedAggregator, Stateful):
    """`fastmtl.ExcessMTL` as TorchJD's `ExcessMTL`. For the arguments see `ExcessMTLWeighting`."""

    weighting: ExcessMTLWeighting
    robust_step_size: float = part_of("weighting", "robust_step_size")
    n_warmup_steps: int = part_of("weighting", "n_warmup_steps")

    def __init__(self, robust_step_size: float = 1.0, n_warmup_steps: int = 0) -> None:
        super().__init__(ExcessMTLWeighting(robust_step_size, n_warmup_steps))

    def __call__(self, matrix: Tensor, /) -> Tensor:
        """The aggregation [n] of a Jacobian [m, n], through all registered hooks."""
        with torch.no_grad():
            return super().__call__(matrix)

    _combine = staticmethod(GramAggregator._combine)

    def reset(self) -> None:
        """Forgets everything: the next step is the first."""
        self.weighting.reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.weighting._arguments()})"


def _identity(P: Tensor) -> Tensor:
    return P


def _checked_purity(f: Any, name: str) -> Callable[[Tensor], Tensor]:
    purity = torch.linspace(0, 1, 101, device="cpu")
    if not torch.equal(f(purity.clone()), purity):
        raise ValueError(f"{name}: expected the identity, got {f!r}, which changes the sign purity")
    return f  # type: ignore[no-any-return]


class _OfMatrix(Configured, Aggregator):
    """An aggregator that needs the Jacobian itself, coordinate by coordinate."""

    def __call__(self, matrix: Tensor, /) -> Tensor:
        """The aggregation [n] of a Jacobian [m, n], through all registered hooks."""
        with torch.no_grad():
            return super().__call__(matrix)

    def forward(self, matrix: Tensor, /) -> Tensor:
        """The aggregation [n] of a Jacobian [m, n]."""
        if not matrix.shape[0]:
            self.method.check_tasks(0)
            return matrix.new_zeros(matrix.shape[1])
        g: Tensor = self.method(matrix)
        return g


class GradDrop(_OfMatrix):
    """`fastmtl.GradDrop` as TorchJD's `GradDrop`.

    Args:
        f: function of the sign purity: only the identity, TorchJD's default, is supported.
        leak: how much [m] of each row passes whatever its sign; None for nothing.

    Raises:
        ValueError: another `f`; `leak` is not within [0, 1] or not a vector; (in a step) of another length than m.
    """

    f: Callable[[Tensor], Tensor] = argument(_checked_purity)
    leak: Tensor | None = argument(vector)

    def __init__(self, f: Callable[[Tensor], Tensor] = _identity, leak: Tensor | None = None) -> None:
        super().__init__(f=f, leak=leak)

    def _make(self, options: Any) -> methods.GradDrop:
        leak = options["leak"]
        return methods.GradDrop(leak=None if leak is None or not len(leak) else leak)

    def forward(self, matrix: Tensor, /) -> Tensor:
        """The aggregation [n] of a Jacobian [m, n]."""
        if self.leak is not None and len(self.leak) != matrix.shape[0]:
            raise ValueError(f"leak: expected length {matrix.shape[0]} (the number of rows), got {len(self.leak)}")
        return super().forward(matrix)

    def __str__(self) -> str:
        return type(self).__name__ + suffix_of(self.leak)


class TrimmedMean(_OfMatrix):
    """`fastmtl.TrimmedMean` as TorchJD's `TrimmedMean`; if an entry is not finite, the result is NaN.

    Args:
        trim_number: how many of the largest and of the smallest entries of each column are left out.

    Raises:
        TypeError: `trim_number` is not an integer.
        ValueError: it is negative; (in a step) fewer than 2 `trim_number` + 1 rows.
    """

    trim_number: int = argument()

    def __init__(self, trim_number: int) -> None:
        super().__init__(trim_number=trim_number)

    def _make(self, options: Any) -> methods.TrimmedMean:
        return peers.TrimmedMean(trim=options["trim_number"])

    def __str__(self) -> str:
        return f"TM{self.trim_number}"
