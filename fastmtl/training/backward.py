"""From T losses to `.grad`: arguments are checked once, one path computes the gradients, one commit writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from fastmtl import once
from fastmtl.gramian.examples import Per
from fastmtl.info import Info
from fastmtl.losses import Losses, check_losses, names_of, present_losses
from fastmtl.rule import Rule, names_in_order
from fastmtl.training import paths
from fastmtl.training.commit import commit
from fastmtl.training.parameters import Heads, Parameters, checked_heads
from fastmtl.training.paths import amortised, per_example
from fastmtl.training.step import Engine, Options, Outcome, Step, prepare

__all__ = ["backward"]

_NEAR = 8  # how many operations behind the losses are examined


def backward(
    method: Rule,
    losses: Losses,
    shared: Parameters | None = None,
    *,
    representation: Any = None,
    features: Any = None,
    batched: bool = False,
    groups: Sequence[Parameters] | None = None,
    scale_heads: Heads = False,
    retain_graph: bool = False,
    process_group: Any = None,
    grad_scale: Tensor | float | None = None,
    engine: Engine = "full",
    every: int | Literal["auto"] = 1,
    batch_dim: int | None = None,
    per: Per = "all",
    check: bool = True,
) -> Info:
    """The implementation of `Method.backward`, for any rule. Nothing is written before `commit`."""
    names, tasks, T = _tasks(method, losses, batch_dim, per)
    method.check_tasks(T)
    scaled, heads = checked_heads(scale_heads, T)
    options = Options(
        *(method, T, shared, representation, features, batched, groups, scaled, retain_graph),
        *(None if process_group is False else process_group, engine, every, batch_dim, per, check, heads),
    )
    paths.check(options)
    if isinstance(losses, Tensor) and batch_dim is None and shared is representation is groups is None:
        _warn_of_arithmetic(losses)
    step = amortised.scheduled(prepare(options, tasks, grad_scale, unsaid=process_group is None))
    updates, info, reached = _run(step)
    info.names = names
    commit(updates, reached)
    amortised.keep(step, info)
    return info


def _tasks(
    method: Rule, losses: Losses, batch_dim: int | None, per: Per
) -> tuple[tuple[str, ...] | None, list[Tensor | None], int]:
    """The tasks' names, the losses, and how many of them are aggregated together."""
    if batch_dim is not None:
        each = per_example.checked_losses(losses, batch_dim)
        T, B = each.shape
        return None, [each], {"example": T, "task": B}.get(per, T * B)
    names = names_in_order(method, names_of(losses))
    tasks = present_losses(check_losses(losses, names=names))
    return names, tasks, len(tasks)


def _warn_of_arithmetic(losses: Tensor) -> None:
    """Warns if something was computed on the losses after they were stacked: every entry then reaches all of them."""
    nodes, seen = [losses.grad_fn], 0
    while nodes and seen < _NEAR:
        node, seen = nodes.pop(0), seen + 1
        following = [] if node is None else [edge[0] for edge in node.next_functions]
        if type(node).__name__ in ("StackBackward0", "CatBackward0") and len(following) == len(losses) > 1:
            if node is not losses.grad_fn:
                once.warn(
                    "losses computed with",
                    once.caller(),
                    "losses: autograd cannot tell these losses apart, because an operation followed their stacking: "
                    "each seems to reach every head, so all parameters count as shared. Name the shared ones, or pass "
                    "a list",
                )
            return
        nodes += following


def _run(step: Step) -> Outcome:
    for path in paths.PATHS:
        if path.takes(step):
            outcome = path.run(step)
            if outcome is not None:
                return outcome
    raise AssertionError("full takes every step")
