"""Backward passes that return gradients without writing any: from the losses, or from cotangents at features.

`integrations.libmtl` is built on these too, and on `training.commit`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from fastmtl.graph import Leaves, nothing_behind, vjp
from fastmtl.inputs import Row

__all__ = ["Rows", "from_cotangents", "from_cotangents_at_once", "from_losses", "without_tensor_hooks"]


class Rows(Protocol):
    """Anything that takes the tasks' gradients, one task after another."""

    def append(self, row: Row, /) -> None:
        """Takes the next task's gradients."""


def from_losses(
    losses: Sequence[Tensor | None],
    first: list[Tensor],
    heads: Leaves,
    retain_graph: bool,
    rows: Rows,
    closed: bool = False,
) -> list[Row]:
    """One pass per loss: appends its gradients of `first` to `rows`, and returns those of its own and common leaves.

    An absent task has none. `closed` keeps gradients from passing beyond `first`, for leaves that lie on both sides or
    if one of `first` lies behind another.
    """
    own: list[Row] = []
    last = max((t for t, loss in enumerate(losses) if loss is not None), default=-1)
    with nothing_behind(first if closed else ()):
        for t, loss in enumerate(losses):
            if loss is None:
                rows.append([None] * len(first))
                own.append([None] * len(heads.common))
                continue
            # Only the last pass may free what losses share; a closed trunk still has passes to come.
            keep = retain_graph or closed or (heads.overlap and t < last)
            inputs = [*first, *heads.private[t], *heads.common]
            grads: Row = list(torch.autograd.grad(loss, inputs, retain_graph=keep, allow_unused=True))
            rows.append(grads[: len(first)])
            own.append(grads[len(first) :])
            del grads  # `commit` has to be the only owner of the gradients
    return own


def from_cotangents(
    features: list[Tensor], cotangents: list[Row], parameters: list[Tensor], retain_graph: bool, rows: Rows
) -> None:
    """Appends the parameters' gradients from T rows of cotangents at the features: T passes."""
    last = max((t for t, row in enumerate(cotangents) if any(g is not None for g in row)), default=-1)
    for t, row in enumerate(cotangents):
        rows.append(vjp(features, row, parameters, retain_graph=retain_graph or t < last))


def from_cotangents_at_once(
    features: list[Tensor], cotangents: list[Row], parameters: list[Tensor], retain_graph: bool, rows: Rows
) -> None:
    """`from_cotangents` in one vectorised pass: every operation behind the features sees a leading dimension of T."""
    stacked: Row = []
    for x, column in zip(features, zip(*cotangents, strict=True), strict=True):
        zero = torch.zeros_like(x)
        stacked.append(
            torch.stack([zero if g is None else g for g in column]) if any(g is not None for g in column) else None
        )
    grads = vjp(features, stacked, parameters, retain_graph=retain_graph, batched=True)
    for t in range(len(cotangents)):
        rows.append([None if g is None else g[t] for g in grads])


@contextmanager
def without_tensor_hooks(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Disables hooks of parameters: they are for what reaches `.grad`; `autograd.grad` would run them for each task."""
    silenced = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for hooks, _ in silenced:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, entries in silenced:
            hooks.update(entries)
