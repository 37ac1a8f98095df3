"""TorchJD's scalarizers, computed by fastmtl: only an import line changes.

    from torchjd.scalarization import FAMO
    from fastmtl.integrations.torchjd.scalarization import FAMO

Every class has the name, the arguments and the attributes of TorchJD's, and is a `Scalarizer`: values of any shape
become one number, in their dtype. Those that do more than a weighted sum are backed by a method of
`fastmtl.scalarization`, their `method`; its state is float64, in `state_dict()`, and does not change if a value is not
finite. Values outside a formula's domain are a ValueError, where TorchJD returns whatever the formula gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchjd import Stateful
from torchjd.scalarization import Scalarizer

from fastmtl import scalarization
from fastmtl.inputs import describe, has_numbers
from fastmtl.integrations.torchjd.configured import state_of
from fastmtl.integrations.torchjd.scalars import (
    IMTLL,
    UW,
    Constant,
    Mean,
    Sum,
    check_shape,
    checked_shape,
    checked_tensor,
)
from fastmtl.options import check_number
from fastmtl.scalarization.base import Scalarization

__all__ = [
    "COSMOS",
    "DWA",
    "FAMO",
    "IMTLL",
    "PBI",
    "STCH",
    "UW",
    "Constant",
    "GeometricMean",
    "Mean",
    "Random",
    "Sum",
]


class _Behind(Scalarizer):
    """A scalarizer backed by a method of `fastmtl`, which sees the values as a vector."""

    method: Any  # None before the first step, if it needs the number of values
    _total: ClassVar[bool] = False  # whether the formula holds for all values and has no state
    _shown: tuple[str, ...] = ()  # arguments for `repr`

    def forward(self, values: Tensor, /) -> Tensor:
        """The scalar []."""
        method, flat = self._of(values), values if values.ndim == 1 else values.reshape(-1)
        if not (self._total or self._holds(flat)):
            result = method.forward(flat)
            return result if result.dtype is values.dtype else result.to(values.dtype)
        if values.dtype in (torch.float32, torch.float64):
            return method.scalar(flat)
        if not values.is_floating_point():
            raise TypeError(f"values: expected a floating tensor, got {describe(values)}")
        return method.scalar(flat.to(torch.float32)).to(values.dtype)

    def _holds(self, values: Tensor) -> bool:
        """Whether the formula holds for these values [n] and has no state."""
        return False

    def _of(self, values: Tensor) -> Scalarization:
        """The method for these values."""
        method: Any = self._modules["method"]
        return method  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._shown)})"


class GeometricMean(_Behind):
    """`fastmtl.scalarization.GLS`: the geometric mean of positive values."""

    def __init__(self) -> None:
        super().__init__()
        self.method = scalarization.GLS()

    def _holds(self, values: Tensor) -> bool:
        return has_numbers(values) and min(values.tolist(), default=0.0) > 0


class Random(_Behind):
    """`fastmtl.scalarization.RLW`: a sum with random weights, drawn anew in every step."""

    _total = True

    def __init__(self) -> None:
        super().__init__()
        self.method = scalarization.RLW()


class _Weighted(_Behind):
    """With weights and perhaps a reference of the values' shape, read anew in each step."""

    _total = True
    weights: Tensor | None
    reference: Tensor | None = None
    _stamp: list[object] | None = None  # what the method was made from

    def _of(self, values: Tensor) -> Scalarization:
        vectors: dict[str, Any] = {}
        for name in ("weights", "reference"):
            if (vector := getattr(self, name)) is not None:
                check_shape(values, vector.shape, f"the {name}")
                vectors[name] = vector
        stamp = [getattr(self, self._shown[0]), *map(state_of, vectors.values())]
        if self._stamp != stamp:
            self.method = self._method({name: _flat(vector) for name, vector in vectors.items()})
            self._stamp = stamp
        return super()._of(values)

    def _method(self, vectors: dict[str, Any]) -> Scalarization:
        raise NotImplementedError


class COSMOS(_Weighted):
    """`fastmtl.scalarization.COSMOS`.

    Args:
        lambda_: weight of the cosine.
        weights: preferences, of the values' shape.

    Raises:
        TypeError: an argument of another kind.
        ValueError: `lambda_` is negative; (in a step) values of another shape.
    """

    _shown = ("lambda_", "weights")

    def __init__(self, lambda_: float, weights: Tensor) -> None:
        super().__init__()
        check_number(lambda_, "lambda_", low=0)
        self.lambda_ = lambda_
        self.weights = checked_tensor(weights, "weights")

    def _method(self, vectors: dict[str, Any]) -> Scalarization:
        return scalarization.COSMOS(lam=self.lambda_, **vectors)


class PBI(_Weighted):
    """`fastmtl.scalarization.PBI`.

    Args:
        theta: weight of the distance to the direction.
        weights: the direction, of the values' shape.
        reference: ideal point, of the values' shape; None for zeros.

    Raises:
        TypeError: an argument of another kind.
        ValueError: `theta` is negative; (in a step) values of another shape.
    """

    _shown = ("theta", "weights", "reference")

    def __init__(self, theta: float, weights: Tensor, reference: Tensor | None = None) -> None:
        super().__init__()
        check_number(theta, "theta", low=0)
        self.theta = theta
        self.weights = checked_tensor(weights, "weights")
        self.reference = checked_tensor(reference, "reference")

    def _method(self, vectors: dict[str, Any]) -> Scalarization:
        return scalarization.PBI(theta=self.theta, **vectors)


class STCH(_Weighted):
    """`fastmtl.scalarization.STCH`.

    Args:
        mu: smoothing.
        weights: preferences, of the values' shape; None for equal ones that sum to one.
        reference: ideal point, of the values' shape; None for zeros.

    Raises:
        TypeError: an argument of another kind.
        ValueError: `mu` is not positive; (in a step) values of another shape.
    """

    _shown = ("mu", "weights", "reference")

    def __init__(self, mu: float, weights: Tensor | None = None, reference: Tensor | None = None) -> None:
        super().__init__()
        check_number(mu, "mu", above=0)
        self.mu = mu
        self.weights = checked_tensor(weights, "weights")
        self.reference = checked_tensor(reference, "reference")

    def _method(self, vectors: dict[str, Any]) -> Scalarization:
        return scalarization.STCH(mu=self.mu, **vectors)


class DWA(_Behind, Stateful):
    """`fastmtl.scalarization.DWA`; call `step()` at the end of every epoch.

    Args:
        temperature: the larger, the more even the weights.

    Raises:
        TypeError: `temperature` is not a number.
        ValueError: it is not positive; (in a step) values of another shape than before, or negative ones.
    """

    _shown = ("temperature",)

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        self.method = None
        self._values: torch.Size | None = None
        self.temperature = temperature

    @property
    def temperature(self) -> float:
        """The temperature."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        check_number(value, "temperature", above=0)
        self._temperature = value
        if self.method is not None:
            self.method.temperature = value

    def _of(self, values: Tensor) -> Scalarization:
        if self._values not in (None, values.shape):
            check_shape(values, self._values or (), "those before; reset() begins anew")
        if self.method is None:
            self.method = scalarization.DWA(max(values.numel(), 1), temperature=self.temperature)
            self.method.to(values.device).train(self.training)
        self._values = values.shape
        return super()._of(values)

    def step(self) -> None:
        """Ends an epoch."""
        if self.method is not None:
            self.method.end_epoch()

    def reset(self) -> None:
        """Forgets all values, and their shape."""
        self.method, self._values = None, None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        total = state_dict.get(f"{prefix}method.total")
        if total is not None and (self.method is None or self.method.tasks != len(total)):
            self.method = scalarization.DWA(len(total), temperature=self.temperature).to(total.device)
            self.method.load_state_dict({
                key.removeprefix(f"{prefix}method."): value
                for key, value in state_dict.items()
                if key.startswith(f"{prefix}method.")
            })  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, *args)


class FAMO(_Behind, Stateful):
    """`fastmtl.scalarization.FAMO`; call `update(values)` after the optimizer's step.

    Args:
        shape: of the values; an int n is (n,).
        min_losses: lower bounds of this shape; None for zeros.
        lr: learning rate of the weights.
        weight_decay: their weight decay.

    Raises:
        TypeError: an argument of another kind.
        ValueError: `lr` or `weight_decay` is negative, `min_losses` of another shape; (in a step) values of another
            shape, or below their bounds.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        min_losses: Tensor | None = None,
        lr: float = 0.025,
        weight_decay: float = 1e-3,
    ) -> None:
        super().__init__()
        self._shape = checked_shape(shape)
        if min_losses is not None:
            check_shape(min_losses, self._shape, "the weights", "min_losses")
        n = max(math.prod(self._shape), 1)
        self.method = scalarization.FAMO(n, lr=lr, weight_decay=weight_decay, min_losses=_flat(min_losses))

    @property
    def min_losses(self) -> Tensor:
        """The lower bounds."""
        return self.method.min_losses.reshape(self._shape)  # type: ignore[no-any-return]

    @property
    def lr(self) -> float:
        """The learning rate."""
        return self.method.lr  # type: ignore[no-any-return]

    @lr.setter
    def lr(self, value: float) -> None:
        self.method.lr = value

    @property
    def weight_decay(self) -> float:
        """The weight decay."""
        return self.method.weight_decay  # type: ignore[no-any-return]

    @weight_decay.setter
    def weight_decay(self, value: float) -> None:
        self.method.weight_decay = value

    def _of(self, values: Tensor) -> Scalarization:
        check_shape(values, self._shape, "the weights")
        return super()._of(values)

    def update(self, values: Tensor, /) -> None:
        """Learns from the values of the same batch, recomputed after the step.

        Raises:
            ValueError: there was no call before, or values of another shape.
        """
        check_shape(values, self._shape, "the weights")
        method: Any = self._modules["method"]
        if not method.called:
            raise ValueError("update: expected a call of the scalarizer before, got none")
        method.update(values.detach().reshape(-1))

    def reset(self) -> None:
        """Returns to equal weights."""
        self.method.reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self._shape}, lr={self.lr}, weight_decay={self.weight_decay})"


def _flat(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.detach().reshape(-1)
