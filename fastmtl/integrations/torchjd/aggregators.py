"""Aggregators: a Jacobian [m, n] becomes a vector [n]."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchjd import Stateful
from torchjd.aggregation import Aggregator, GramianWeightedAggregator, WeightedAggregator, Weighting

from fastmtl import methods, ops
from fastmtl.inputs import check_matrix
from fastmtl.integrations.torchjd import weightings
from fastmtl.integrations.torchjd.configured import Configured, option_of, repr_of
from fastmtl.integrations.torchjd.weightings import GramWeighting, StatefulWeighting
from fastmtl.methods.base import Method

__all__ = [
    "IMTLG",
    "MGDA",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "Constant",
    "DualProj",
    "FairGrad",
    "GradDrop",
    "GradVac",
    "Krum",
    "Mean",
    "NashMTL",
    "PCGrad",
    "Random",
    "Sum",
    "UPGrad",
]


class ByGramian(Weighting[Tensor]):
    """Weights from a Jacobian [m, n]: what a weighting says to its Gramian, which is computed in float64."""

    def __init__(self, weighting: GramWeighting) -> None:
        super().__init__()
        self.weighting = weighting

    def forward(self, matrix: Tensor, /) -> Tensor:
        check_matrix(matrix)
        alpha = self.weighting(ops.gram(matrix), dtype=matrix.dtype)
        weights = alpha.to(matrix.dtype)
        # `jac_to_grad` returns these weights in the Jacobian's dtype. Where gradients cancel, the result needs more
        # digits than that: `_combine` adds what is rounded off here, to whatever hooks make of the weights.
        if weights is not alpha:
            weights.rounded_off = alpha - weights  # type: ignore[attr-defined]
        return weights


class MadeOf(WeightedAggregator):
    """Takes the arguments of its weighting, and has them as attributes."""

    __signature__: ClassVar[inspect.Signature]
    _part: ClassVar[str]  # where the arguments are
    _by: ClassVar[type[Configured]]

    def __init_subclass__(cls, by: type[Configured] | None = None, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if by is not None:
            cls._by = by
            cls.__signature__ = by.__signature__
            for name in by.__signature__.parameters:
                setattr(cls, name, option_of(cls._part, name))

    def __repr__(self) -> str:
        return repr_of(self, getattr(self, self._part)._options)


class GramAggregator(MadeOf, GramianWeightedAggregator):
    """Combines rows with weights from their Gramian, in float64."""

    _part = "gramian_weighting"
    gramian_weighting: GramWeighting
    weighting: Weighting[Tensor]

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(self._by(*arguments, **keywords))  # type: ignore[arg-type]
        self.weighting = ByGramian(self.gramian_weighting)

    def __call__(self, matrix: Tensor, /) -> Tensor:
        """The aggregation [n] of a Jacobian [m, n], through all registered hooks."""
        with torch.set_grad_enabled(self.gramian_weighting._differentiable and torch.is_grad_enabled()):
            return super().__call__(matrix)

    @staticmethod
    def _combine(matrix: Tensor, weights: Tensor) -> Tensor:
        out = matrix.new_empty(matrix.shape[1])
        ops.combine(matrix, weights.to(torch.float64) + getattr(weights, "rounded_off", 0), out)
        return out


class StatefulAggregator(GramAggregator, Stateful):
    gramian_weighting: StatefulWeighting

    def reset(self) -> None:
        """Forgets everything: the next step is the first."""
        self.gramian_weighting.reset()


class TaskAggregator(MadeOf):
    """Combines rows with weights that do not depend on them: by TorchJD's matrix product, which has a derivative."""

    _part = "weighting"

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(self._by(*arguments, **keywords))  # type: ignore[arg-type]


class AlignedMTL(GramAggregator, by=weightings.AlignedMTLWeighting):
    """`fastmtl.AlignedMTL` as TorchJD's `AlignedMTL`. For the arguments see `AlignedMTLWeighting`."""


class CAGrad(GramAggregator, by=weightings.CAGradWeighting):
    """`fastmtl.CAGrad`, not rescaled, as TorchJD's `CAGrad`. For the arguments see `CAGradWeighting`."""


class ConFIG(GramAggregator, by=weightings.ConFIGWeighting):
    """`fastmtl.ConFIG` as TorchJD's `ConFIG`. For the arguments see `ConFIGWeighting`."""


class DualProj(GramAggregator, by=weightings.DualProjWeighting):
    """`fastmtl.DualProj` as TorchJD's `DualProj`. For the arguments see `DualProjWeighting`."""


class FairGrad(GramAggregator, by=weightings.FairGradWeighting):
    """`fastmtl.FairGrad` as TorchJD's `FairGrad`. For the arguments see `FairGradWeighting`."""


class GradVac(StatefulAggregator, by=weightings.GradVacWeighting):
    """`fastmtl.GradVac` as TorchJD's `GradVac`. For the arguments see `GradVacWeighting`."""


class IMTLG(GramAggregator, by=weightings.IMTLGWeighting):
    """`fastmtl.IMTL` as TorchJD's `IMTLG`."""


class Krum(GramAggregator, by=weightings.KrumWeighting):
    """`fastmtl.Krum`, on distances that are not squared, as TorchJD's `Krum`. For the arguments see `KrumWeighting`."""


class MGDA(GramAggregator, by=weightings.MGDAWeighting):
    """`fastmtl.MGDA` as TorchJD's `MGDA`. For the arguments see `MGDAWeighting`."""


class NashMTL(StatefulAggregator, by=weightings.NashMTLWeighting):
    """`fastmtl.NashMTL` as TorchJD's `NashMTL`. For the arguments see `NashMTLWeighting`."""


class PCGrad(GramAggregator, by=weightings.PCGradWeighting):
    """`fastmtl.PCGrad` as TorchJD's `PCGrad`."""


class UPGrad(GramAggregator, by=weightings.UPGradWeighting):
    """`fastmtl.UPGrad` as TorchJD's `UPGrad`. For the arguments see `UPGradWeighting`."""


class Constant(TaskAggregator, by=weightings.ConstantWeighting):
    """`fastmtl.Uniform` as TorchJD's `Constant`. For the arguments see `ConstantWeighting`."""


class Mean(TaskAggregator, by=weightings.MeanWeighting):
    """`fastmtl.Uniform` as TorchJD's `Mean`."""


class Random(TaskAggregator, by=weightings.RandomWeighting):
    """`fastmtl.RLW` as TorchJD's `Random`."""


class Sum(TaskAggregator, by=weightings.SumWeighting):
    """`fastmtl.Uniform` as TorchJD's `Sum`."""


def _identity(P: Tensor) -> Tensor:
    return P


class GradDrop(Configured, Aggregator):
    """`fastmtl.GradDrop` as TorchJD's `GradDrop`.

    Args:
        f: what is applied to the sign purity: only the identity, TorchJD's default, is supported.
        leak: how much [m] of each row passes whatever its sign; None for nothing.

    Raises:
        ValueError: another `f`; `leak` is not within [0, 1] or no vector; (in a step) of another length than m.
    """

    method: methods.GradDrop

    @staticmethod
    def _make(f: Callable[[Tensor], Tensor] = _identity, leak: Tensor | None = None) -> Method:
        purity = torch.linspace(0, 1, 101, device="cpu")
        if not torch.equal(f(purity.clone()), purity):
            raise ValueError(f"f: expected the identity, got {f!r}, which changes the sign purity")
        return methods.GradDrop(leak=leak)

    def __call__(self, matrix: Tensor, /) -> Tensor:
        """The aggregation [n] of a Jacobian [m, n], through all registered hooks."""
        with torch.no_grad():
            return super().__call__(matrix)

    def forward(self, matrix: Tensor, /) -> Tensor:
        """The aggregation [n] of a Jacobian [m, n]."""
        return self.method(matrix)
