"""T passes from the losses down to the shared parameters: the definition that other exact paths agree with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.graph import Leaves
from fastmtl.info import Info
from fastmtl.inputs import Row
from fastmtl.pipeline import aggregate_rows
from fastmtl.rule import Context, Rule
from fastmtl.training import passes
from fastmtl.training.paths import averaged, groups
from fastmtl.training.step import Outcome, Step, check_reached

__all__ = ["gather", "rows_for", "run", "takes"]


def takes(step: Step) -> bool:
    """Every step."""
    return True


def run(step: Step) -> Outcome:
    """See `Path`."""
    step = step.uncut()
    rows = rows_for(step)
    heads, own = gather(step, rows)
    updates, info = rows.combine(step.options.method, step.context)
    del rows  # free them before the gradients are committed
    return step.outcome(heads, updates, own, info)


def gather(step: Step, rows: passes.Rows) -> tuple[Leaves, list[Row]]:
    """Appends T rows of gradients of the shared parameters; returns the other leaves and their gradients."""
    step = step.uncut()
    heads = step.heads.without(step.parameters)
    with passes.without_tensor_hooks([*step.parameters, *heads.all()]):
        return heads, passes.from_losses(step.losses, step.parameters, heads, step.options.retain_graph, rows)


def rows_for(step: Step) -> Any:
    """An object that takes the tasks' gradients of the shared parameters (`append`) and aggregates them (`combine`)."""
    if step.group is not None:
        return averaged.Rows(step)
    return groups.Rows(step.groups) if step.groups else _Rows(step.parameters)


class _Rows(list[Row]):
    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        # Allocated before the T gradients: memory that outlives the step then precedes memory that does not, and the
        # heap keeps the latter for the next step (benchmarks/backward_parts.py counts the pages).
        self._results = [torch.empty_like(p) for p in parameters]

    def combine(self, method: Rule, context: Context) -> tuple[list[Tensor | None], Info]:
        check_reached(self, "shared")
        results, self._results = self._results, []
        return aggregate_rows(method, self, results, context)
