"""From T losses to `.grad`: T backward passes, one aggregation, one commit through autograd."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastmtl._inputs import DTYPES, Rows, describe

__all__ = ["Info", "backward"]


class Info(NamedTuple):
    """What a method saw and did in one step; all tensors lie on the gradients' device.

    Attributes:
        alpha: task weights α, float64 [T]: the committed gradient is αᵀ G.
        gram: Gram matrix of the task gradients, float64 [T, T].
        eigenvalues: its eigenvalues, float64 [T], descending; the first `rank` are kept.
        rank: number of independent task gradients under the method's rank rule, int64 [].
    """

    alpha: Tensor
    gram: Tensor
    eigenvalues: Tensor
    rank: Tensor


class _Method(Protocol):
    def _check_tasks(self, T: int) -> None: ...
    def _align_rows(self, rows: Rows) -> tuple[list[Tensor | None], Info]: ...


def backward(
    method: _Method, losses: Sequence[Tensor], shared: Iterable[Tensor], *, scale_heads: bool, retain_graph: bool
) -> Info:
    """The engine behind `method.backward`: see there. Nothing is written before `_commit`."""
    _check_losses(losses)
    method._check_tasks(len(losses))
    parameters = _checked_shared(shared)
    private, common = _other_leaves(losses, parameters)

    rows: list[list[Tensor | None]] = []
    own: list[list[Tensor | None]] = []
    with _without_tensor_hooks([*parameters, *common, *(p for leaves in private for p in leaves)]):
        for t, loss in enumerate(losses):
            # Only the last pass may free the graph, since the losses share the trunk.
            retain = retain_graph or t < len(losses) - 1
            inputs = [*parameters, *private[t], *common]
            grads: list[Tensor | None] = list(torch.autograd.grad(loss, inputs, retain_graph=retain, allow_unused=True))
            rows.append(grads[: len(parameters)])
            own.append(grads[len(parameters) :])
            del grads  # `_commit` has to be the only owner of what it hands over

    reached = [k for k in range(len(parameters)) if any(row[k] is not None for row in rows)]
    if not reached:
        raise ValueError("shared: expected parameters that a loss depends on, but no loss reaches any of them")
    updates, info = method._align_rows([[row[k] for k in reached] for row in rows])
    rows.clear()
    targets = [parameters[k] for k in reached]
    for target, update in _own_gradients(private, common, own, info.alpha if scale_heads else None):
        targets.append(target)
        updates.append(update)
        del update
    _commit(targets, updates)
    return info


def _own_gradients(
    private: list[list[Tensor]], common: list[Tensor], own: list[list[Tensor | None]], alpha: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every parameter that is not shared with the gradient of its loss, or of the sum of its losses; empties `own`."""
    sums: dict[int, Tensor] = {}
    for t, parameters in enumerate(private):
        grads = own[t]
        if alpha is not None:
            grads = [None if g is None else g * alpha[t].to(g.dtype) for g in grads]
        own[t] = []
        for k, g in enumerate(grads[len(parameters) :]):
            if g is not None:
                sums[k] = sums[k] + g if k in sums else g
        for k, parameter in enumerate(parameters):
            g, grads[k] = grads[k], None
            if g is not None:
                yield parameter, g
    for k in list(sums):
        yield common[k], sums.pop(k)


@contextmanager
def _without_tensor_hooks(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Hooks of a parameter are for what reaches its `.grad`; `autograd.grad` would run them on every task's too."""
    silenced = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for hooks, _ in silenced:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, entries in silenced:
            hooks.update(entries)


class _Commit(torch.autograd.Function):
    """Identity on nothing: a node whose backward hands each parameter its gradient, so that autograd accumulates it."""

    @staticmethod
    def forward(ctx: Any, updates: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.updates = updates
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        updates, ctx.updates = ctx.updates, None
        result = (None, *updates)
        updates.clear()  # so that autograd finds itself the only owner and takes the buffers instead of copying them
        return result


def _commit(parameters: list[Tensor], updates: list[Tensor | None]) -> None:
    """Adds `updates` to `.grad` through AccumulateGrad: all hooks fire as in any backward."""
    with torch.enable_grad():
        node = _Commit.apply(updates, *parameters)
    node.backward()


def _check_losses(losses: Sequence[Tensor]) -> None:
    if not isinstance(losses, (list, tuple)):
        raise TypeError(f"losses: expected a sequence of T scalar tensors, got {describe(losses)}")
    if not losses:
        raise ValueError("losses: expected at least one loss (T >= 1), got an empty sequence")
    for t, loss in enumerate(losses):
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            raise TypeError(f"losses[{t}]: expected a floating scalar tensor, got {describe(loss)}")
        if loss.numel() != 1:
            raise ValueError(f"losses[{t}]: expected a scalar (one element), got {describe(loss)}")
        if not loss.requires_grad:
            raise ValueError(f"losses[{t}]: expected a loss that requires grad, got a constant {describe(loss)}")


def _checked_shared(shared: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(shared, Tensor) or not isinstance(shared, Iterable):
        raise TypeError(f"shared: expected an iterable of parameters, got {describe(shared)}")
    parameters: list[Tensor] = []
    seen: set[int] = set()
    for i, p in enumerate(shared):
        if not isinstance(p, Tensor):
            raise TypeError(f"shared[{i}]: expected a parameter (tensor), got {describe(p)}")
        if p.dtype not in DTYPES:
            raise TypeError(f"shared[{i}]: expected float32, float64, bfloat16 or float16, got {describe(p)}")
        if not p.is_leaf:
            raise ValueError(f"shared[{i}]: expected a leaf tensor (a parameter), got an intermediate {describe(p)}")
        if not p.requires_grad:
            raise ValueError(f"shared[{i}]: expected a parameter that requires grad, got a frozen {describe(p)}")
        if id(p) not in seen:  # tied parameters are listed twice by some models
            seen.add(id(p))
            parameters.append(p)
    if not parameters:
        raise ValueError("shared: expected at least one parameter, got none")
    return parameters


def _other_leaves(losses: Sequence[Tensor], shared: list[Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Leaves outside `shared` that the losses reach: per loss those it alone reaches, and those that several reach.

    Each graph node is visited at most twice: when the first loss finds it, and when a second loss shows it is common.
    """
    owner: dict[Any, int] = {}
    leaves: dict[Any, Tensor] = {}
    several = -1
    for t, loss in enumerate(losses):
        stack = [torch.autograd.graph.get_gradient_edge(loss).node]  # also where the loss itself is a parameter
        while stack:
            node = stack.pop()
            known = owner.get(node)
            if known in (t, several):
                continue
            owner[node] = t if known is None else several
            successors = node.next_functions
            if successors:
                stack.extend(successor for successor, _ in successors if successor is not None)
            elif known is None and (variable := getattr(node, "variable", None)) is not None:
                leaves[node] = variable
    excluded = {id(p) for p in shared}
    private: list[list[Tensor]] = [[] for _ in losses]
    common: list[Tensor] = []
    for node, variable in leaves.items():
        if id(variable) not in excluded:
            (common if owner[node] == several else private[owner[node]]).append(variable)
    return private, common
