"""TorchJD's aggregators and weightings, computed by fastmtl: a change of one import line.

    from torchjd.aggregation import UPGrad
    from fastmtl.integrations.torchjd import UPGrad

Every class has the name, the arguments and the attributes of TorchJD's, and is one of TorchJD's kinds: an aggregator
for `torchjd.autojac.jac_to_grad` (with `optimize_gramian_computation` too) or a weighting for the Gramians of
`torchjd.autogram.Engine`. Behind each stands a method of `fastmtl`, at `methods.method`.

An aggregator that needs the Gramian of the Jacobian [m, n] computes it and the weights [m] in float64, and rounds once,
when the result [n] is written; whoever looks at the weights sees them in the Jacobian's dtype. A weighting returns
weights in the dtype of its Gramian [m, m].

Problems are solved to rounding, at every scale of the gradients: arguments that steer an iterative solver or guard its
divisions are accepted and have no effect. A non-finite gradient makes the weights NaN. Weights have no derivative:
where TorchJD's class detaches what requires grad, so does this one; where TorchJD's has a derivative (`AlignedMTL`,
`MGDA`, `Krum`), a matrix that requires grad is a ValueError. `Mean`, `Sum`, `Constant` and `Random` have it as there.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastmtl import methods, ops
from fastmtl.info import Info
from fastmtl.inputs import check_matrix, describe
from fastmtl.methods.aligned import RankRule, Scale
from fastmtl.methods.base import GramMethod, Method
from fastmtl.rule import NOTHING, Context

try:
    from torchjd import Stateful
    from torchjd.aggregation import Aggregator, GramianWeightedAggregator, WeightedAggregator, Weighting
    from torchjd.linalg import DualConeProjector, QuadprogProjector
except ImportError as error:
    raise ImportError(
        "fastmtl.integrations.torchjd needs torchjd >= 0.18: pip install 'fastmtl-torch[torchjd]'"
    ) from error

__all__ = [
    "IMTLG",
    "MGDA",
    "AlignedMTL",
    "AlignedMTLWeighting",
    "CAGrad",
    "CAGradWeighting",
    "ConFIG",
    "ConFIGWeighting",
    "Constant",
    "ConstantWeighting",
    "DualProj",
    "DualProjWeighting",
    "FairGrad",
    "FairGradWeighting",
    "GradDrop",
    "GradVac",
    "GradVacWeighting",
    "IMTLGWeighting",
    "Krum",
    "KrumWeighting",
    "MGDAWeighting",
    "Mean",
    "MeanWeighting",
    "NashMTL",
    "NashMTLWeighting",
    "PCGrad",
    "PCGradWeighting",
    "Random",
    "RandomWeighting",
    "Sum",
    "SumWeighting",
    "UPGrad",
    "UPGradWeighting",
]

# TorchJD's names of what fastmtl's messages are about.
_NAMES = {
    "weights": "pref_vector",
    "scale": "scale_mode",
    "fairness": "alpha",
    "byzantine": "n_byzantine",
    "selected": "n_selected",
    "every": "update_weights_every",
}


@contextlib.contextmanager
def _naming(options: Mapping[str, object]) -> Iterator[None]:
    """Errors about an argument call it what it is called here."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, colon, rest = str(error).partition(": ")
        if _NAMES.get(name) not in options:
            raise
        raise type(error)(_NAMES[name] + colon + rest) from None


class _Configured(nn.Module):
    """A method made from TorchJD's arguments, which can be read and set as attributes, as there.

    Attributes:
        method: the method of `fastmtl` that computes.
    """

    _make: ClassVar[Callable[..., Method]]  # the arguments of the class, and the method that they mean
    __signature__: ClassVar[inspect.Signature]
    method: Any

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "_make" in cls.__dict__:
            cls.__signature__ = inspect.signature(cls._make).replace(return_annotation=None)
            for name in cls.__signature__.parameters:
                setattr(cls, name, _option(name))

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__()
        bound = self.__signature__.bind(*arguments, **keywords)
        bound.apply_defaults()
        self._set(bound.arguments)

    def _set(self, options: dict[str, Any]) -> None:
        with _naming(options):
            method = type(self)._make(**options)
        if isinstance(method, nn.Module) and hasattr(self, "method"):
            method.load_state_dict(self.method.state_dict())  # another option is no reason to forget
        self.method = method
        self._options = options

    def __repr__(self) -> str:
        return _repr(self, self._options)

    def __str__(self) -> str:
        return type(self).__name__


def _option(name: str) -> property:
    return property(lambda self: self._options[name], lambda self, value: self._set({**self._options, name: value}))


def _option_of(part: str, name: str) -> property:
    return property(
        lambda self: getattr(getattr(self, part), name),
        lambda self, value: setattr(getattr(self, part), name, value),
    )


def _repr(self: object, options: Mapping[str, object]) -> str:
    return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in options.items())})"


class _GramWeighting(_Configured, Weighting):
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
            return nn.Module.__call__(self, gramian, dtype=dtype)

    def forward(self, gramian: Tensor, /, *, dtype: torch.dtype | None = None) -> Tensor:
        """The weights [m]."""
        with _naming(self._options):
            return self.method.weighting(gramian.to(torch.float64), dtype or gramian.dtype).to(gramian.dtype)


class _ByGramian(Weighting):
    """Weights from a Jacobian [m, n]: what a weighting says to its Gramian, which is computed in float64."""

    def __init__(self, weighting: _GramWeighting) -> None:
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


class _MadeOf(WeightedAggregator):
    """Takes the arguments of its weighting, and has them as attributes."""

    _part: ClassVar[str]  # where the arguments are
    _by: ClassVar[type[_Configured]]

    def __init_subclass__(cls, by: type[_Configured] | None = None, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if by is not None:
            cls._by = by
            cls.__signature__ = by.__signature__  # type: ignore[attr-defined]
            for name in by.__signature__.parameters:
                setattr(cls, name, _option_of(cls._part, name))

    def __repr__(self) -> str:
        return _repr(self, getattr(self, self._part)._options)


class _GramAggregator(_MadeOf, GramianWeightedAggregator):
    """Combines rows with weights from their Gramian, in float64."""

    _part = "gramian_weighting"
    gramian_weighting: _GramWeighting

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(self._by(*arguments, **keywords))  # type: ignore[arg-type]
        self.weighting = _ByGramian(self.gramian_weighting)

    def __call__(self, matrix: Tensor, /) -> Tensor:
        """The aggregation [n] of a Jacobian [m, n], through all registered hooks."""
        with torch.set_grad_enabled(self.gramian_weighting._differentiable and torch.is_grad_enabled()):
            return super().__call__(matrix)

    @staticmethod
    def _combine(matrix: Tensor, weights: Tensor) -> Tensor:
        out = matrix.new_empty(matrix.shape[1])
        ops.combine(matrix, weights.to(torch.float64) + getattr(weights, "rounded_off", 0), out)
        return out


class _StatefulWeighting(_GramWeighting, Stateful):
    method: Any

    def reset(self) -> None:
        """Forgets everything: the next step is the first."""
        self.method.reset()


class _StatefulAggregator(_GramAggregator, Stateful):
    gramian_weighting: _StatefulWeighting

    def reset(self) -> None:
        """Forgets everything: the next step is the first."""
        self.gramian_weighting.reset()


class _TaskWeighting(_Configured, Weighting):
    """Weights that depend on the number of tasks alone: from a Jacobian [m, n] or a Gramian [m, m], in its dtype."""

    method: GramMethod

    def forward(self, matrix: Tensor, /) -> Tensor:
        """The weights [m]."""
        m = matrix.shape[0]
        some = torch.ones(m, m, dtype=torch.float64, device=matrix.device)
        return self.method.weighting(some).to(matrix.dtype)


class _TaskAggregator(_MadeOf):
    """Combines rows with weights that do not depend on them: by TorchJD's matrix product, which has a derivative."""

    _part = "weighting"

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(self._by(*arguments, **keywords))  # type: ignore[arg-type]


def _ridge(projector: DualConeProjector | None) -> float:
    """What TorchJD's projector adds to the diagonal of the Gramian, relative to its trace."""
    if projector is None:
        return inspect.signature(QuadprogProjector).parameters["reg_eps"].default
    if not isinstance(projector, DualConeProjector):
        raise TypeError(f"projector: expected a torchjd.linalg.DualConeProjector or None, got {describe(projector)}")
    return getattr(projector, "reg_eps", 0.0)


# ------------------------------------------------------------------------------------------------ zero rows
#
# To `fastmtl` a task whose gradient is zero is absent. To TorchJD it is a task like others: these methods give it the
# weight that TorchJD's do, which is also what a loss gets whose Gramian [m, m] does not show all of its gradients.


def _zero_rows(M: Tensor) -> Tensor:
    return M.diagonal(dim1=-2, dim2=-1) == 0


class _Peer:
    """Made part of a method: what becomes of its weights α [..., m] where rows are zero."""

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        info: Info = super().solve(M, dtype, context)  # type: ignore[misc]
        info.alpha = self._with_zero_rows(info.alpha, _zero_rows(M))
        return info

    def _with_zero_rows(self, alpha: Tensor, zero: Tensor) -> Tensor:
        raise NotImplementedError


class _CAGrad(_Peer, methods.CAGrad):
    def _with_zero_rows(self, alpha: Tensor, zero: Tensor) -> Tensor:
        return alpha * ~zero.any(-1, keepdim=True)  # its g_w is zero, and then it moves nothing


class _FairGrad(_Peer, methods.FairGrad):
    def _with_zero_rows(self, alpha: Tensor, zero: Tensor) -> Tensor:
        return alpha if self.fairness else alpha + zero / zero.shape[-1]


class _MGDA(_Peer, methods.MGDA):
    def _with_zero_rows(self, alpha: Tensor, zero: Tensor) -> Tensor:
        first = zero & (zero.cumsum(-1) == 1)  # which is the shortest vector
        return alpha * ~zero.any(-1, keepdim=True) + first


class _Conflicts(_Peer):
    def _with_zero_rows(self, alpha: Tensor, zero: Tensor) -> Tensor:
        return alpha + zero


class _PCGrad(_Conflicts, methods.PCGrad):
    pass


class _GradVac(_Conflicts, methods.GradVac):
    pass


class _Projected(_Peer):
    def _with_zero_rows(self, alpha: Tensor, zero: Tensor) -> Tensor:
        m = zero.shape[-1]
        preferred = self._task_weights(m, alpha)  # type: ignore[attr-defined]
        return alpha + zero * (1 / m if preferred is None else preferred)


class _UPGrad(_Projected, methods.UPGrad):
    pass


class _DualProj(_Projected, methods.DualProj):
    pass


class _Krum(methods.Krum):
    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        # One more parameter, on which all rows depend alike, changes no distance, and no row is zero.
        squares, zero = M.diagonal(dim1=-2, dim2=-1), _zero_rows(M)
        shortest = torch.where(zero, torch.inf, squares).amin(-1, keepdim=True)
        added = zero.any(-1, keepdim=True) * torch.where(zero.all(-1, keepdim=True), 1.0, shortest)
        return super().solve(M + added[..., None], dtype, context)


# ------------------------------------------------------------------------------------------------ on the Gramian


class AlignedMTLWeighting(_GramWeighting):
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


class AlignedMTL(_GramAggregator, by=AlignedMTLWeighting):
    """`fastmtl.AlignedMTL` as TorchJD's `AlignedMTL`. For the arguments see `AlignedMTLWeighting`."""


class CAGradWeighting(_GramWeighting):
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
        return _CAGrad(c=c, rescale=0)


class CAGrad(_GramAggregator, by=CAGradWeighting):
    """`fastmtl.CAGrad`, not rescaled, as TorchJD's `CAGrad`. For the arguments see `CAGradWeighting`."""


class ConFIGWeighting(_GramWeighting):
    """The weights of `ConFIG` (TorchJD has only the aggregator).

    Args:
        pref_vector: the ratio [m] of the cosines; None for equal ones.

    Raises:
        ValueError: a `pref_vector` that is no finite vector.
    """

    @staticmethod
    def _make(pref_vector: Tensor | None = None) -> GramMethod:
        return methods.ConFIG(weights=pref_vector)


class ConFIG(_GramAggregator, by=ConFIGWeighting):
    """`fastmtl.ConFIG` as TorchJD's `ConFIG`. For the arguments see `ConFIGWeighting`."""


class DualProjWeighting(_GramWeighting):
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
        return _DualProj(weights=pref_vector, ridge=_ridge(projector))


class DualProj(_GramAggregator, by=DualProjWeighting):
    """`fastmtl.DualProj` as TorchJD's `DualProj`. For the arguments see `DualProjWeighting`."""


class FairGradWeighting(_GramWeighting):
    """The weights of `FairGrad`: zero where no direction improves all tasks.

    Args:
        alpha: the fairness; 0 is the mean.
        max_iters: no effect.

    Raises:
        ValueError: `alpha` is negative or not finite.
    """

    @staticmethod
    def _make(alpha: float, max_iters: int | None = None) -> GramMethod:
        return _FairGrad(fairness=alpha)


class FairGrad(_GramAggregator, by=FairGradWeighting):
    """`fastmtl.FairGrad` as TorchJD's `FairGrad`. For the arguments see `FairGradWeighting`."""


class GradVacWeighting(_StatefulWeighting):
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
        return _GradVac(beta=beta)

    def forward(self, gramian: Tensor, /, *, dtype: torch.dtype | None = None) -> Tensor:
        """The weights [m]."""
        if self.method.targets is not None and self.method.targets.shape != gramian.shape:
            self.reset()
        return super().forward(gramian, dtype=dtype)


class GradVac(_StatefulAggregator, by=GradVacWeighting):
    """`fastmtl.GradVac` as TorchJD's `GradVac`. For the arguments see `GradVacWeighting`."""


class IMTLGWeighting(_GramWeighting):
    """The weights of `IMTLG`."""

    @staticmethod
    def _make() -> GramMethod:
        return methods.IMTL()


class IMTLG(_GramAggregator, by=IMTLGWeighting):
    """`fastmtl.IMTL` as TorchJD's `IMTLG`."""


class KrumWeighting(_GramWeighting):
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
        return _Krum(byzantine=n_byzantine, selected=n_selected, squared=False)


class Krum(_GramAggregator, by=KrumWeighting):
    """`fastmtl.Krum`, on distances that are not squared, as TorchJD's `Krum`. For the arguments see `KrumWeighting`."""


class MGDAWeighting(_GramWeighting):
    """The weights of `MGDA`.

    Args:
        epsilon: no effect.
        max_iters: no effect.
    """

    _differentiable = True

    @staticmethod
    def _make(epsilon: float = 0.001, max_iters: int = 100) -> GramMethod:
        return _MGDA()


class MGDA(_GramAggregator, by=MGDAWeighting):
    """`fastmtl.MGDA` as TorchJD's `MGDA`. For the arguments see `MGDAWeighting`."""


class NashMTLWeighting(_StatefulWeighting):
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


class NashMTL(_StatefulAggregator, by=NashMTLWeighting):
    """`fastmtl.NashMTL` as TorchJD's `NashMTL`. For the arguments see `NashMTLWeighting`."""


class PCGradWeighting(_GramWeighting):
    """The weights of `PCGrad`."""

    @staticmethod
    def _make() -> GramMethod:
        return _PCGrad()


class PCGrad(_GramAggregator, by=PCGradWeighting):
    """`fastmtl.PCGrad` as TorchJD's `PCGrad`."""


class UPGradWeighting(_GramWeighting):
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
        return _UPGrad(weights=pref_vector, ridge=_ridge(projector))


class UPGrad(_GramAggregator, by=UPGradWeighting):
    """`fastmtl.UPGrad` as TorchJD's `UPGrad`. For the arguments see `UPGradWeighting`."""


# ------------------------------------------------------------------------------------------------ whatever the matrix


class ConstantWeighting(_TaskWeighting):
    """The weights of `Constant`.

    Args:
        weights: the weights [m].

    Raises:
        ValueError: `weights` are no finite vector; (in a step) of another length than m.
    """

    @staticmethod
    def _make(weights: Tensor) -> GramMethod:
        return methods.Uniform(weights=weights)


class Constant(_TaskAggregator, by=ConstantWeighting):
    """`fastmtl.Uniform` as TorchJD's `Constant`. For the arguments see `ConstantWeighting`."""


class MeanWeighting(_TaskWeighting):
    """The weights of `Mean`: 1/m each."""

    @staticmethod
    def _make() -> GramMethod:
        return methods.Uniform(weights="mean")


class Mean(_TaskAggregator, by=MeanWeighting):
    """`fastmtl.Uniform` as TorchJD's `Mean`."""


class RandomWeighting(_TaskWeighting):
    """The weights of `Random`: the softmax of normal numbers, drawn anew in every step."""

    @staticmethod
    def _make() -> GramMethod:
        return methods.RLW()


class Random(_TaskAggregator, by=RandomWeighting):
    """`fastmtl.RLW` as TorchJD's `Random`."""


class SumWeighting(_TaskWeighting):
    """The weights of `Sum`: ones."""

    @staticmethod
    def _make() -> GramMethod:
        return methods.Uniform(weights="sum")


class Sum(_TaskAggregator, by=SumWeighting):
    """`fastmtl.Uniform` as TorchJD's `Sum`."""


# ------------------------------------------------------------------------------------------------ by coordinates


def _identity(P: Tensor) -> Tensor:
    return P


class GradDrop(_Configured, Aggregator):
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
