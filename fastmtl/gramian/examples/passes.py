"""The backward passes: cotangents of all losses where parameters are used, and which example each row belongs to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, _engine_run_backward

from fastmtl.gramian.examples import layout
from fastmtl.gramian.examples.formed import Operation, Reading, edges_of
from fastmtl.gramian.examples.kinds import Memory
from fastmtl.gramian.examples.layout import Layout
from fastmtl.gramian.examples.parts import Key, key
from fastmtl.gramian.forms import Use
from fastmtl.graph import Edge
from fastmtl.inputs import Row

__all__ = ["Brought", "keys_of", "one_pass", "run"]


class Brought(NamedTuple):
    """What the passes brought.

    Attributes:
        cotangents: by the edge where they arrived, of all tasks [T, ...].
        layouts: which rows belong to which example.
        mixed: edges where rows belong to several examples, with the use there.
        sure: whether no other layout would fit.
        heads: the gradients of other parameters, summed over all losses.
    """

    cotangents: dict[Edge, Tensor]
    layouts: dict[Key, Layout]
    mixed: list[tuple[Edge, Reading]]
    sure: bool
    heads: Row


def run(
    losses: Tensor,
    readings: Sequence[Reading],
    heads: Sequence[Tensor],
    *,
    layouts: dict[Key, Layout] | None,
    retain_graph: bool,
    half: bool = False,
    sure: bool = False,
    scattered: bool = False,
) -> Brought:
    """T passes from losses [T, B].

    If layouts are not known, one more from the same losses times powers of two, or two for T > 1. `half` says that some
    cotangents are float16, whose range is small. With `sure`, other layouts are tried, too. `scattered` says that rows
    may be in any order: then more examples than there are factors take more passes.
    """
    T, B = losses.shape
    edges = list(dict.fromkeys(edge for reading in readings for edge in edges_of(reading)))
    sums: dict[Edge, Tensor] = {}
    if layouts is None and T > 1:  # sums of cotangents are not bit for bit the cotangents of sums
        _pass(losses, edges, (), torch.ones_like(losses), sums.__setitem__, retain_graph=True)
    found: list[dict[Edge, Tensor]] = []
    rows: list[Row] = []
    passed: set[Edge] = set()
    for t in range(T):
        alone = torch.zeros_like(losses)
        alone[t] = 1
        keep = retain_graph or layouts is None or t < T - 1
        found.append({})
        own, through = _pass(losses, edges, heads, alone, found[t].__setitem__, retain_graph=keep)
        rows.append(own)
        passed |= through
    own = [_sum(column) for column in zip(*rows, strict=True)]
    if T == 1:
        cotangents = {edge: c[None] for edge, c in found[0].items()}
    else:
        arrived = list(dict.fromkeys(edge for row in found for edge in row))
        like = {edge: next(row[edge] for row in found if edge in row) for edge in arrived}
        cotangents = {
            e: torch.stack([row[e] if e in row else torch.zeros_like(like[e]) for row in found]) for e in arrived
        }
    if layouts is not None:
        return Brought(cotangents, layouts, [], True, own)
    factors = layout.draw(B, losses.dtype, losses.device, half=half)
    more = factors[1:] if scattered else ()
    check = _Check(readings, found[0] if T == 1 else sums, factors, sure, scattered and len(factors) > 1)
    # What is compared as it arrives need not be kept until the end. With other leaves it may have gone on to them.
    last = None if heads else [edge for edge in edges if edge not in passed]
    keep = retain_graph or len(more) > 0
    _pass(losses, edges, (), factors[0].expand_as(losses), check, last=last, retain_graph=keep)
    for k, w in enumerate(more if check.open else ()):
        keep = retain_graph or k < len(more) - 1
        _pass(losses, list(check.open), (), w.expand_as(losses), check.again, retain_graph=keep)
    return Brought(cotangents, *check.results(), own)


def one_pass(losses: Tensor, leaves: Sequence[Tensor], grad: Tensor, *, retain_graph: bool) -> Row:
    """An ordinary backward pass from Σ grad · losses."""
    return list(torch.autograd.grad(losses, leaves, grad, retain_graph=retain_graph, allow_unused=True))


def _pass(
    losses: Tensor,
    edges: Sequence[Edge],
    leaves: Sequence[Tensor],
    grad: Tensor,
    see: Callable[[Edge, Tensor], object],
    *,
    last: Sequence[Edge] | None = None,
    retain_graph: bool,
) -> tuple[Row, set[Edge]]:
    """The same without the weights' gradients: `see` is given what arrives at edges, as hooks of tensors leave it.

    Autograd returns what arrives at an edge before those hooks if the pass goes on from there, and after them if not.

    Args:
        losses: where the pass begins.
        edges: where cotangents are needed.
        leaves: other parameters.
        grad: the losses' gradients.
        see: what is given each cotangent.
        last: the edges from which the pass does not go on, if known.
        retain_graph: whether the graph is kept.

    Returns:
        The gradients of the leaves, and the edges from which the pass went on.
    """
    through: set[Edge] = set()
    outputs: dict[Any, list[Edge]] = {}
    for edge in edges:
        outputs.setdefault(edge[0], []).append(edge)

    def catch(ways: list[Edge]) -> Any:
        def hook(grads: Sequence[Tensor | None]) -> None:
            for edge in ways:
                through.add(edge)
                g = grads[edge[1]]
                if g is not None:
                    see(edge, _dense(g))

        return hook

    last = edges if last is None else last
    inputs = (*(GradientEdge(*edge) for edge in last), *leaves)
    if not inputs:
        return [], through
    handles = [node.register_prehook(catch(ways)) for node, ways in outputs.items()]
    try:
        # What `torch.autograd.grad` calls after checking its arguments.
        grads = _engine_run_backward(
            (losses,), (grad,), retain_graph, False, inputs, allow_unreachable=True, accumulate_grad=False
        )
    finally:
        for handle in handles:
            handle.remove()
    for edge, g in zip(last, grads, strict=False):
        if g is not None and edge not in through:
            see(edge, _dense(g))
    return list(grads[len(last) :]), through


def _dense(g: Tensor) -> Tensor:
    if g.is_nested:
        raise NotImplementedError(
            "batch_dim: expected no nested tensor where a parameter is used, got one; use padded tensors or packed "
            "sequences"
        )
    return g if g.layout is torch.strided else g.to_dense()


def _sum(column: Iterable[Tensor | None]) -> Tensor | None:
    present = [g for g in column if g is not None]
    return sum(present[1:], present[0]) if present else None


def keys_of(reading: Reading) -> list[Key]:
    """What the layouts of a reading's rows depend on."""
    if isinstance(reading, Operation):
        return [(edge, 1, math.prod(edge[0]._input_metadata[edge[1]].shape)) for edge in reading.edges]
    return [key(reading)]


# How many rows preceded the batch, at all uses in order, in passes of such shapes: tried first the next time.
_BEFORE: Memory[list[int]] = Memory()


class _Check:
    """Finds the layouts of all uses, one cotangent after the other as the second pass brings them.

    Args:
        readings: the uses.
        sums: what came for the sums of all losses.
        factors: what the losses are multiplied by, now and in further passes [n, B].
        sure: whether to look for other layouts that would fit.
        further: whether there will be those passes.

    Attributes:
        open: what came to edges where those are needed.
    """

    def __init__(
        self, readings: Iterable[Reading], sums: dict[Edge, Tensor], factors: Tensor, sure: bool, further: bool
    ) -> None:
        self.open: dict[Edge, list[Tensor]] = {}
        self._factors, self._further, self._unknown = factors, further, list[tuple[Key, Reading]]()
        self._sums, self._sure = sums, sure
        self._todo: dict[Edge, dict[Key, Reading]] = {}
        for reading in readings:
            for k in keys_of(reading):
                if k[0] in sums:
                    self._todo.setdefault(k[0], {}).setdefault(k, reading)
                else:
                    self._sure = False
        self._keys = [k for found in self._todo.values() for k in found]
        self._kind = tuple((outer, lead, sums[edge].shape) for edge, outer, lead in self._keys)
        self._first = dict(zip(self._keys, _BEFORE.get(self._kind, ()), strict=False))
        self._found: dict[Key, Layout] = {}
        self._mixed: list[tuple[Edge, Reading]] = []

    def __call__(self, edge: Edge, after: Tensor) -> None:
        """Takes what has arrived at an edge."""
        w, regular = self._factors[0], dict[int, int]()
        for k, reading in self._todo.pop(edge, {}).items():
            _, outer, lead = k
            pre = regular.get(outer)
            if pre is not None and lead % (pre * len(w)) == 0:  # of the same cotangent, counted in finer rows
                self._found[k] = Layout(pre)
                continue
            before = self._sums[edge]
            shape = () if isinstance(reading, Use) else before.shape
            own = layout.find(before, after, w, outer, lead, shape, first=self._first.get(k, 1))
            if own is None and self._further:
                self.open[edge] = [after]
                self._unknown.append((k, reading))
                continue
            if own is None:
                self._mixed.append((edge, reading))
                continue
            self._found[k] = own
            self._sure = self._sure and layout.is_sure(before, after, w, outer, lead, shape)
            if own.owner is None:
                regular[outer] = own.pre

    def again(self, edge: Edge, after: Tensor) -> None:
        """Takes what comes in further passes."""
        self.open[edge].append(after)

    def results(self) -> tuple[dict[Key, Layout], list[tuple[Edge, Reading]], bool]:
        """The layouts, the edges that have none, and whether no others would fit."""
        for k, reading in self._unknown:
            edge, outer, lead = k
            own = layout.find_scattered(self._sums[edge], self.open[edge], self._factors, outer, lead)
            self._sure = False
            if own is None:
                self._mixed.append((edge, reading))
            else:
                self._found[k] = own
        if not self._mixed and not self._todo:
            _BEFORE[self._kind] = [self._found[k].pre for k in self._keys]
        return self._found, self._mixed, self._sure and not self._todo
