"""From T losses to the shared parameters' aggregated gradients, by the Gram matrix of gradients that nobody forms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fastmtl import ops
from fastmtl._graph import SEVERAL, Edge, Leaves, edge_of
from fastmtl._inputs import check_rows
from fastmtl.gramian import cost
from fastmtl.gramian.plan import Plan, plan
from fastmtl.gramian.survey import Survey, survey
from fastmtl.info import Info

if TYPE_CHECKING:
    from fastmtl.weighting._context import Context
    from fastmtl.weighting._method import Method

__all__ = ["Result", "update"]

# Powers of two that a cotangent may be from 1: products of what smaller or larger ones become could leave float32.
_NEAR = 20

Row: TypeAlias = "list[Tensor | None]"


class Result(NamedTuple):
    """What is to be added to `.grad`, and why.

    Attributes:
        updates: shared parameters, and others that several losses reach, with their gradients; one of a parameter that
            is split in blocks for each block.
        private: for every loss the gradients of its own leaves that are not shared.
        info: what the method saw and did.
    """

    updates: list[tuple[Tensor, Tensor]]
    private: list[Row]
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
    if automatic and cost.prefers_full(todo.work, len(losses)):
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
    device = parameters[0].device
    keep = retain_graph or bool(rest.common)
    with torch.no_grad(), _without_autocast(device):
        trunk = _trunk(graph.frontier, at_frontier, todo, device, keep)
        M = trunk.gram()
        for t, row in enumerate(of_own):
            M[t, t] += sum(g.double().square().sum() for g in row if g is not None)
        info = method._weigh(M, max({p.dtype for p in parameters}, key=lambda dtype: torch.finfo(dtype).eps), context)
        info.explicit = todo.unrecognised
        updates = trunk.combined(info.alpha)
        del trunk
    for alpha, leaves_, row in zip(info.alpha, own, of_own, strict=True):
        updates += [(p, g * alpha.to(g)) for p, g in zip(leaves_, row, strict=True) if g is not None]
    if rest.common:
        weights = info.alpha if scale_heads else torch.ones_like(info.alpha)
        sums = _combine(at_frontier, weights)
        common = _pass(graph.frontier, sums, rest.common, retain_graph=retain_graph)
        updates += [(p, g) for p, g in zip(rest.common, common, strict=True) if g is not None]
    return Result(updates, of_rest, info)


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
        keep = retain_graph or graph.nested  # what lies between two edges of the frontier runs too, in vain
        grads = iter(torch.autograd.grad(outputs, inputs, retain_graph=keep, allow_unused=True))
    return rows, [[next(grads) for _ in leaves] for leaves in private]


@contextmanager
def _caught(graph: Survey, owner: dict[Any, int], rows: list[Row]) -> Iterator[None]:
    """Within, what a pass brings to the frontier is added to the rows.

    It goes on to the frontier, where hooks of the tensors are run.
    """

    def catch(row: Row, ways: Sequence[tuple[int, int]]) -> Any:
        def hook(grads: Sequence[Tensor | None], _: Any) -> None:
            for i, k in ways:
                g, before = grads[i], row[k]
                row[k] = before if g is None else g if before is None else before + g

        return hook

    handles = [node.register_hook(catch(rows[owner[node]], ways)) for node, ways in graph.boundary.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Trunk(NamedTuple):
    """What T scaled cotangents at the frontier brought.

    Attributes:
        todo: what it is for.
        arrived: where operations with a closed form are, all T cotangents of their output [T, ...].
        explicit: parameters with their T gradients.
        scale: powers of two [T], float64, by which the cotangents of every task were multiplied.
    """

    todo: Plan
    arrived: dict[Edge, Tensor]
    explicit: list[tuple[Tensor, Row]]
    scale: Tensor

    def gram(self) -> Tensor:
        """M [T, T], float64."""
        T = len(self.scale)
        M = torch.zeros(T, T, dtype=torch.float64, device=self.scale.device)
        if self.explicit:
            M += ops.gram_rows(check_rows([[rows[t] for _, rows in self.explicit] for t in range(T)])[0], T)
        for contraction in self.todo.contractions:
            M += contraction.gram(self.arrived, _working_dtype)
        return M / self.scale[:, None] / self.scale

    def combined(self, alpha: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The parameters that were reached, with Σ_t α_t of their gradients: what one more pass would bring."""
        weights = alpha / self.scale
        updates = [(p, torch.empty_like(p)) for p, _ in self.explicit]
        if updates:
            rows = [rows[t] for t in range(len(alpha)) for _, rows in self.explicit]
            ops.combine_rows(rows, weights, [g for _, g in updates])
        cotangents = {}
        for edge, g in self.arrived.items():
            cotangents[edge] = out = torch.empty_like(g[0], memory_format=torch.contiguous_format)
            ops.combine(g.reshape(len(g), -1), weights, out.view(-1))
        for contraction in self.todo.contractions:
            updates += contraction.gradients(cotangents)
        return updates


def _trunk(frontier: Sequence[Edge], rows: list[Row], todo: Plan, device: torch.device, retain_graph: bool) -> _Trunk:
    """T cotangents from the frontier to where the plan needs them: at once, or one task after the other.

    Where all go at once, what the graph saved lives on, since that may fail half way; it is little then.
    """
    for contraction in todo.contractions:
        for use in contraction.uses:
            use.hold()
    edges = list({use.edge: None for contraction in todo.contractions for use in contraction.uses})
    inputs: list[Any] = [*(GradientEdge(*edge) for edge in edges), *todo.explicit]
    T = len(rows)
    if todo.work.at_once:
        stacks, scale = _stacked(rows, device)
        try:
            grads = _pass(frontier, stacks, inputs, retain_graph=True, batched=True)
        except RuntimeError:  # an operation that cannot be vectorised
            pass
        else:
            columns = [None if g is None else list(g) for g in grads[len(edges) :]]
            return _Trunk(
                todo,
                {edge: g for edge, g in zip(edges, grads, strict=False) if g is not None},
                [(p, rows) for p, rows in zip(todo.explicit, columns, strict=True) if rows is not None],
                scale,
            )
    arrived: dict[Edge, Tensor] = {}
    explicit: list[Row] = [[None] * T for _ in todo.explicit]
    scales = []
    for t, row in enumerate(rows):
        stacks, scale = _stacked([row], device)
        scales.append(scale)
        last = t == T - 1
        alone = [None if g is None else g[0] for g in stacks]
        grads = _pass(frontier, alone, inputs, retain_graph=retain_graph or not last)
        del stacks, alone
        for edge, g in zip(edges, grads, strict=False):
            if g is not None:
                if edge not in arrived:
                    arrived[edge] = g.new_zeros(T, *g.shape)
                arrived[edge][t] = g
        for column, g in zip(explicit, grads[len(edges) :], strict=True):
            column[t] = g
        del grads  # before the next ones are made
    found = [(p, c) for p, c in zip(todo.explicit, explicit, strict=True) if any(g is not None for g in c)]
    return _Trunk(todo, arrived, found, torch.cat(scales))


def _pass(
    frontier: Sequence[Edge],
    cotangents: Sequence[Tensor | None],
    inputs: Sequence[Any],
    *,
    retain_graph: bool,
    batched: bool = False,
) -> Row:
    """Gradients from cotangents at the frontier, which have a leading dimension if `batched`."""
    used = [k for k, g in enumerate(cotangents) if g is not None]
    if not used or not inputs:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(
            [GradientEdge(*frontier[k]) for k in used],
            inputs,
            [cotangents[k] for k in used],
            retain_graph=retain_graph,
            allow_unused=True,
            is_grads_batched=batched,
        )
    )


def _stacked(rows: Sequence[Row], device: torch.device) -> tuple[Row, Tensor]:
    """For every edge of the frontier the cotangents of c tasks [c, ...], None where there is none, and their scale.

    The scale, float64 [c], are powers of two that bring a task's largest cotangent near 1 where it is far from that, so
    that products of two gradients stay in range. Half precision has its own loss scale and is left alone.
    """
    stacks: Row = []
    for column in zip(*rows, strict=True):
        like = next((g for g in column if g is not None), None)
        zero = None if like is None else torch.zeros_like(like) if any(g is None for g in column) else like
        stacks.append(None if zero is None else torch.stack([zero if g is None else g for g in column]))
    scale = torch.ones(len(rows), dtype=torch.float64, device=device)
    found = [g.view(len(g), -1) for g in stacks if g is not None and g.numel()]
    if found and not any(g.dtype is torch.float16 for g in found):
        largest = torch.stack([torch.maximum(g.amax(1), -g.amin(1)).to(scale) for g in found]).amax(0)
        exponent = torch.frexp(largest).exponent.clamp(-120, 120)
        far = largest.isfinite() & (largest > 0) & (exponent.abs() > _NEAR)
        if far.is_cuda or far.any():  # nothing waits for a GPU
            scale = torch.where(far, torch.ldexp(scale, -exponent), scale)
            for g in found:
                g.mul_(scale.to(g)[:, None])
    return stacks, scale


def _combine(rows: Sequence[Row], alpha: Tensor) -> list[Tensor | None]:
    """Σ_t α_t of the rows, for every edge of the frontier."""
    present = [k for k in range(len(rows[0])) if any(row[k] is not None for row in rows)]
    results: list[Tensor | None] = [None] * len(rows[0])
    if present:
        targets = [torch.empty_like(next(g for row in rows if (g := row[k]) is not None)) for k in present]
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
