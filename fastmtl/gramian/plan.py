"""Decides which parameters' gradients are contracted from their factors, and which are formed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.gramian import cost
from fastmtl.gramian.contraction import Contraction
from fastmtl.gramian.forms import Use, is_bias, is_small, use_of
from fastmtl.gramian.hooks import has_hooks, seen_by_hooks
from fastmtl.gramian.survey import Consumer, Survey, parts_of
from fastmtl.graph import SEVERAL, Edge, edge_of

__all__ = ["Plan", "plan", "settled", "uses_of"]


class Plan(NamedTuple):
    """How the Gram matrix is computed.

    Attributes:
        contractions: weights or blocks whose gradients are contracted.
        explicit: parameters whose T gradients are formed.
        unrecognised: names of the explicit parameters for which no closed form was found.
        work: what the step costs.
    """

    contractions: list[Contraction]
    explicit: list[Tensor]
    unrecognised: tuple[str, ...]
    work: cost.Work


def plan(named: Sequence[tuple[Tensor, str]], graph: Survey, owner: dict[Any, int], tasks: int) -> Plan:
    """The plan for the parameters that several losses reach."""
    contractions: list[Contraction] = []
    explicit: list[Tensor] = []
    unrecognised: list[str] = []
    biases: list[tuple[Tensor, list[Consumer]]] = []
    weights: list[tuple[list[Consumer], Contraction]] = []
    work = cost.Work.of(graph, tasks)
    for parameter, name in named:
        node = edge_of(parameter)[0]
        if owner.get(node) != SEVERAL:
            continue
        work.parameters += parameter.numel()
        parts = parts_of(node, graph)
        if parts is not None and all(is_small(consumer) for part in parts for consumer in part.consumers):
            if len(parts) == 1 and all(is_bias(consumer) for consumer in parts[0].consumers):
                biases.append((parameter, parts[0].consumers))
            else:
                explicit.append(parameter)
            continue
        blocks = [] if parts is None else [(uses_of(part.consumers, parameter.device), part) for part in parts]
        if parts is None or any(own is None for own, _ in blocks):
            explicit.append(parameter)
            unrecognised.append(name)
            work.formed += parameter.numel() * cost.rows_read(graph.users.get(node, ()))
            continue
        found = [
            Contraction(parameter, own, part.block, _way(part.consumers)) for own, part in blocks if own is not None
        ]
        uses = [contraction.uses for contraction in found]
        if cost.is_cheaper_explicit(uses, tasks, parameter.numel()):
            work.formed += sum(cost.forward(use) for part in uses for use in part)
            explicit.append(parameter)
            continue
        work.spared += sum(cost.forward(use) for part in uses for use in part)
        work.contracted += sum(cost.closed(part, tasks) for part in uses)
        contractions += found
        if len(parts) == 1:
            weights.append((parts[0].consumers, found[0]))
    for bias, consumers in biases:
        contraction = _with_this_bias(bias, consumers, weights)
        if contraction is None:
            explicit.append(bias)
        else:
            contraction.bias = bias
            contraction.way += _way(consumers)
    work.explicit = sum(p.numel() for p in explicit)
    return Plan(contractions, explicit, tuple(unrecognised), work)


def settled(todo: Plan, named: Sequence[tuple[Tensor, str]]) -> Plan:
    """The plan once hooks and what the operations saved, which is held from now on, have made some weights explicit.

    Raises:
        RuntimeError: from autograd, if something that an operation saved was freed or overwritten.
    """
    ways = dict.fromkeys(edge for contraction in todo.contractions for edge in contraction.way)
    seen = set(seen_by_hooks(ways))
    loose = {id(c.parameter) for c in todo.contractions if not _can_stay(c, seen)}
    if not loose:
        return todo
    gone = [c for c in todo.contractions if id(c.parameter) in loose]
    explicit = {id(p): p for c in gone for p in (c.parameter, c.bias) if p is not None}
    return todo._replace(
        contractions=[c for c in todo.contractions if id(c.parameter) not in loose],
        explicit=[*todo.explicit, *explicit.values()],
        unrecognised=(*todo.unrecognised, *(name for p, name in named if id(p) in loose)),
    )


def _can_stay(contraction: Contraction, seen: set[Edge]) -> bool:
    if not seen.isdisjoint(contraction.way):
        return False
    nodes = {*(use.node for use in contraction.uses), *(node for node, _ in contraction.way)}
    return all(use.hold() for use in contraction.uses) and not any(map(has_hooks, nodes))


def _way(consumers: Sequence[Consumer]) -> Iterator[Edge]:
    return (edge for consumer in consumers for edge in consumer.way)


def uses_of(consumers: Sequence[Consumer], device: torch.device) -> list[Use] | None:
    """The closed forms of all consumers; None if one has none or if they do not go together."""
    uses: list[Use] = []
    for consumer in consumers:
        use = use_of(consumer, device)
        if use is None:
            return None
        uses.append(use)
    for side in (0, 1):
        if len({(use.is_indexed, use.groups, use.width, use.depth) for use in uses if use.side == side}) > 1:
            return None
    # If a weight is read in several orders, its gradients need products of their own.
    return uses if len({use.order for use in uses}) < 2 and _match(uses) else None


def _match(uses: Sequence[Use]) -> bool:
    """Whether the sides see the same matrix, of one group."""
    shapes = {(use.width, use.depth) if use.side == 0 else (use.depth, use.width) for use in uses}
    both = len({use.side for use in uses}) > 1
    return len(shapes) == 1 and not (both and (uses[0].groups > 1 or uses[0].order is not None))


def _with_this_bias(
    bias: Tensor, consumers: Sequence[Consumer], weights: Sequence[tuple[list[Consumer], Contraction]]
) -> Contraction | None:
    """The weight that occurs in exactly the operations in which the bias does, once in each."""
    for others, contraction in weights:
        use = contraction.uses[0]
        if (
            len(others) == len(consumers)
            and len({use.side for use in contraction.uses}) == 1
            and bias.shape == (use.groups * use.width,)
            and all(any(is_bias(consumer, other) for other in others) for consumer in consumers)
        ):
            return contraction
    return None
