"""The losses of a step: T scalars in the order of the tasks, or by their names; None for a task that is absent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor

from fastmtl.inputs import DTYPES, describe

__all__ = [
    "Losses",
    "check_losses",
    "check_names",
    "is_whole",
    "names_of",
    "present_losses",
    "stack_losses",
    "with_history",
]

# T task losses, None for a task that is absent: in the order of the tasks, or by their names.
Losses: TypeAlias = "Sequence[Tensor | None] | Mapping[str, Tensor | None] | Tensor"


def check_losses(losses: Any, tasks: int | None = None, names: tuple[str, ...] | None = None) -> list[Tensor | None]:
    """T scalar losses in the order of the tasks, None for a task that has none in this step.

    Args:
        losses: a list or tuple of scalar floating tensors or None, a floating tensor [T], or a dict of them by `names`.
        tasks: how many there have to be; None for any number.
        names: the tasks' names; None where they have none.

    Raises:
        TypeError: something else, a dict for tasks without names, or an entry that is neither a floating tensor nor
            None.
        ValueError: a tensor of another shape, no loss, another number than T, names that are missing or not known, or
            an entry of several elements.
    """
    if not isinstance(losses, (list, tuple)):
        if isinstance(losses, Mapping):
            losses = _by_name(losses, names)
        elif not isinstance(losses, Tensor):
            raise TypeError(
                f"losses: expected a sequence of T scalar tensors, tensor [T] or dict by task, got {describe(losses)}"
                + ("; pass the dict itself, or a list" if isinstance(losses, Iterable) else "")
            )
        elif losses.layout is not torch.strided:
            raise TypeError(f"losses: expected a dense tensor of shape [T], got {describe(losses)}")
        elif losses.ndim != 1:
            raise ValueError(f"losses: expected T scalars or a tensor of shape [T], got {describe(losses)}")
        else:
            losses = _entries(losses)
    if not losses:
        raise ValueError("losses: expected at least one loss (T >= 1), got an empty sequence")
    if tasks is not None and len(losses) != tasks:
        raise ValueError(
            f"losses: expected {tasks}, one for each task in the order of the tasks (None for one that is absent), "
            f"got {len(losses)}"
        )
    for t, loss in enumerate(losses):
        if loss is None:
            continue
        if not isinstance(loss, Tensor) or loss.dtype not in DTYPES or loss.layout is not torch.strided:
            raise TypeError(f"losses[{t}]: expected a floating scalar tensor, or None, got {describe(loss)}")
        if loss.numel() != 1:
            raise ValueError(f"losses[{t}]: expected a scalar (one element), got {describe(loss)}")
    return list(losses)


def stack_losses(
    losses: Any, tasks: int | None = None, names: tuple[str, ...] | None = None, absent: float = 0.0
) -> Tensor:
    """The losses as one tensor [T] with their graph, `absent` for None.

    Raises:
        TypeError: as `check_losses`.
        ValueError: as `check_losses`, or losses on several devices.
    """
    if _is_vector(losses) and tasks in (None, losses.shape[0]):
        result: Tensor = losses
        return result
    parts = check_losses(losses, tasks, names)
    first = next(((t, loss) for t, loss in enumerate(parts) if loss is not None), None)
    if first is None:
        return torch.full((len(parts),), absent, device="cpu")
    for t, loss in enumerate(parts):
        if loss is not None and loss.device != first[1].device:
            raise ValueError(
                f"losses[{t}]: expected a loss on {first[1].device} as losses[{first[0]}], got {describe(loss)}"
            )
    filler = first[1].new_full((), absent, requires_grad=False)  # made on the device, not copied there
    return torch.stack([filler if loss is None else loss.reshape(()) for loss in parts])


def is_whole(losses: object) -> TypeGuard[Tensor]:
    """Whether these are losses [T] that show at once that all tasks are present."""
    return _is_vector(losses) and (torch.compiler.is_compiling() or not _is_stack(losses))


def _is_vector(losses: object) -> TypeGuard[Tensor]:
    if not isinstance(losses, Tensor) or losses.dtype not in DTYPES or losses.layout is not torch.strided:
        return False
    return losses.ndim == 1 and losses.numel() > 0


def _is_stack(losses: Tensor) -> bool:
    return type(losses.grad_fn).__name__ == "StackBackward0"


def _entries(losses: Tensor) -> list[Tensor]:
    """The entries of losses [T]; one that was a constant before they were stacked requires no grad."""
    if torch.compiler.is_compiling():
        return list(losses.unbind())
    with with_history():
        parts = losses.unbind()
    if not _is_stack(losses):
        return list(parts)
    stacked: Any = losses.grad_fn
    edges = stacked.next_functions
    return [part.detach() if node is None else part for part, (node, _) in zip(parts, edges, strict=True)]


@contextmanager
def with_history() -> Iterator[None]:
    """Within, views of losses are part of their graph: like any backward, a step may be called without gradients."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _by_name(losses: Mapping[Any, Any], names: tuple[str, ...] | None) -> list[Any]:
    if not losses:
        return []
    if names is None:
        raise TypeError(
            f"losses: expected a list, tuple or tensor [T] for tasks without names, got {describe(losses)}; "
            'tasks=("seg", "depth") in place of tasks=2 gives them names'
        )
    unknown = [name for name in losses if name not in names]
    missing = [name for name in names if name not in losses]
    if unknown or missing:
        got = f"an unknown {unknown[0]!r}" if unknown else f"none for {missing[0]!r} (None says that it is absent)"
        raise ValueError(f"losses: expected one for each of {', '.join(map(repr, names))}, got {got}")
    return [losses[name] for name in names]


def names_of(losses: object) -> tuple[str, ...] | None:
    """The names of the tasks, where losses come by names."""
    return check_names(losses, "losses") if isinstance(losses, Mapping) and losses else None


def check_names(names: Iterable[Any], option: str) -> tuple[str, ...]:
    """T names of tasks.

    Raises:
        TypeError: one of them is not a string.
        ValueError: one comes twice.
    """
    found = tuple(names)
    for name in found:
        if not isinstance(name, str):
            raise TypeError(f"{option}: expected names of tasks (strings), got {describe(name)}")
    if len(set(found)) < len(found):
        raise ValueError(f"{option}: expected different names, got {', '.join(map(repr, found))}")
    return found


def present_losses(losses: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The losses of the tasks that take part, None for the absent: those whose loss is None or needs no gradient."""
    return [loss if loss is not None and loss.requires_grad else None for loss in losses]
