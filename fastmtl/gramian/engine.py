"""From T losses to the shared parameters' aggregated gradients, by a Gram matrix of gradients that are never formed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fastmtl import ops
from fastmtl.gramian import cost
from fastmtl.gramian.hooks import is_hooked
from fastmtl.gramian.plan import Plan, plan, settled
from fastmtl.gramian.saved import is_plain
from fastmtl.gramian.survey import Survey, survey
from fastmtl.gramian.trunk import Trunk, without_autocast
from fastmtl.graph import SEVERAL, Edge, Leaves, edge_of, vjp
from fastmtl.info import Info
from fastmtl.inputs import DTYPES, Row, check_gradient
from fastmtl.rule import Context, Rule

__all__ = ["Result", "update"]


class Result(NamedTuple):
    """What to add to `.grad`, and why.

    Attributes:
        updates: shared parameters, and others that several losses reach, with their gradients; a parameter that is
            split into blocks has one entry per block.
        private: for every loss, the gradients of its own leaves that are not shared.
        info: what the method saw and did.
    """

    updates: list[tuple[Tensor, Tensor]]
    private: list[Row]
    info: Info


def update(
    method: Rule,
    losses: Sequence[Tensor | None],
    named: Sequence[tuple[Tensor, str]],
    leaves: Leaves,
    context: Context,
    *,
    automatic: bool,
    scale_heads: bool,
    retain_graph: bool,
    settle: Callable[[Trunk], tuple[list[tuple[Tensor, Tensor]], Info]] | None = None,
) -> Result | None:
    """The aggregated gradients of shared parameters for a method that works on the Gram matrix.

    Args:
        method: the method.
        losses: T scalar losses; None for an absent one, whose gradient is zero.
        named: the shared parameters and their names.
        leaves: what the losses reach.
        context: the step's inputs besides gradients.
        automatic: whether to do nothing and return None if T backward passes are cheaper, or if this engine cannot
            read the graph. No pass has run then: the graph, hooks and random numbers are untouched.
        scale_heads: whether leaves that are not shared get gradients weighted by α.
        retain_graph: whether the graph is kept.
        settle: makes the shared parameters' gradients and an info from what arrived; `Trunk.aggregated` if None.

    Returns:
        Gradients of everything that the losses reach: the same as from T explicit task gradients, as accurate as
        products in float32 (float64 for float64 cotangents) allow.

    Raises:
        NotImplementedError: this engine cannot read the graph.
    """
    try:
        graph = survey(losses, leaves.owner)
        todo = plan(named, graph, leaves.owner, len(losses))
    except Exception as error:
        if automatic:
            return None
        raise NotImplementedError(
            f"engine: expected 'full' or 'auto' for this graph, got 'gramian', which cannot read it: {error}"
        ) from error
    if automatic and cost.prefers_full(todo.work, len(losses)):
        return None
    parameters = [p for p, _ in named]
    shared = {id(p) for p in parameters}
    rest = leaves.without(parameters)
    try:
        todo = settled(todo, named)
        # Whether Python code, which need not be linear and may keep what it gets, sees the T cotangents on their way.
        watched = graph.opaque or ((todo.work.at_once or bool(rest.common)) and is_hooked(graph))
    except Exception:  # from autograd, if something was freed or overwritten, or from a hook on saved tensors
        if automatic:
            return None
        raise
    own = [[p for p in private if id(p) in shared] for private in leaves.private]

    private = [[*a, *b] for a, b in zip(own, rest.private, strict=True)]
    at_frontier, grads = _heads(losses, graph, leaves.owner, private, retain_graph)
    of_own = [row[: len(p)] for row, p in zip(grads, own, strict=True)]
    of_rest = [row[len(p) :] for row, p in zip(grads, own, strict=True)]
    del grads
    for t, row in enumerate(of_own):
        for k, g in enumerate(row):
            if g is not None:
                check_gradient(g, f"rows[{t}][{k}]")
    with torch.no_grad():
        at_once = todo.work.at_once and not watched
        trunk = _trunk(
            graph.frontier, at_frontier, todo, at_once=at_once, retain_graph=retain_graph, again=bool(rest.common)
        )
        trunk = trunk._replace(own=[list(zip(p, row, strict=True)) for p, row in zip(own, of_own, strict=True)])
        del of_own
        with without_autocast(parameters[0].device):
            updates, info = settle(trunk) if settle else trunk.aggregated(parameters, method, context)
        del trunk
        info.explicit = todo.unrecognised
        if rest.common:
            weights = info.alpha if scale_heads else torch.ones_like(info.alpha)
            common = _common(
                graph.frontier, at_frontier, weights, rest.common, linear=not watched, retain_graph=retain_graph
            )
            updates += [(p, g) for p, g in zip(rest.common, common, strict=True) if g is not None]
    return Result(updates, of_rest, info)


def _heads(
    losses: Sequence[Tensor | None],
    graph: Survey,
    owner: dict[Any, int],
    private: Sequence[Sequence[Tensor]],
    retain_graph: bool,
) -> tuple[list[Row], list[Row]]:
    """T rows of cotangents at the frontier, and every loss's gradients of its private leaves: one pass for all losses.

    No two losses share anything before the frontier, so what a node there passes on belongs to one of them.
    """
    rows: list[Row] = [[None] * len(graph.frontier) for _ in losses]
    there = {t: loss for t, loss in enumerate(losses) if loss is not None}
    for t, k in graph.whole:
        rows[t][k] = torch.ones_like(there[t])
    outputs = [loss for loss in there.values() if owner[edge_of(loss)[0]] != SEVERAL]
    inputs: list[Any] = [leaf for leaves in private for leaf in leaves]
    inputs += _for_autograd(graph.frontier)
    if not outputs:
        return rows, [[] for _ in losses]
    with _caught(graph, owner, rows):
        keep = retain_graph or graph.nested  # nodes between two edges of the frontier run too, in vain
        grads = iter(torch.autograd.grad(outputs, inputs, retain_graph=keep, allow_unused=True))
    return rows, [[next(grads) for _ in leaves] for leaves in private]


@contextmanager
def _caught(graph: Survey, owner: dict[Any, int], rows: list[Row]) -> Iterator[None]:
    """A context in which the cotangents that a pass brings to the frontier are added to the rows.

    In their place zeros go on to the frontier's tensors, so hooks there run, and what `retain_grad` keeps is from the
    passes that start there.
    """
    reached: set[int] = set()

    def catch(row: Row, ways: Sequence[tuple[int, int]]) -> Any:
        def hook(grads: Sequence[Tensor | None], _: Any) -> tuple[Tensor | None, ...] | None:
            passed = list(grads)
            for i, k in ways:
                g, before = grads[i], row[k]
                if g is None:
                    continue
                row[k] = g if before is None else before + g
                # A tensor that is not plain may have no zeros.
                passed[i] = None if k in reached else torch.zeros_like(g) if is_plain(g, g.device) else g
                reached.add(k)
            is_nested = any(g is not None and g.is_nested for g in grads)  # which autograd does not take from a hook
            return None if is_nested else tuple(passed)

        return hook

    handles = [node.register_hook(catch(rows[owner[node]], ways)) for node, ways in graph.boundary.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trunk(
    frontier: Sequence[Edge], rows: list[Row], todo: Plan, *, at_once: bool, retain_graph: bool, again: bool
) -> Trunk:
    """T cotangents from the frontier to where the plan needs them: at once, or one task after another.

    If all go at once, the graph's saved tensors are kept, since the pass may fail halfway; they are small then.
    `again` says that graph and rows are still needed.
    """
    edges = list({use.edge: None for contraction in todo.contractions for use in contraction.uses})
    T = len(rows)
    if at_once:
        try:
            grads = _at_once(frontier, rows, edges, todo.explicit)
        except RuntimeError:  # an operation that cannot be vectorised
            pass
        else:
            columns = [None if g is None else list(g) for g in grads[len(edges) :]]
            return Trunk(
                todo,
                {edge: g for edge, g in zip(edges, grads, strict=False) if g is not None},
                [(p, rows) for p, rows in zip(todo.explicit, columns, strict=True) if rows is not None],
            )
    arrived: dict[Edge, Tensor] = {}
    explicit: list[Row] = [[None] * T for _ in todo.explicit]
    present = _present(rows)
    for t in present:
        # Hooks may write to the tensors that they are given.
        row = [None if g is None else g.clone() for g in rows[t]] if again else rows[t]
        grads = _gradients(frontier, row, edges, todo.explicit, retain_graph=retain_graph or again or t != present[-1])
        for edge, g in zip(edges, grads, strict=False):
            if g is not None:
                if edge not in arrived:
                    arrived[edge] = torch.zeros((T, *g.shape), dtype=g.dtype, device=g.device)
                arrived[edge][t] = g
        for column, g in zip(explicit, grads[len(edges) :], strict=True):
            column[t] = g
        del grads, row  # before the next ones are made
        if not again:
            rows[t] = []
    found = [(p, c) for p, c in zip(todo.explicit, explicit, strict=True) if any(g is not None for g in c)]
    return Trunk(todo, arrived, found)


def _at_once(frontier: Sequence[Edge], rows: Sequence[Row], edges: Sequence[Edge], leaves: Sequence[Tensor]) -> Row:
    """The gradients of all tasks, each with a leading dimension, from one vectorised pass."""
    stacks: list[Tensor] = []
    starts: list[GradientEdge] = []
    for edge, column in zip(frontier, zip(*rows, strict=True), strict=True):
        like = next((g for g in column if g is not None), None)
        if like is not None:
            starts.append(GradientEdge(*edge))
            stacks.append(torch.stack([torch.zeros_like(_dense(like)) if g is None else _dense(g) for g in column]))
    return vjp(starts, stacks, [*_for_autograd(edges), *leaves], retain_graph=True, batched=True)


def _gradients(
    frontier: Sequence[Edge],
    cotangents: Sequence[Tensor | None],
    edges: Sequence[Edge],
    leaves: Sequence[Tensor],
    *,
    retain_graph: bool,
) -> Row:
    """What one pass from the frontier brings to edges, as hooks of their tensors leave it, and to leaves.

    Autograd returns what arrives at an edge before those hooks if the pass goes on from there, and after them if not.
    """
    behind: dict[Edge, Tensor | None] = {}

    def catch(edge: Edge) -> Any:
        def hook(grads: Sequence[Tensor | None]) -> None:
            behind[edge] = grads[edge[1]]

        return hook

    handles = [edge[0].register_prehook(catch(edge)) for edge in edges]
    try:
        grads = vjp(_for_autograd(frontier), cotangents, [*_for_autograd(edges), *leaves], retain_graph=retain_graph)
    finally:
        for handle in handles:
            handle.remove()
    for k, edge in enumerate(edges):
        g = behind.get(edge, grads[k])
        grads[k] = None if g is None else _dense(g)
    return grads


def _for_autograd(edges: Sequence[Edge]) -> list[GradientEdge]:
    return [GradientEdge(*edge) for edge in edges]


def _present(rows: Sequence[Row]) -> list[int]:
    """The tasks that have a cotangent anywhere."""
    return [t for t, row in enumerate(rows) if any(g is not None for g in row)]


def _common(
    frontier: Sequence[Edge],
    rows: Sequence[Row],
    weights: Tensor,
    leaves: Sequence[Tensor],
    *,
    linear: bool,
    retain_graph: bool,
) -> Row:
    """The leaves' gradients from the weighted sum of T rows of cotangents: in one pass if passes are linear."""
    if linear:
        return vjp(_for_autograd(frontier), _combine(rows, weights), leaves, retain_graph=retain_graph)
    sums: Row = [None] * len(leaves)
    present = _present(rows)
    for t in present:
        grads = vjp(_for_autograd(frontier), rows[t], leaves, retain_graph=retain_graph or t != present[-1])
        for k, g in enumerate(grads):
            if g is not None:
                g, before = g * weights[t].to(g.device, g.dtype), sums[k]
                sums[k] = g if before is None else before + g
    return sums


def _combine(rows: Sequence[Row], alpha: Tensor) -> list[Tensor | None]:
    """Σ_t α_t of the rows, for every edge of the frontier."""
    results: list[Tensor | None] = [None] * len(rows[0])
    kernels = []
    for k, column in enumerate(zip(*rows, strict=True)):
        present = [(t, g) for t, g in enumerate(column) if g is not None]
        if all(is_plain(g, alpha.device) and g.dtype in DTYPES for _, g in present):
            if present:
                results[k] = torch.empty_like(present[0][1])
                kernels.append(k)
        else:  # complex, nested, elsewhere
            results[k] = sum(g * alpha[t].to(g.device) for t, g in present)
    if kernels:
        targets = [g for k in kernels if (g := results[k]) is not None]
        ops.combine_rows([row[k] for row in rows for k in kernels], alpha, targets)
    return results


def _dense(g: Tensor) -> Tensor:
    """A cotangent may be sparse: behind `gather(sparse_grad=True)`, or if the activation is itself an embedding."""
    return g if g.layout is torch.strided else g.to_dense()
