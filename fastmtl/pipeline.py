"""The pipeline gradients → Gram → weights → combine, for whatever method, on T rows of K gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.info import Info
from fastmtl.inputs import EPS, Rows, check_outs, check_rows, nothing_for
from fastmtl.ops.arguments import argument_error
from fastmtl.rule import NOTHING, Context, Rule, solved

__all__ = ["aggregate_flat", "aggregate_groups", "aggregate_part", "aggregate_rows", "coarsest", "gram_of"]


def aggregate_rows(
    rule: Rule, rows: Rows, out: Sequence[Tensor | None] | None = None, context: Context = NOTHING
) -> tuple[list[Tensor | None], Info]:
    """The pipeline on T rows of K gradients: K results (None where no task has a gradient) and the info."""
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
    """The same for T·K gradients that are known to fit together (entry t·K + k)."""
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
    try:
        info = rule.aggregate_list(grads, T, coarsest(targets), targets, context)
    except RuntimeError as error:
        raise argument_error(error) from None
    return [None if g is None else target for g, target in zip(like, targets, strict=True)], info


def gram_of(grads: Sequence[Tensor | None], T: int) -> Tensor:
    """`gram_rows` of what a user may have given."""
    try:
        return ops.gram_rows(grads, T)
    except RuntimeError as error:
        raise argument_error(error) from None


def aggregate_part(
    rule: Rule,
    grads: Sequence[Tensor | None],
    like: Sequence[Tensor],
    reduce: Callable[[Tensor], Tensor],
    context: Context = NOTHING,
) -> tuple[list[Tensor], Info]:
    """The same on a part of the gradients, whose Gram `reduce` completes; `like` are K tensors of their shapes.

    Where no task has a gradient here the result is zeros: whoever else has the rest still waits for this part.
    """
    T = len(grads) // len(like)
    if any(g is not None for g in grads):
        M = gram_of(grads, T)
    else:
        M = torch.zeros(T, T, dtype=torch.float64, device=like[0].device)
    info = solved(rule, reduce(M), coarsest(like), context)
    results = [torch.empty_like(x) for x in like]
    ops.combine_rows(grads, info.alpha, results)
    return results, info


def aggregate_groups(
    rule: Rule, rows: Sequence[Sequence[Tensor | None]], groups: list[list[Tensor]], context: Context
) -> tuple[list[Tensor | None], Info]:
    """Each group of parameters aggregated on its own; one batched problem for the weights of all."""
    T, end = len(rows), 0
    lists: list[list[Tensor | None]] = []
    for group in groups:
        start, end = end, end + len(group)
        lists.append(check_rows([row[start:end] for row in rows])[0])
    grams = torch.stack([gram_of(grads, T).to(groups[0][0].device) for grads in lists])
    info = solved(rule, grams, coarsest(p for group in groups for p in group), context)
    updates: list[Tensor | None] = []
    for group, grads, alpha in zip(groups, lists, info.alpha, strict=True):
        results = [torch.empty_like(p) for p in group]
        ops.combine_rows(grads, alpha, results)
        reached = [any(g is not None for g in grads[k :: len(group)]) for k in range(len(group))]
        updates += [result if here else None for result, here in zip(results, reached, strict=True)]
    return updates, info


def coarsest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype of the largest rounding error, among those that a gradient may have."""
    found = torch.float64
    for dtype in {x.dtype for x in tensors}:  # not `max(..., key=...)`, which torch 2.11 does not compile
        if EPS.get(dtype, 0.0) > EPS[found]:
            found = dtype
    return found
