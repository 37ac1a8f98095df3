"""Parameters without a closed form: their gradients are formed, each operation run backwards for each example."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from fastmtl.gramian.examples.layout import Layout
from fastmtl.gramian.examples.parts import Arrived, factors, rows_of_entries
from fastmtl.gramian.examples.products import Gram
from fastmtl.gramian.forms import ENTRYWISE, Entrywise, Use, use_of
from fastmtl.gramian.survey import Consumer
from fastmtl.graph import Edge, edge_of, is_leaf, vjp

__all__ = ["Derived", "Formed", "Operation", "Reading", "edges_of", "is_use"]


# Operations that repeat their input, or take parts of it, by indices that are not part of the graph.
_SELECTIONS = frozenset(
    {
        "EmbeddingBackward0",
        "EmbeddingBagBackward0",
        "ExpandBackward0",
        "GatherBackward0",
        "IndexBackward0",
        "IndexSelectBackward0",
        "RepeatBackward0",
        "RepeatInterleaveBackward0",
        "TakeBackward0",
    }
)


# Products of two matrices, or of one and a vector: which of their inputs is the first factor.
_FACTORS = {"AddmmBackward0": 1, "MmBackward0": 0, "MvBackward0": 0}


class Operation:
    """An operation without a closed form: it is run backwards once for each loss, with the rows of one example.

    Attributes:
        node: its graph node.
        operand: which of its inputs is read.
        outputs: the outputs that losses depend on.
        shape: of what is read.
    """

    def __init__(self, node: Any, operand: int, outputs: Sequence[int]) -> None:
        self.node, self.operand, self.outputs = node, operand, outputs
        source, output = node.next_functions[operand]
        like = source._input_metadata[output]
        self.shape, self._is_complex = torch.Size(like.shape), like.dtype.is_complex

    @property
    def edges(self) -> list[Edge]:
        """Where cotangents are needed."""
        return [(self.node, k) for k in self.outputs]

    def rows(self, arrived: Arrived) -> Tensor:
        """The gradients [T, B, *operand]."""
        found = {k: arrived.cotangents[self.node, k] for k in self.outputs if (self.node, k) in arrived.cotangents}
        T = len(next(iter(found.values())))
        run = self.node if callable(self.node) else self.node.apply
        rows = []
        for t in range(T):
            for b in range(arrived.examples):
                grads: list[Tensor | None] = [None] * len(self.node._input_metadata)
                for k, c in found.items():
                    grads[k] = _only(c[t], arrived.layouts[(self.node, k), 1, c[t].numel()], b, arrived.examples)
                g = run(*grads)
                g = g[self.operand] if isinstance(g, tuple) else g
                rows.append(None if g is None else self._as_read(g))
        dtype = arrived.dtype.to_complex() if self._is_complex else arrived.dtype
        like = torch.zeros(self.shape, dtype=dtype, device=next(iter(found.values())).device)
        stacked = torch.stack([like if g is None else g.to(dtype) for g in rows])
        return stacked.view(T, arrived.examples, *self.shape)

    def _as_read(self, g: Tensor) -> Tensor:
        """A gradient in the shape of what is read, and real where that is, as autograd makes it; dense."""
        g = (g if g.layout is torch.strided else g.to_dense()).sum_to_size(self.shape)
        return g.real if g.is_complex() and not self._is_complex else g


def _only(c: Tensor, layout: Layout, b: int, B: int) -> Tensor:
    """The rows of one example, zeros elsewhere."""
    out = torch.zeros_like(c, memory_format=torch.contiguous_format)
    if layout.owner is not None:
        mine = (layout.owner == b).view(c.shape)
        return torch.where(mine, c, out)
    out.view(layout.pre, B, -1)[:, b] = c.reshape(layout.pre, B, -1)[:, b]
    return out


Reading = Use | Entrywise | Operation
Reader: TypeAlias = "tuple[Any, int, int]"  # a node, its input, and the output that it reads there


def edges_of(reading: Reading) -> list[Edge]:
    """Where a use needs cotangents."""
    return reading.edges if isinstance(reading, Operation) else [reading.edge]


def _readings(
    edge: Edge, users: Mapping[Any, Sequence[Reader]], derived: Derived, odd: set[Any], device: torch.device
) -> Iterator[tuple[Edge, Reading]]:
    """The uses of parameters and of values made of parameters alone: the edge that is read, and how."""
    for user, operand, output in users.get(edge[0], ()):
        if output != edge[1]:
            continue
        use = use_of(Consumer(user, operand, False, ()), device)
        entrywise = Entrywise.of(user, operand)
        if user not in odd and use is not None and is_use(use, derived):
            yield edge, use
        elif derived(user) and user in users:  # only the losses are read by nothing
            for k in range(len(user._input_metadata)):
                yield from _readings((user, k), users, derived, odd, device)
        elif user not in odd and entrywise is not None:
            yield edge, entrywise
        else:
            read = {k for _, _, k in users.get(user, ())}
            yield edge, Operation(user, operand, sorted(read) or [0])


def is_use(use: Use, derived: Derived) -> bool:
    """Whether a parameter meets activations in this use."""
    return not derived(use.node)


class Derived:
    """Which nodes compute something of parameters alone.

    Args:
        parameters: nodes of the shared ones.
        constant: nodes that have been found to return the same for all examples, although they repeat a parameter,
            take parts of it, or have inputs that are not part of the graph.
    """

    def __init__(self, parameters: Iterable[Any], constant: Iterable[Any] = ()) -> None:
        self._known: dict[Any, bool] = dict.fromkeys(parameters, True)
        self._constant = set(constant)

    def may_be_constant(self, node: Any, B: int, even: bool = False) -> bool:
        """Whether a node is one of these, provided that it has no rows for each example; `even` if it is as wide."""
        if node in self._constant or not all(self(edge[0]) for edge in node.next_functions if edge[0] is not None):
            return False
        return even or node.name() in _SELECTIONS or B not in _sizes_of_rows(node)

    def __call__(self, node: Any) -> bool:
        """Whether this node computes something of parameters alone."""
        stack = [node]
        while stack:
            top = stack[-1]
            if top in self._known:
                stack.pop()
                continue
            if is_leaf(top):
                self._known[top] = isinstance(top.variable, nn.Parameter)
                continue
            behind = [edge[0] for edge in top.next_functions]
            closed = top in self._constant or (top.name() not in _SELECTIONS and _closed(top, behind))
            if not closed or any(self._known.get(x) is False for x in behind):
                self._known[top] = False
                continue
            open_ = [x for x in behind if x is not None and x not in self._known]
            if open_:
                stack += open_
                continue
            self._known[top] = True
        return self._known[node]


def _sizes_of_rows(node: Any) -> Sequence[int]:
    """The dimensions along which there may be examples: not those that are the parameter's in a product with data."""
    shape: Sequence[int] = node._input_metadata[0].shape
    first = _FACTORS.get(node.name())
    if first is None or node._input_metadata[0].is_nested_tensor:
        return shape
    left, right = (node.next_functions[k][0] for k in (first, first + 1))
    if left is None:
        return shape[:1]
    return shape[1:] if right is None else shape


def _closed(node: Any, behind: Sequence[Any]) -> bool:
    """Whether an operation has no input outside the graph, or only one of the parameter's own shape, such as a mask."""
    if None not in behind:
        return bool(behind)
    if all((node.name(), k) not in ENTRYWISE for k in range(2)) or len(behind) > 2:
        return False
    shapes = {tuple(x._input_metadata[k].shape) for x, k in node.next_functions if x is not None}
    return shapes == {tuple(node._input_metadata[0].shape)}


class Formed:
    """All parameters whose gradients [T, B, P] are formed.

    Args:
        parameters: the parameters.
        users: which nodes read which, in the graph.
        derived: which nodes compute something of parameters alone.
        odd: nodes whose closed form is not for the order of their rows.
    """

    def __init__(
        self, parameters: Sequence[Tensor], users: Mapping[Any, Sequence[Reader]], derived: Derived, odd: set[Any]
    ) -> None:
        self.parameters = list(parameters)
        self.readings: dict[Edge, list[Reading]] = {}
        seen: set[tuple[Edge, int, Any]] = set()
        for p in parameters:
            for edge, reading in _readings(edge_of(p), users, derived, odd, p.device):
                where = (edge, id(reading.node), getattr(reading, "operand", None))
                if where not in seen:  # what is made of several parameters is found from each
                    seen.add(where)
                    self.readings.setdefault(edge, []).append(reading)
        self._rows: list[Tensor | None] = []

    @property
    def edges(self) -> list[Edge]:
        """Where cotangents are needed."""
        return list(dict.fromkeys(e for use in self.uses for e in edges_of(use)))

    @property
    def uses(self) -> Iterator[Reading]:
        """All readings."""
        return (reading for found in self.readings.values() for reading in found)

    def add(self, gram: Gram, arrived: Arrived) -> Tensor | None:
        """Adds their contribution to the Gram matrix."""
        T, B = gram.T, gram.B
        edges, stacks = [], []
        direct: dict[int, Tensor] = {}
        for edge, readings in self.readings.items():
            parts = [_rows(reading, arrived) for reading in readings if _arrives(reading, arrived)]
            if not parts:
                continue
            like = edge[0].variable if is_leaf(edge[0]) else edge[0]._input_metadata[edge[1]]
            parts = [rows.reshape(T * B, *like.shape) for rows in parts]
            rows = sum(parts[1:], parts[0])
            if is_leaf(edge[0]):
                direct[id(edge[0].variable)] = rows
            else:
                edges.append(GradientEdge(*edge))
                stacks.append(rows.to(like.dtype))
        through = _pulled_back(edges, stacks, self.parameters)
        self._rows = []
        for p, g in zip(self.parameters, through, strict=True):
            own = direct.get(id(p))
            whole = own if g is None else g if own is None else g.to(own.dtype) + own.view(g.shape)
            if whole is not None:
                gram.add_rows(whole.to(arrived.dtype).reshape(T, B, -1))
            self._rows.append(whole)
        return None

    def gradients(self, alpha: Tensor, arrived: Arrived) -> Iterator[tuple[Tensor, Tensor]]:
        """Every parameter and Σ α_tb g_tb of its gradients; alpha [T, B]."""
        for p, rows in zip(self.parameters, self._rows, strict=True):
            if rows is not None:
                g = alpha.to(rows.dtype).flatten() @ rows.reshape(len(rows), -1)
                yield p, g.view(p.shape).to(p.dtype)


def _arrives(reading: Reading, arrived: Arrived) -> bool:
    return any(edge in arrived.cotangents for edge in edges_of(reading))


def _rows(reading: Reading, arrived: Arrived) -> Tensor:
    """The gradients [T, B, ...] of what is read."""
    if isinstance(reading, Operation):
        return reading.rows(arrived)
    if isinstance(reading, Entrywise):
        return rows_of_entries(reading, arrived)
    A, C = factors(reading, arrived)  # of a use that is not flipped: in the order of what is read
    if A.dim() == 2:
        T, B, S, width = C[0].shape
        G = C.new_zeros(T, B * reading.depth, width)
        places = (torch.arange(B, device=A.device)[:, None] * reading.depth + A).flatten()
        return G.index_add_(1, places, C[0].reshape(T, B * S, width)).view(T, B, reading.depth, width)
    G = C.mT @ A[:, None]  # [g, T, B, O, I]
    G = G if reading.side == 0 else G.mT
    return G.permute(1, 2, 0, 3, 4)


def _pulled_back(edges: list[GradientEdge], stacks: list[Tensor], parameters: list[Tensor]) -> list[Tensor | None]:
    """The parameters' gradients [n, ...] from n cotangents of what is made of them."""
    if not edges:
        return [None] * len(parameters)
    try:
        return vjp(edges, stacks, parameters, retain_graph=True, batched=True)
    except RuntimeError:  # an operation that cannot be vectorised
        each = [vjp(edges, [s[k] for s in stacks], parameters, retain_graph=True) for k in range(len(stacks[0]))]
        return [None if column[0] is None else torch.stack(column) for column in zip(*each, strict=True)]
