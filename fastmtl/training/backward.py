"""From T losses to `.grad`: arguments are checked once, one path brings the gradients, one commit writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastmtl.info import Info
from fastmtl.inputs import Losses, check_losses, names_of, present_losses
from fastmtl.rule import Rule, names_in_order
from fastmtl.training import paths
from fastmtl.training.commit import commit
from fastmtl.training.parameters import Parameters
from fastmtl.training.step import Engine, Options, Outcome, Step, prepare

__all__ = ["backward"]


def backward(
    method: Rule,
    losses: Losses,
    shared: Parameters | None = None,
    *,
    representation: Any = None,
    features: Any = None,
    batched: bool = False,
    groups: Sequence[Parameters] | None = None,
    scale_heads: bool = False,
    retain_graph: bool = False,
    process_group: Any = None,
    grad_scale: Tensor | float | None = None,
    engine: Engine = "full",
) -> Info:
    """What is behind `Method.backward`, for any rule: see there. Nothing is written before `commit`."""
    names = names_in_order(method, names_of(losses))
    tasks = present_losses(check_losses(losses, names=names))
    method.check_tasks(len(tasks))
    group = None if process_group is False else process_group
    options = Options(
        method, len(tasks), shared, representation, features, batched, groups, scale_heads, retain_graph, group, engine
    )
    paths.check(options)
    updates, info, reached = _run(prepare(options, tasks, grad_scale, unsaid=process_group is None))
    info.names = names
    commit(updates, reached)
    return info


def _run(step: Step) -> Outcome:
    for path in paths.PATHS:
        if path.takes(step):
            outcome = path.run(step)
            if outcome is not None:
                return outcome
    raise AssertionError("full takes every step")
