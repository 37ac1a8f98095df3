"""From T losses to the shared parameters' aggregated gradients by one Gram matrix and one ordinary backward pass."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fastmtl import ops
from fastmtl._graph import SEVERAL, Edge, Leaves, edge_of
from fastmtl.gramian import cost
from fastmtl.gramian.plan import Plan, plan
from fastmtl.gramian.survey import Survey, survey
from fastmtl.info import Info

if TYPE_CHECKING:
    from fastmtl.weighting._context import Context
    from fastmtl.weighting._method import Method

__all__ = ["Result", "update"]

Row: TypeAlias = "list[Tensor | None]"


class Result(NamedTuple):
    """What is to be added to `.grad`, and why.

    Attributes:
        shared: for every shared parameter, None where no loss reaches it.
        private: for every loss the gradients of its own leaves that are not shared.
        common: for the leaves that several losses reach and that are not shared.
        info: what the method saw and did.
    """

    shared: Row
    private: list[Row]
    common: Row
    info: Info


def update(
    method: Method,
    losses: Sequence[Tensor],
    named: Sequence[tuple[Tensor, str]],
    leaves: Leaves,
    context: Context,
    *,
    automatic: bool,
    scale_heads: bool,
    retain_graph: bool,
) -> Result | None:
    """The aggregated gradients of shared parameters for a method that works on the Gram matrix.

    Args:
        method: the method.
        losses: T scalar losses.
        named: the shared parameters, and what to call them.
        leaves: what the losses reach.
        context: what the step brings besides gradients.
        automatic: whether to do nothing and return None where T backward passes take less.
        scale_heads: whether leaves that are not shared get gradients weighted by α.
        retain_graph: whether the graph is kept.

    Returns:
        Gradients of everything that the losses reach. The same as from T explicit task gradients, as accurate as
        products in float32 (float64 for float64 cotangents) allow.
    """
    graph = survey(losses, leaves.owner)
    todo = plan(named, graph, leaves.owner, len(losses))
    if automatic and cost.prefers_full(todo, graph, len(losses)):
        return None
    parameters = [p for p, _ in named]
    shared = {id(p) for p in parameters}
    rest = leaves.without(parameters)
    own = [[p for p in private if id(p) in shared] for private in leaves.private]

    private = [[*a, *b] for a, b in zip(own, rest.private, strict=True)]
    at_frontier, grads = _heads(losses, graph, leaves.owner, private, retain_graph)
    of_own = [row[: len(p)] for row, p in zip(grads, own, strict=True)]
    of_rest = [row[len(p) :] for row, p in zip(grads, own, strict=True)]
    del grads
    M = torch.zeros(len(losses), len(losses), dtype=torch.float64, device=parameters[0].device)
    with torch.no_grad(), _without_autocast(M.device):
        _trunk(graph, at_frontier, todo, M)
        for t, row in enumerate(of_own):
            M[t, t] += sum(g.double().square().sum() for g in row if g is not None)
    info = method._weigh(M, max({p.dtype for p in parameters}, key=lambda dtype: torch.finfo(dtype).eps), context)
    info.explicit = todo.unrecognised

    sums = _combine(at_frontier, info.alpha)
    reached = [p for p in parameters if leaves.owner.get(edge_of(p)[0]) == SEVERAL]
    once = scale_heads or not rest.common
    inputs = [*reached, *rest.common] if once else reached
    found = _pass(graph.frontier, sums, inputs, retain_graph=retain_graph or not once)
    common = found[len(reached) :]
    if not once:
        sums = _combine(at_frontier, torch.ones_like(info.alpha))
        common = _pass(graph.frontier, sums, rest.common, retain_graph=retain_graph)
    by_id = {id(p): g for p, g in zip(reached, found, strict=False)}
    for alpha, private_, row in zip(info.alpha, own, of_own, strict=True):
        by_id.update((id(p), None if g is None else g * alpha.to(g)) for p, g in zip(private_, row, strict=True))
    return Result([by_id.get(id(p)) for p in parameters], of_rest, common, info)


def _heads(
    losses: Sequence[Tensor],
    graph: Survey,
    owner: dict[Any, int],
    private: Sequence[Sequence[Tensor]],
    retain_graph: bool,
) -> tuple[list[Row], list[Row]]:
    """T rows of cotangents at the frontier, and every loss's gradients of its private leaves: one pass for all losses.

    No two losses share anything before the frontier, so what a node there hands on belongs to one of them.
    """
    rows: list[Row] = [[None] * len(graph.frontier) for _ in losses]
    for t, k in graph.whole:
        rows[t][k] = torch.ones_like(losses[t])
    outputs = [loss for loss in losses if owner[edge_of(loss)[0]] != SEVERAL]
    inputs: list[Any] = [leaf for leaves in private for leaf in leaves]
    inputs += [GradientEdge(*edge) for edge in graph.frontier]
    if not outputs:
        return rows, [[] for _ in losses]
    with _caught(graph, owner, rows):
        keep = retain_graph or graph.nested  # what lies between two edges of the frontier runs too, without gradients
        grads = iter(torch.autograd.grad(outputs, inputs, retain_graph=keep, allow_unused=True))
    return rows, [[next(grads) for _ in leaves] for leaves in private]


@contextmanager
def _caught(graph: Survey, owner: dict[Any, int], rows: list[Row]) -> Iterator[None]:
    """Within, what a pass brings to the frontier is added to the rows and goes no farther."""

    def catch(row: Row, ways: Sequence[tuple[int, int]]) -> Any:
        def hook(grads: Sequence[Tensor | None], _: Any) -> Sequence[Tensor | None]:
            kept = list(grads)
            for i, k in ways:
                g, before, kept[i] = grads[i], row[k], None
                row[k] = before if g is None else g if before is None else before + g
            return tuple(kept)

        return hook

    handles = [node.register_hook(catch(rows[owner[node]], ways)) for node, ways in graph.boundary.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trunk(graph: Survey, rows: list[Row], todo: Plan, M: Tensor) -> None:
    """Adds to M [T, T] the inner products of the gradients that cotangents at the frontier make."""
    edges = list({use.edge: None for contraction in todo.contractions for use in contraction.uses})
    inputs: list[Any] = [*(GradientEdge(*edge) for edge in edges), *todo.explicit]
    if not inputs or not graph.frontier:
        return
    T = len(rows)
    scale = _scale(rows, M)
    kept = sum(math.prod(x.shape) * x.dtype.itemsize for x in (node._input_metadata[output] for node, output in edges))
    chunk = cost.chunk_of(kept, T)
    try:
        columns = _passes(graph.frontier, rows, scale, inputs, chunk)
    except RuntimeError:  # an operation that cannot be vectorised
        if chunk == 1:
            raise
        columns = _passes(graph.frontier, rows, scale, inputs, 1)
    explicit = [g for g in columns[len(edges) :] if g is not None]
    arrived = dict(zip(edges, columns, strict=False))
    del columns
    products = torch.zeros_like(M)
    if explicit:
        products += ops.gram_rows([g[t] for t in range(T) for g in explicit], T)
    del explicit
    left = Counter(use.edge for contraction in todo.contractions for use in contraction.uses)
    for contraction in todo.contractions:
        products += contraction.gram(arrived, _working_dtype)
        for use in contraction.uses:
            left[use.edge] -= 1
            if not left[use.edge]:
                del arrived[use.edge]  # or all of them would live to the end
    M += products / scale[:, None] / scale


def _passes(
    frontier: Sequence[Edge], rows: Sequence[Row], scale: Tensor, inputs: Sequence[Any], chunk: int
) -> list[Tensor | None]:
    """For every input the gradients [T, ...] of scaled cotangents at the frontier, `chunk` tasks at once."""
    T = len(rows)
    columns: list[Tensor | None] = [None] * len(inputs)
    for start in range(0, T, chunk):
        tasks = slice(start, start + chunk)
        grads = _pass(frontier, _stacked(rows[tasks], scale[tasks]), inputs, retain_graph=True, batched=True)
        if chunk >= T:
            return grads
        for k, g in enumerate(grads):
            if g is None:
                continue
            if (column := columns[k]) is None:
                column = columns[k] = g.new_zeros(T, *g.shape[1:])
            column[tasks] = g
        del grads  # before the next ones are made
    return columns


def _pass(
    frontier: Sequence[Edge],
    cotangents: Sequence[Tensor | None],
    inputs: Sequence[Any],
    *,
    retain_graph: bool,
    batched: bool = False,
) -> list[Tensor | None]:
    """Gradients from cotangents at the frontier; those of several tasks where they have a leading dimension."""
    used = [k for k, g in enumerate(cotangents) if g is not None]
    if not used or not inputs:
        return [None] * len(inputs)
    given = [cotangents[k] for k in used]
    alone = batched and len(given[0]) == 1
    grads = torch.autograd.grad(
        [GradientEdge(*frontier[k]) for k in used],
        inputs,
        [g[0] for g in given] if alone else given,
        retain_graph=retain_graph,
        allow_unused=True,
        is_grads_batched=batched and not alone,
    )
    return [g[None] if alone and g is not None else g for g in grads]


def _stacked(rows: Sequence[Row], scale: Tensor) -> list[Tensor | None]:
    """For every edge of the frontier the cotangents of some tasks, scaled, [c, ...]; None where there is none."""
    stacks: list[Tensor | None] = []
    for column in zip(*rows, strict=True):
        like = next((g for g in column if g is not None), None)
        if like is None:
            stacks.append(None)
            continue
        stack = torch.stack([torch.zeros_like(like) if g is None else g for g in column])
        stacks.append(stack.mul_(scale.to(stack).view(-1, *[1] * like.dim())))
    return stacks


def _scale(rows: Sequence[Row], M: Tensor) -> Tensor:
    """Powers of two, float64 [T], that bring every task's largest cotangent near 1: products of two stay in range.

    Half precision has its own loss scale and is left alone.
    """
    scale = torch.ones(len(rows), dtype=torch.float64, device=M.device)
    found = [g for row in rows for g in row if g is not None and g.numel()]
    if not found or any(g.dtype is torch.float16 for g in found):
        return scale
    norms = iter(torch._foreach_norm(found, math.inf))
    zero = scale.new_zeros(())
    each = [next(norms).to(scale) if g is not None and g.numel() else zero for row in rows for g in row]
    largest = torch.stack(each).view(len(rows), -1).amax(1)
    exponent = torch.frexp(largest).exponent.clamp(-120, 120)
    return torch.where(largest.isfinite() & (largest > 0), torch.ldexp(scale, -exponent), scale)


def _combine(rows: Sequence[Row], alpha: Tensor) -> list[Tensor | None]:
    """Σ_t α_t of the rows, for every edge of the frontier."""
    present = [k for k in range(len(rows[0])) if any(row[k] is not None for row in rows)]
    results: list[Tensor | None] = [None] * len(rows[0])
    if present:
        targets = [torch.empty_like(next(row[k] for row in rows if row[k] is not None)) for k in present]
        ops.combine_rows([row[k] for row in rows for k in present], alpha, targets)
        for k, target in zip(present, targets, strict=True):
            results[k] = target
    return results


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products of tensors of this dtype are made in: float32 only where it is not rounded further."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return torch.float32 if dtype is not torch.float64 and exact else torch.float64


@contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    """Within, products are made in the dtype of their operands, also where the caller has autocast on."""
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield
