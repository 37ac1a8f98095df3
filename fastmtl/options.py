"""Options of methods: checked in one place, by the constructor and wherever they are set later."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from fastmtl.inputs import describe

__all__ = [
    "Array",
    "Copies",
    "Numbers",
    "Weights",
    "check_number",
    "check_weights",
    "choice",
    "flag",
    "fractions",
    "generator",
    "integer",
    "number",
    "numbers",
    "option",
    "plain",
    "show_weights",
    "weights",
]


class Array(Protocol):
    """A NumPy array, or anything that can become one."""

    def __array__(self) -> Any: ...


Numbers: TypeAlias = Tensor | Sequence[float] | Array
Weights: TypeAlias = Tensor | Sequence[float] | Array | Literal["mean", "sum"] | None

_PLAIN = (Tensor, torch.nn.Parameter)
# Returns the value to keep; raises TypeError or ValueError that name the option, what is expected and what came.
Check = Callable[[Any, str], Any]


class _Option:
    # Without `__get__`, reads find the value in the instance like any attribute, and cost nothing extra.
    def __init__(self, check: Check, fixed: bool) -> None:
        self._check, self._fixed = check, fixed

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __set__(self, instance: Any, value: Any) -> None:
        if self._fixed and self._name in instance.__dict__:
            kept = instance.__dict__[self._name]
            raise AttributeError(f"{self._name}: expected to stay {kept!r}, which the state depends on: make a new one")
        instance.__dict__[self._name] = self._check(value, self._name)


def option(check: Check, fixed: bool = False) -> Any:
    """An attribute that holds what `check` makes of a value; if `fixed`, it can only be set once."""
    return _Option(check, fixed)


def plain(value: Any) -> Any:
    """A NumPy number as a Python number, an array as a tensor, anything else as it is."""
    if isinstance(value, (Tensor, type)) or not hasattr(value, "__array__"):
        return value
    array = value.__array__()
    if array.ndim == 0:
        return array.item()
    try:
        return torch.from_numpy(array.copy())  # a copy, and without negative strides
    except TypeError:  # an array of objects or strings
        return value


def choice(*values: Any) -> Check:
    """One of these values."""

    def check(value: Any, name: str) -> Any:
        value = plain(value)
        if isinstance(value, Tensor) or value not in values:
            got = describe(value) if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, values))}, got {got}")
        return values[values.index(value)]

    return check


def check_number(
    value: object,
    name: str,
    *,
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
    below: float = math.inf,
    optional: bool = False,
) -> float | None:
    """`value` as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not finite, or not within the bounds: `low` and `high` included, `above` and `below` not.
    """
    other = " or None" if optional else ""
    if optional and value is None:
        return None
    value = plain(value)
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number{other}, got {describe(value)}")
    x = float(value)
    if not (math.isfinite(x) and above < x < below and low <= x <= high):
        bounds = f" in [{low:g}, {high:g}]" if high < math.inf else f" > {above:g}" if above > -math.inf else ""
        bounds = bounds or (
            f" in [{low:g}, {below:g})" if below < math.inf else f" >= {low:g}" if low > -math.inf else ""
        )
        raise ValueError(f"{name}: expected a finite number{bounds}{other}, got {value!r}")
    return x


def number(**bounds: Any) -> Check:
    """A finite number within bounds, as a float: see `check_number`."""
    return lambda value, name: check_number(value, name, **bounds)


def integer(low: int, optional: bool = False) -> Check:
    """An integer of at least `low`."""
    other = " or None" if optional else ""

    def check(value: Any, name: str) -> int | None:
        if optional and value is None:
            return None
        value = plain(value)
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an integer >= {low}{other}, got {describe(value)}")
        if value < low:
            raise ValueError(f"{name}: expected an integer >= {low}{other}, got {value!r}")
        return int(value)

    return check


def flag(value: Any, name: str) -> bool:
    """True or False."""
    value = plain(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")
    return value


def generator(value: Any, name: str) -> torch.Generator | None:
    """A source of randomness, or None."""
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"{name}: expected a torch.Generator or None, got {describe(value)}")
    return value


def numbers(value: object, name: str, what: str = "T numbers", tasks: int | None = None, shape: str = "") -> Tensor:
    """A float64 copy [T] of `value`: of a tensor on its device, else on the CPU, whatever the default device.

    Args:
        value: T finite numbers: a tensor, an array or a sequence.
        name: the option.
        what: what is expected, for messages.
        tasks: T; None for any.
        shape: allows a single number, which becomes a tensor []; the expected shape, for messages.

    Raises:
        TypeError: they are no numbers.
        ValueError: they have another shape, or are not finite.
    """
    value = plain(value)
    if shape and isinstance(value, Real) and not isinstance(value, bool):
        value = torch.tensor(float(value), dtype=torch.float64, device="cpu")
    if not isinstance(value, (Tensor, list, tuple)) or (isinstance(value, Tensor) and value.is_meta):
        raise TypeError(f"{name}: expected {what}, got {describe(value)}")
    device = value.device if isinstance(value, Tensor) else "cpu"
    try:
        x = torch.as_tensor(value, dtype=torch.float64, device=device).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected {what}, got {value!r}") from error
    fits = x.ndim == 1 and x.shape[0] > 0 and tasks in (None, x.shape[0])
    if not fits and not (shape and x.ndim == 0):
        shape = shape or f"shape [{tasks or 'T'}]"
        raise ValueError(f"{name}: expected {shape}, got shape {list(x.shape)}")
    if x.device.type == "cpu" and not bool(x.isfinite().all()):  # on a device the host would wait
        raise ValueError(f"{name}: expected finite numbers, got {x.tolist()}")
    return x


def fractions(value: object, name: str, what: str, shape: str) -> float | Tensor:
    """One number in [0, 1] as a float, or several as a float64 tensor: see `numbers`."""
    x = numbers(value, name, what, shape=shape)
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(f"{name}: expected numbers within [0, 1], got {x.tolist()}")
    return x if x.ndim else x.item()


def weights(value: Any, name: str) -> Tensor | str:
    """Task weights: "mean" (also for None), "sum", or T numbers as a float64 tensor [T]."""
    what = 'None, "mean", "sum" or T numbers'
    if value is None or isinstance(value, str):
        if value not in (None, "mean", "sum"):
            raise ValueError(f"{name}: expected {what}, got {value!r}")
        return value or "mean"
    return numbers(value, name, what)


def check_weights(weights: Tensor | str | float, T: int, name: str = "weights") -> None:
    """Raises ValueError if these are numbers for another number of tasks than T."""
    if isinstance(weights, Tensor) and weights.shape[0] != T:
        raise ValueError(
            f"{name}: expected length {T} (the number of tasks), got {weights.shape[0]}; "
            "pass None for a task that is absent, so that the others keep their places"
        )


def show_weights(weights: Tensor | str | float | None) -> str:
    """Weights as `repr` shows them: a word or numbers."""
    return str(weights.tolist()) if isinstance(weights, Tensor) else repr(weights)


class Copies:
    """Copies of an option's numbers, one per device that gradients came from: making one makes the host wait.

    A copied or pickled method starts without any.
    """

    def __init__(self) -> None:
        self._placed: dict[tuple[Tensor | int, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self._placed)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Copies, ()

    def get(self, what: Tensor | int, like: Tensor) -> Tensor:
        """These numbers, or that many ones in float64, on the device of `like`."""
        if isinstance(what, Tensor) and what.device == like.device:
            return what
        # A compiled or captured graph owns what it allocates, and a fake tensor has no numbers.
        if torch.compiler.is_compiling() or type(like) not in _PLAIN:
            return _new(what, like)
        placed = self._placed.get((what, like.device))
        if placed is None:
            if like.is_cuda and torch.cuda.is_current_stream_capturing():
                return _new(what, like)
            with torch.inference_mode(False):
                host = what.cpu() if isinstance(what, Tensor) else torch.ones(what, dtype=torch.float64, device="cpu")
                placed = host.to(like.device)  # from the host: complete for every stream when it returns
            if type(placed) is Tensor:
                self._placed[what, like.device] = placed
        return placed


def _new(what: Tensor | int, like: Tensor) -> Tensor:
    return what.to(like.device) if isinstance(what, Tensor) else like.new_ones(what, dtype=torch.float64)
