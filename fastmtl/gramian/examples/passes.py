"""The backward passes: cotangents of all losses where parameters are used, and whose rows they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fastmtl.gramian.examples import layout
from fastmtl.gramian.examples.formed import Operation, Reading
from fastmtl.gramian.examples.layout import Layout
from fastmtl.gramian.examples.parts import Key, key
from fastmtl.gramian.forms import Use
from fastmtl.graph import Edge
from fastmtl.inputs import Row

__all__ = ["Brought", "edges_of", "keys_of", "one_pass", "run"]


class Brought(NamedTuple):
    """What the passes have brought.

    Attributes:
        cotangents: where they arrived, of all tasks [T, ...].
        layouts: which rows are whose.
        mixed: edges where rows are several examples', with who reads there.
        sure: whether there is no other layout that would fit.
        heads: the gradients of other parameters, summed over all losses.
    """

    cotangents: dict[Edge, Tensor]
    layouts: dict[Key, Layout]
    mixed: list[tuple[Edge, Reading]]
    sure: bool
    heads: Row


def edges_of(reading: Reading) -> list[Edge]:
    """Where a use needs cotangents."""
    return reading.edges if isinstance(reading, Operation) else [reading.edge]


def run(
    losses: Tensor,
    readings: Sequence[Reading],
    heads: Sequence[Tensor],
    *,
    layouts: dict[Key, Layout] | None,
    retain_graph: bool,
    half: bool = False,
    sure: bool = False,
) -> Brought:
    """T passes from losses [T, B].

    Where layouts are not known, one more from the same losses times powers of two; for T > 1 two. `half` tells
    that some cotangents are float16, whose range is small. `sure` looks whether other layouts would fit too.
    """
    T, B = losses.shape
    edges = list(dict.fromkeys(edge for reading in readings for edge in edges_of(reading)))
    before: Row = []
    if layouts is None:
        w = layout.draw(B, losses.dtype, losses.device, half=half)
        if T > 1:  # sums of cotangents are not, bit by bit, the cotangents of sums
            before = one_pass(losses, edges, (), torch.ones_like(losses), retain_graph=True)
    rows = []
    for t in range(T):
        alone = torch.zeros_like(losses)
        alone[t] = 1
        keep = retain_graph or layouts is None or t < T - 1
        rows.append(one_pass(losses, edges, heads, alone, retain_graph=keep))
    columns = list(zip(*rows, strict=True))
    rows.clear()
    cotangents = {
        edge: column[0][None] if T == 1 else torch.stack([torch.zeros_like(like) if g is None else g for g in column])
        for edge, column in zip(edges, columns, strict=False)
        if (like := next((g for g in column if g is not None), None)) is not None
    }
    own = [_sum(column) for column in columns[len(edges) :]]
    if layouts is not None:
        return Brought(cotangents, layouts, [], True, own)
    if T == 1:
        before = [cotangents[edge][0] if edge in cotangents else None for edge in edges]
    after = one_pass(losses, edges, (), w.expand_as(losses), retain_graph=retain_graph)
    sums = {edge: (c, g) for edge, c, g in zip(edges, before, after, strict=True) if c is not None and g is not None}
    return Brought(cotangents, *_layouts(readings, sums, w, sure), own)


def one_pass(
    losses: Tensor, edges: Iterable[Edge], leaves: Iterable[Tensor], grad: Tensor, *, retain_graph: bool
) -> Row:
    """An ordinary backward pass from Σ grad · losses, without the weights' gradients."""
    inputs: list[Any] = [*(GradientEdge(*edge) for edge in edges), *leaves]
    if not inputs:
        return []
    grads = torch.autograd.grad(losses, inputs, grad, retain_graph=retain_graph, allow_unused=True)
    return [None if g is None else _dense(g) for g in grads]


def _dense(g: Tensor) -> Tensor:
    if g.is_nested:
        raise NotImplementedError(
            "batch_dim: expected no nested tensor where a parameter is used, got one; padded tensors and packed "
            "sequences have rows"
        )
    return g if g.layout is torch.strided else g.to_dense()


def _sum(column: Iterable[Tensor | None]) -> Tensor | None:
    present = [g for g in column if g is not None]
    return sum(present[1:], present[0]) if present else None


def keys_of(reading: Reading) -> list[Key]:
    """What the layouts of its rows depend on."""
    if isinstance(reading, Operation):
        return [(edge, 1, math.prod(edge[0]._input_metadata[edge[1]].shape)) for edge in reading.edges]
    return [key(reading)]


def _layouts(
    readings: Iterable[Reading], sums: dict[Edge, tuple[Tensor, Tensor]], w: Tensor, sure: bool
) -> tuple[dict[Key, Layout], list[tuple[Edge, Reading]], bool]:
    """The layout of every use; where there is none; and whether there is no other."""
    found: dict[Key, Layout] = {}
    regular: dict[tuple[Edge, int], int] = {}
    mixed: list[tuple[Edge, Reading]] = []
    for reading in readings:
        for k in keys_of(reading):
            edge, outer, lead = k
            if k in found or edge not in sums:
                sure &= k in found
                continue
            pre = regular.get((edge, outer))
            if pre is not None and lead % (pre * len(w)) == 0:  # of the same cotangent, counted in finer rows
                found[k] = Layout(pre)
                continue
            before, after = sums[edge]
            shape = () if isinstance(reading, Use) else before.shape
            own = layout.find(before, after, w, outer, lead, shape)
            if own is None:
                mixed.append((edge, reading))
                continue
            found[k] = own
            sure = sure and layout.is_sure(before, after, w, outer, lead, shape)
            if own.owner is None:
                regular[edge, outer] = own.pre
    return found, mixed, sure
