"""What an operation saved for its backward, and which of these attributes a formula takes into account."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

__all__ = ["Saved", "attributes", "is_builtin", "is_plain"]

_PREFIX = "_saved_"


@functools.cache
def attributes(kind: Any) -> tuple[str, ...]:
    """The names of the attributes that nodes of this type save."""
    return tuple(name.removeprefix(_PREFIX) for name in dir(kind) if name.startswith(_PREFIX))


def is_builtin(node: Any) -> bool:
    """Whether the operation is one of autograd's own: linear in the cotangents, and without code in Python."""
    return getattr(torch._C._functions, type(node).__name__, None) is type(node)


class Saved:
    """A formula's declaration, without which it is not used, so that nothing is overlooked silently.

    Args:
        read: attributes that the formula reads, or that do not matter to the gradient that it is for.
        neutral: attributes that it does not take into account, with the value that has no effect.
    """

    def __init__(self, *read: str, **neutral: object) -> None:
        self.read: frozenset[str] = frozenset(read)
        self.neutral: dict[str, object] = neutral
        self._to_compare: dict[Any, list[str] | None] = {}

    def covers(self, node: Any) -> bool:
        """Whether the formula is that of this node: every attribute is read, or neutral."""
        kind: Any = type(node)
        if kind not in self._to_compare:
            rest = [name for name in attributes(kind) if name not in self.read]
            self._to_compare[kind] = rest if self.neutral.keys() >= set(rest) else None
        names = self._to_compare[kind]
        return names is not None and all(getattr(node, _PREFIX + name) == self.neutral[name] for name in names)


def is_plain(x: Tensor, device: torch.device) -> bool:
    """Whether `x` is an ordinary dense tensor on this device."""
    return (
        type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided and not x.is_nested and x.device == device
    )
