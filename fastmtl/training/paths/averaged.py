"""Data parallelism: task gradients averaged over processes, for the paths that form them."""

from __future__ import annotations

from torch import Tensor

from fastmtl.info import Info
from fastmtl.inputs import Row
from fastmtl.rule import Context, Rule
from fastmtl.training.step import Options, Step, check_reached, check_together

__all__ = ["Rows", "check"]


def check(options: Options) -> None:
    """Raises ValueError for methods that cannot aggregate what several processes have."""
    if options.process_group is not None:
        check_together(options.method)


class Rows:
    """The tasks' gradients averaged over processes, each of which keeps its share."""

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
        check_reached([updates], "shared")  # only now: all processes have to take part in the above
        return updates, info
