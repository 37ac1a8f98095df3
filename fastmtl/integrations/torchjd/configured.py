"""A method made from TorchJD's arguments, which are attributes as there: setting or modifying them takes effect."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torchjd.linalg import DualConeProjector

from fastmtl.methods.base import Method
from fastmtl.options import number, plain

__all__ = ["Configured", "argument", "at_least", "naming", "part_of", "positive", "state_of", "suffix_of"]

# fastmtl's names of options, as its messages use them, and TorchJD's.
_NAMES = {
    "weights": "pref_vector",
    "scale": "scale_mode",
    "fairness": "alpha",
    "byzantine": "n_byzantine",
    "selected": "n_selected",
    "every": "update_weights_every",
    "trim": "trim_number",
    "lam": "lambda_",
    "iterations": "n_iter",
    "step_size": "robust_step_size",
    "warmup": "n_warmup_steps",
}

Check = Callable[[Any, str], Any]


@contextlib.contextmanager
def naming(options: Mapping[str, object]) -> Iterator[None]:
    """Within this context, errors about an argument use TorchJD's name for it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, colon, rest = str(error).partition(": ")
        if _NAMES.get(name) not in options:
            raise
        raise type(error)(_NAMES[name] + colon + rest) from None


class Configured(nn.Module):
    """A method made from TorchJD's arguments; a subclass defines `_make`."""

    _kept: ClassVar[dict[str, str]] = {}  # TorchJD's names of the method's state, for `state_dict()`

    _extra: ClassVar[dict[str, object]] = {}  # arguments that TorchJD's class lacks, and their defaults

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._options: dict[str, Any] = {}
        self._set(options)

    def _make(self, options: Mapping[str, Any]) -> Method:
        """The method for these arguments."""
        raise NotImplementedError

    @property
    def method(self) -> Any:
        """The method of `fastmtl` behind this."""
        if self._stamp != [state_of(value) for value in self._options.values()]:
            self._set({})  # a vector or projector was modified in place
        return self._modules["method"]

    def _set(self, changed: dict[str, Any]) -> None:
        checks = type(self)._checks()
        new = {name: checks[name](plain(value), name) for name, value in changed.items()}
        options = {**self._options, **new}
        with naming(options):
            method = self._make(options)
        before = self._modules.get("method")
        if before is not None:
            method.load_state_dict(before.state_dict())  # changing an option must not reset the state
            method.train(self.training)
        self._modules["method"] = method
        self._options = options
        self._stamp = [state_of(value) for value in options.values()]

    @classmethod
    def _checks(cls) -> dict[str, Check]:
        return {name: x._check for kind in cls.__mro__ for name, x in vars(kind).items() if isinstance(x, _Argument)}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for mine, its in self._kept.items():
            value = getattr(self._modules["method"], mine)
            if value is not None:
                destination[prefix + its] = value if keep_vars else value.detach()

    def state_dict(self, *args: Any, **keywords: Any) -> Any:
        """The state, under TorchJD's names where they exist."""
        state = super().state_dict(*args, **keywords)
        prefix = keywords.get("prefix", "")
        for mine in self._kept:
            state.pop(f"{prefix}method.{mine}", None)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for mine, its in self._kept.items():
            if prefix + its in state_dict:
                state_dict[f"{prefix}method.{mine}"] = state_dict.pop(prefix + its)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _arguments(self) -> str:
        """The arguments as in a call; of those that TorchJD lacks, only the ones that differ from the default."""
        shown = {
            name: value
            for name, value in self._options.items()
            if name not in self._extra or self._extra[name] != value
        }
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._arguments()})"

    def __str__(self) -> str:
        return type(self).__name__


class _Argument:
    def __init__(self, check: Check) -> None:
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else instance._options[self._name]

    def __set__(self, instance: Any, value: Any) -> None:
        instance._set({self._name: value})


def argument(check: Check = lambda value, name: value) -> Any:
    """An attribute that is an argument; `check` returns the value to keep, or raises."""
    return _Argument(check)


def at_least(low: float) -> Check:
    """Accepts numbers of at least `low`, unchanged."""
    return _as_it_is(number(low=low))


def positive(value: Any, name: str) -> Any:
    """Accepts numbers > 0, unchanged."""
    return _as_it_is(number(above=0))(value, name)


def _as_it_is(check: Check) -> Check:
    def checked(value: Any, name: str) -> Any:
        check(value, name)
        return value

    return checked


def part_of(part: str, name: str) -> Any:
    """A property for the attribute `name` of the attribute `part`."""
    return property(
        lambda self: getattr(getattr(self, part), name),
        lambda self, value: setattr(getattr(self, part), name, value),
    )


def suffix_of(vector: Tensor | None) -> str:
    """A vector as `str` shows it in TorchJD: ([0.5, 1., 2.]); empty for None."""
    return "" if vector is None else f"([{', '.join(f'{x:.2f}'.rstrip('0') for x in vector.tolist())}])"


def state_of(value: object) -> object:
    """Something that changes when the value is modified in place."""
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, DualConeProjector):
        return id(value), getattr(value, "reg_eps", None)
    return None
