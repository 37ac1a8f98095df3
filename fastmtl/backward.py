"""From T losses to `.grad`: T backward passes, one aggregation, one commit through autograd."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    def _align_rows(self, rows: Rows) -> tuple[list[Tensor | None], Info]: ...


def backward(
    method: _Method, losses: Sequence[Tensor], shared: Iterable[Tensor], *, scale_heads: bool, retain_graph: bool
) -> Info:
    """The engine behind `method.backward`: see there. Nothing is written before `_commit`."""
    _check_losses(losses)
    shared = _checked_shared(shared)
    T = len(losses)
    private, common = _other_leaves(losses, shared)

    rows: list[list[Tensor | None]] = []
    other_grads: list[list[Tensor | None]] = []
    for t, loss in enumerate(losses):
        others = private[t] + common
        # Only the last pass may free the graph, since the losses share the trunk.
        grads = torch.autograd.grad(
            loss, shared + others, retain_graph=retain_graph or t < T - 1, allow_unused=True
        )
        rows.append(list(grads[: len(shared)]))
        other_grads.append(list(grads[len(shared) :]))
        del grads  # the commit below wants to be the only owner of what it hands over

    reached = [k for k in range(len(shared)) if any(row[k] is not None for row in rows)]
    if not reached:
        raise ValueError("shared: expected parameters that a loss depends on, but no loss reaches any of them")
    aligned, info = method._align_rows([[row[k] for k in reached] for row in rows])
    rows.clear()

    parameters = [shared[k] for k in reached]
    updates = aligned
    for t, grads in enumerate(other_grads):
        if scale_heads:
            grads = [None if g is None else g * info.alpha[t].to(g.dtype) for g in grads]
        for parameter, g in zip(private[t], grads, strict=False):
            if g is not None:
                parameters.append(parameter)
                updates.append(g)
        other_grads[t] = grads[len(private[t]) :]
    for parameter, column in zip(common, zip(*other_grads, strict=True), strict=True):
        present = [g for g in column if g is not None]
        if present:
            parameters.append(parameter)
            updates.append(sum(present[1:], start=present[0]))
    other_grads.clear()
    g = present = grads = column = None  # noqa: F841 - a reference left here would force a copy of that gradient
    _commit(parameters, updates)
    return info


class _Commit(torch.autograd.Function):
    """Identity on nothing: a node whose backward hands each parameter its gradient, so that autograd accumulates it."""

    @staticmethod
    def forward(ctx: Any, updates: list[Tensor | None], *parameters: Tensor) -> Tensor:  # type: ignore[override]
        ctx.updates = updates
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        updates, ctx.updates = ctx.updates, None
        result = (None, *updates)
        updates.clear()  # so that autograd finds itself the only owner and takes the buffers instead of copying them
        return result


def _commit(parameters: list[Tensor], updates: list[Tensor | None]) -> None:
    """Adds `updates` to `.grad` through AccumulateGrad: tensor, post-accumulate and DDP hooks fire as in any backward."""
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
        if loss.grad_fn is None:  # the loss itself is a parameter
            root = torch.autograd.graph.get_gradient_edge(loss).node
        else:
            root = loss.grad_fn
        stack = [root]
        while stack:
            node = stack.pop()
            known = owner.get(node)
            if known is None:
                owner[node] = t
                variable = getattr(node, "variable", None)
                if variable is not None:
                    leaves[node] = variable
            elif known in (t, several):
                continue
            else:
                owner[node] = several
            stack.extend(successor for successor, _ in node.next_functions if successor is not None)
    excluded = {id(p) for p in shared}
    private: list[list[Tensor]] = [[] for _ in losses]
    common: list[Tensor] = []
    for node, variable in leaves.items():
        if id(variable) not in excluded:
            (common if owner[node] == several else private[owner[node]]).append(variable)
    return private, common
