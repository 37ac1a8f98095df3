"""A method made from TorchJD's arguments, which are its attributes, as there."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from fastmtl.methods.base import Method

__all__ = ["Configured", "naming", "option_of", "repr_of"]

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
def naming(options: Mapping[str, object]) -> Iterator[None]:
    """Errors about an argument call it what it is called here."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, colon, rest = str(error).partition(": ")
        if _NAMES.get(name) not in options:
            raise
        raise type(error)(_NAMES[name] + colon + rest) from None


class Configured(nn.Module):
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
        with naming(options):
            method = type(self)._make(**options)
        if isinstance(method, nn.Module) and hasattr(self, "method"):
            method.load_state_dict(self.method.state_dict())  # another option is no reason to forget
        self.method = method
        self._options = options

    def __repr__(self) -> str:
        return repr_of(self, self._options)

    def __str__(self) -> str:
        return type(self).__name__


def _option(name: str) -> property:
    return property(lambda self: self._options[name], lambda self, value: self._set({**self._options, name: value}))


def option_of(part: str, name: str) -> property:
    """The attribute `name` of an object's attribute `part`, as its own."""
    return property(
        lambda self: getattr(getattr(self, part), name),
        lambda self, value: setattr(getattr(self, part), name, value),
    )


def repr_of(self: object, options: Mapping[str, object]) -> str:
    """As the call that makes it."""
    return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in options.items())})"
