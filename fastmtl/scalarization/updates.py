"""Arguments of `update`, for methods that need more than the losses: an entry per task, and the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor, nn

from fastmtl.scalarization.base import Scalarization

__all__ = ["Entries", "in_order", "trainable"]

# A tensor for each task or None, in the order of the tasks or by their names.
Entries: TypeAlias = "Sequence[Tensor | None] | Mapping[str, Tensor | None]"


def in_order(method: Scalarization, entries: Entries, what: str) -> Sequence[Tensor | None]:
    """The T entries in the order of the method's tasks, whose names it keeps.

    Raises:
        ValueError: names of other tasks, or not T entries; `what` they are is in the message.
    """
    if isinstance(entries, Mapping):
        order = method.names or tuple(entries)
        if set(order) != set(entries):
            raise ValueError(f"{what}: expected those of {', '.join(order)}, got {', '.join(entries)}")
        method.names = order
        entries = [entries[name] for name in order]
    if len(entries) != method.tasks:
        raise ValueError(f"{what}: expected {method.tasks} (the number of tasks), got {len(entries)}")
    return entries


def trainable(parameters: nn.Module | Iterable[Tensor]) -> list[Tensor]:
    """The parameters that require grad.

    Raises:
        ValueError: there are none.
    """
    found = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    trained = [p for p in found if p.requires_grad]
    if not trained:
        raise ValueError("parameters: expected at least one that requires grad, got none")
    return trained
