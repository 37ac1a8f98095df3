"""The pipeline gradients → Gram → weights → combine, for any method, on T rows of K gradients."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.inputs import EPS, Rows, check_outs, check_rows, nothing_for
from fastmtl.ops.arguments import argument_error
from fastmtl.ops.derivatives import detached
from fastmtl.rule import NOTHING, Context, Rule, solved

__all__ = [
    "aggregate_flat",
    "aggregate_groups",
    "aggregate_part",
    "aggregate_rows",
    "coarsest",
    "combine_into",
    "gram_of",
]

# Columns on different devices are read separately.
_device_of: Callable[[Tensor], Any] = operator.attrgetter("device")


def aggregate_rows(
    rule: Rule, rows: Rows, out: Sequence[Tensor | None] | None = None, context: Context = NOTHING
) -> tuple[list[Tensor | None], Info]:
    """Aggregates T rows of K gradients: K results (None where no task has a gradient) and the info."""
    grads, K = check_rows(rows)
    if not K:
        raise ValueError(f"rows: expected at least one gradient, got {len(rows)} rows of 0 tensors")
    rule.check_tasks(len(rows))
    return aggregate_flat(rule, grads, K, out, context)


def aggregate_flat(
    rule: Rule,
    grads: Sequence[Tensor | None],
    K: int,
    out: Sequence[Tensor | None] | None = None,
    context: Context = NOTHING,
) -> tuple[list[Tensor | None], Info]:
    """`aggregate_rows` for T·K gradients (entry t·K + k) whose rows are known to be of one length.

    Columns may lie on several devices: the devices' Gram matrices are summed on that of the first column, where `info`
    is too, and each column's result is where its gradients are.
    """
    T = len(grads) // K
    like = [
        g if g is not None else next((other for other in grads[k::K] if other is not None), None)
        for k, g in enumerate(grads[:K])
    ]
    if not any(g is not None for g in like):
        raise ValueError(f"rows: expected at least one gradient, got none in {T} rows of {K}")
    # A column without any gradient has no result; the op gets one without elements.
    if out is None:
        targets = [nothing_for(like) if g is None else torch.empty_like(g) for g in like]
    else:
        targets = check_outs(out, like)
    parts = _parts(targets)
    if len(parts) > 1:
        if not rule.on_gram:
            devices = ", ".join(str(_device_of(targets[part[0]])) for part in parts)
            raise ValueError(
                f"rows: expected gradients on one device for {rule!r}, which needs more than the Gram matrix, got them "
                f"on {devices}"
            )
        info = solved(rule, gram_of(grads, T, targets), coarsest(targets), context)
        combine_into(targets, grads, info.alpha)
    else:
        try:
            info = rule.aggregate_list(grads, T, coarsest(targets), targets, context)
        except RuntimeError as error:
            raise argument_error(error) from None
    return [None if g is None else target for g, target in zip(like, targets, strict=True)], info


def gram_of(grads: Sequence[Tensor | None], T: int, like: Sequence[Tensor] = ()) -> Tensor:
    """`gram_rows`, with errors as a user sees them; summed over the devices of K columns `like` these, on the first."""
    parts, K = _parts(like), len(like)
    try:
        if len(parts) < 2:
            return detached(ops.gram_rows, grads, T)
        rows = [[grads[t * K + k] for t in range(T) for k in part] for part in parts]
        grams = [detached(ops.gram_rows, part, T) for part in rows if any(g is not None for g in part)]
    except RuntimeError as error:
        raise argument_error(error) from None
    first = like[0].device
    return torch.stack([M.to(first) for M in grams]).sum(0)


def combine_into(out: Sequence[Tensor], grads: Sequence[Tensor | None], alpha: Tensor) -> None:
    """`combine_rows`, on the device of each column."""
    parts, K = _parts(out), len(out)
    if len(parts) < 2:
        ops.combine_rows(grads, alpha.to(out[0].device), out)
        return
    for part in parts:
        of_part = [grads[t * K + k] for t in range(len(alpha)) for k in part]
        ops.combine_rows(of_part, alpha.to(out[part[0]].device), [out[k] for k in part])


def _parts(columns: Sequence[Tensor]) -> list[list[int]]:
    """The numbers of the columns on each device, the first column's device first; empty for a single device."""
    if torch.compiler.is_compiling() or len(set(map(_device_of, columns))) < 2 or any(x.is_meta for x in columns):
        return []  # tensors without data are for the ops to refuse
    parts: dict[Any, list[int]] = {}
    for k, x in enumerate(columns):
        parts.setdefault(_device_of(x), []).append(k)
    return list(parts.values())


def aggregate_part(
    rule: Rule,
    grads: Sequence[Tensor | None],
    like: Sequence[Tensor],
    reduce: Callable[[Tensor], Tensor],
    context: Context = NOTHING,
) -> tuple[list[Tensor], Info]:
    """`aggregate_flat` for a part of the gradients, whose Gram `reduce` completes; `like` are K tensors of the shapes.

    If no task has a gradient here, the results are zeros: the processes with the rest still wait for this part.
    """
    T = len(grads) // len(like)
    if any(g is not None for g in grads):
        M = gram_of(grads, T, like)
    else:
        M = torch.zeros(T, T, dtype=torch.float64, device=like[0].device)
    info = solved(rule, reduce(M), coarsest(like), context)
    results = [torch.empty_like(x) for x in like]
    combine_into(results, grads, info.alpha)
    return results, info


def aggregate_groups(
    rule: Rule, rows: Sequence[Sequence[Tensor | None]], groups: list[list[Tensor]], context: Context
) -> tuple[list[Tensor | None], Info]:
    """Aggregates each group of parameters separately; the weights of all groups are one batched problem."""
    T, end = len(rows), 0
    lists: list[list[Tensor | None]] = []
    for group in groups:
        start, end = end, end + len(group)
        lists.append(check_rows([row[start:end] for row in rows])[0])
    first = groups[0][0].device
    grams = torch.stack([gram_of(grads, T, group).to(first) for group, grads in zip(groups, lists, strict=True)])
    info = solved(rule, grams, coarsest(p for group in groups for p in group), context)
    updates: list[Tensor | None] = []
    for group, grads, alpha in zip(groups, lists, info.alpha, strict=True):
        results = [torch.empty_like(p) for p in group]
        combine_into(results, grads, alpha)
        reached = [any(g is not None for g in grads[k :: len(group)]) for k in range(len(group))]
        updates += [result if here else None for result, here in zip(results, reached, strict=True)]
    return updates, info


def coarsest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype with the largest rounding error, among those that a gradient may have."""
    found = torch.float64
    for dtype in {x.dtype for x in tensors}:  # not `max(..., key=...)`, which torch 2.11 does not compile
        if EPS.get(dtype, 0.0) > EPS[found]:
            found = dtype
    return found
