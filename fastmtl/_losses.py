"""The T losses of a step, and which tasks are absent in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastmtl._inputs import describe

__all__ = ["checked", "present"]


def checked(losses: Any, tasks: int | None = None) -> list[Tensor | None]:
    """T scalar losses, None for a task that has none in this step.

    Args:
        losses: a sequence of scalar floating tensors or None, one a task in the order of the tasks.
        tasks: how many there have to be; None for any number.

    Raises:
        TypeError: no sequence, or an entry that is neither a floating tensor nor None.
        ValueError: none, another number than T, or an entry of several elements.
    """
    if not isinstance(losses, (list, tuple)):
        raise TypeError(f"losses: expected a sequence of T scalar tensors, got {describe(losses)}")
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
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            raise TypeError(f"losses[{t}]: expected a floating scalar tensor, or None, got {describe(loss)}")
        if loss.numel() != 1:
            raise ValueError(f"losses[{t}]: expected a scalar (one element), got {describe(loss)}")
    return list(losses)


def present(losses: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The losses of the tasks that take part, None for the absent: those whose loss is None or needs no gradient."""
    return [loss if loss is not None and loss.requires_grad else None for loss in losses]
