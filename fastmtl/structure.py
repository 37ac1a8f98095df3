"""Nested structures of tensors: what an encoder may return (tensor, tuple, list, dict, named tuple, dataclass)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

__all__ = ["map_tensors", "tensors_of"]


def tensors_of(structure: Any) -> Iterator[Tensor]:
    """The tensors of a structure, in the order in which `map_tensors` visits them."""
    if isinstance(structure, Tensor):
        yield structure
        return
    parts: Any = ()
    if dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        parts = _fields_of(structure).values()
    elif isinstance(structure, Mapping):
        parts = structure.values()
    elif isinstance(structure, (list, tuple)):
        parts = structure
    for part in parts:
        yield from tensors_of(part)


def map_tensors(function: Callable[[Tensor], Any], structure: Any) -> Any:
    """The same structure with `function(x)` for every tensor x; anything else is passed on as it is.

    A container in which nothing changes is passed on itself, so that whoever holds it can still write into it.
    """
    if isinstance(structure, Tensor):
        return function(structure)
    if dataclasses.is_dataclass(structure) and not isinstance(structure, type):  # Hugging Face's outputs, for one
        fields = _fields_of(structure)
        parts = {name: map_tensors(function, part) for name, part in fields.items()}
        return structure if _same(fields.values(), parts.values()) else dataclasses.replace(structure, **parts)
    if isinstance(structure, Mapping):
        items = {key: map_tensors(function, value) for key, value in structure.items()}
        if _same(structure.values(), items.values()):
            return structure
        if type(structure) is dict:
            return items
        if isinstance(structure, MutableMapping):  # a copy keeps whatever else it holds, such as a default
            result = copy.copy(structure)
            result.update(items)
            return result
        return type(structure)(items)  # type: ignore[call-arg]
    if isinstance(structure, (list, tuple)):
        mapped = [map_tensors(function, part) for part in structure]
        if _same(structure, mapped):
            return structure
        return type(structure)(*mapped) if hasattr(structure, "_fields") else type(structure)(mapped)
    return structure


def _fields_of(structure: Any) -> dict[str, Any]:
    """A dataclass's arguments; it makes its other fields itself."""
    return {field.name: getattr(structure, field.name) for field in dataclasses.fields(structure) if field.init}


def _same(parts: Iterable[Any], others: Iterable[Any]) -> bool:
    return all(part is other for part, other in zip(parts, others, strict=True))
