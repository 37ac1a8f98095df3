"""Data parallelism: task gradients averaged over processes, for the paths that form them."""

from __future__ import annotations

from torch import Tensor

from fastmtl.info import Info
from fastmtl.inputs import Row, describe
from fastmtl.rule import Context, Rule
from fastmtl.training.step import Options, Step, check_reached

__all__ = ["Rows", "check"]


def check(options: Options) -> None:
    """Raises ValueError for methods that cannot work on what processes have together."""
    method = options.method
    if options.process_group is None:
        return
    if not method.on_gram:
        raise ValueError(f"process_group: expected a method that works on the Gram matrix, got {describe(method)}")
    if method.needs_losses:
        raise ValueError(
            f"process_group: expected a method that needs no losses (each process has others), got {method!r}"
        )


class Rows:
    """The tasks' gradients, of which each process keeps its share of the averages."""

    def __init__(self, step: Step) -> None:
        from fastmtl import distributed  # here: not every torch is built with it

        sizes = [len(group) for group in step.groups] or None
        self._rows = distributed.AveragedRows(step.parameters, step.options.tasks, step.group, sizes)

    def append(self, row: Row) -> None:
        """Takes the next task's gradients."""
        self._rows.append(row)

    def combine(self, method: Rule, context: Context) -> tuple[list[Tensor | None], Info]:
        """The updates and the info, the same on all processes."""
        updates, info = self._rows.combine(method.solve, context)
        check_reached([updates], "shared")  # not earlier: all processes have to get there
        return updates, info
