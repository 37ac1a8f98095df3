"""How a step ends: gradients are added to `.grad`, all at once, by autograd itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastmtl.graph import Leaves
from fastmtl.inputs import Row

__all__ = ["Updates", "check_gathered", "commit", "own_gradients", "pairs"]

# Parameters with what to add to their `.grad`; one that occurs twice gets both.
Updates: TypeAlias = "list[tuple[Tensor, Tensor]]"


def pairs(parameters: Sequence[Tensor], updates: list[Tensor | None]) -> Updates:
    """Every parameter that has an update, with it; empties `updates`."""
    found = [(p, update) for p, update in zip(parameters, updates, strict=True) if update is not None]
    updates.clear()
    return found


def own_gradients(heads: Leaves, own: list[Row], alpha: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Every parameter that is not shared, with the gradient of its loss or of the sum of its losses; empties `own`.

    Args:
        heads: these parameters.
        own: for each task, the gradients of its own parameters and of those common to several tasks.
        alpha: task weights to multiply the gradients by; None for none.
    """
    sums: dict[int, Tensor] = {}
    for t, parameters in enumerate(heads.private):
        grads = own[t]
        if alpha is not None:
            grads = [None if g is None else g * alpha[t].to(g) for g in grads]
        own[t] = []
        for k, g in enumerate(grads[len(parameters) :]):
            if g is not None:
                sums[k] = sums[k] + g if k in sums else g
        for k, parameter in enumerate(parameters):
            g, grads[k] = grads[k], None
            if g is not None:
                yield parameter, g
    for k in list(sums):
        yield heads.common[k], sums.pop(k)


def check_gathered(parameters: Iterable[Tensor]) -> None:
    """Raises ValueError if one of these, after a backward, turns out to be a buffer of `fully_shard`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from fastmtl import distributed  # here: not every torch is built with it

        distributed.check_gathered(parameters)


class _Commit(torch.autograd.Function):
    """A node that computes nothing and whose backward hands each parameter its gradient, for autograd to accumulate.

    There is one per device, or autograd would wait for another device's stream.
    """

    @staticmethod
    def forward(ctx: Any, updates: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.updates = updates
        return torch.empty(0, device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        updates, ctx.updates = ctx.updates, None
        result = (None, *updates)
        updates.clear()  # autograd is then the only owner, and takes the buffers instead of copying them
        return result


def commit(updates: Updates, reached: Iterable[Tensor] = ()) -> None:
    """Adds the updates to `.grad` through AccumulateGrad, so that all hooks fire as in any backward; empties `updates`.

    As in any backward, hooks also fire for leaves `reached` without a gradient: DistributedDataParallel waits for them.

    Raises:
        ValueError: one of the tensors is not a parameter but a buffer of `fully_shard`. Then nothing is written.
    """
    check_gathered(parameter for parameter, _ in updates)
    listed = {id(parameter) for parameter, _ in updates}
    idle = {id(parameter): parameter for parameter in reached if id(parameter) not in listed}
    places: dict[torch.device, tuple[list[Tensor | None], list[Tensor]]] = {}
    for parameter, update in [*updates, *((parameter, None) for parameter in idle.values())]:
        gradients, parameters = places.setdefault(parameter.device, ([], []))
        gradients.append(update)
        parameters.append(parameter)
    updates.clear()
    update = None  # see `_Commit.backward`
    if not places:
        return
    with torch.enable_grad():
        nodes = [_Commit.apply(gradients, *parameters) for gradients, parameters in places.values()]
    torch.autograd.backward(nodes, [torch.empty_like(node) for node in nodes])
