"""From T · B losses of B examples to the shared parameters' aggregated gradients."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastmtl.gramian.contraction import CANCELLED
from fastmtl.gramian.examples.formed import Derived, Formed, Operation, Reading, edges_of, is_use
from fastmtl.gramian.examples.kinds import Known, Memory, kind_of
from fastmtl.gramian.examples.layout import Layout
from fastmtl.gramian.examples.parts import Arrived, Entries, Weight
from fastmtl.gramian.examples.passes import Brought, keys_of, one_pass, run
from fastmtl.gramian.examples.products import Gram, Per
from fastmtl.gramian.forms import BIASES, Entrywise, Use
from fastmtl.gramian.hooks import has_hooks, seen_by_hooks
from fastmtl.gramian.plan import uses_of
from fastmtl.gramian.saved import is_builtin
from fastmtl.gramian.survey import Survey, parts_of
from fastmtl.gramian.trunk import without_autocast, working_dtype
from fastmtl.graph import Edge, Leaves, edge_of, is_leaf, leaves_of
from fastmtl.info import Info
from fastmtl.pipeline import coarsest
from fastmtl.rule import Context, Rule

__all__ = ["gram", "update"]

_KNOWN: Memory[Known] = Memory()
_TRIED: Memory[bool] = Memory()
_MIXING: Memory[bool] = Memory()

_PRODUCTS = 1 << 18  # entries of products of weights that are examined together

# Words in the names of operations behind which rows may be in any order.
_SCATTERING = ("Flip", "Gather", "Index", "MaskedS", "Pack", "Roll", "Scatter", "Sort", "Take", "Topk")

_Part: TypeAlias = Weight | Entries | Formed


class _Plan(NamedTuple):
    weights: list[Weight]
    entries: list[Entries]
    formed: Formed | None
    explicit: tuple[str, ...]

    def parts(self) -> list[_Part]:
        return [*self.weights, *self.entries, *([self.formed] if self.formed is not None else [])]

    def readings(self) -> list[Reading]:
        found: list[Reading] = [use for weight in self.weights for use in weight.uses]
        found += [use for entry in self.entries for use, _ in entry.uses]
        return found + (list(self.formed.uses) if self.formed is not None else [])


def update(
    method: Rule,
    losses: Tensor,
    named: Sequence[tuple[Tensor, str]],
    leaves: Leaves,
    context: Context,
    *,
    per: Per = "all",
    check: bool = True,
    scale_heads: bool,
    retain_graph: bool,
    tentative: bool = False,
) -> tuple[list[tuple[Tensor, Tensor]], Info] | None:
    """The aggregated gradients for losses [T, B], column b of which depends on example b alone.

    Args:
        method: a method that works on the Gram matrix.
        losses: [T, B].
        named: the shared parameters and their names.
        leaves: what the losses reach.
        context: the step's inputs besides gradients.
        per: which losses are aggregated with each other.
        check: whether a second pass verifies that examples do not mix, in this step or once for each kind of graph.
        scale_heads: whether leaves that are not shared get gradients weighted by α.
        retain_graph: whether the graph is kept.
        tentative: whether to return None if examples mix, or have in a graph of this kind; in the first
            step of each kind the graph is kept.

    Returns:
        What to add to `.grad`, and what the method saw and did.

    Raises:
        ValueError: a loss depends on several examples.
        NotImplementedError: hooks, or a use of a parameter that this engine does not know.
    """
    T, B = losses.shape
    parameters = [p for p, _ in named]
    heads = leaves.without(parameters).all()
    weighted = scale_heads and bool(heads)
    kind = kind_of(losses, parameters, leaves) if tentative else None
    if tentative and kind in _MIXING:
        return None
    with torch.no_grad():
        try:
            keep = retain_graph or weighted or (tentative and kind not in _TRIED)
            todo, brought = _resolved(losses, named, leaves, heads, check=check, retain_graph=keep)
        except (ValueError, NotImplementedError):
            if not tentative or kind in _TRIED:
                raise
            _MIXING[kind] = True
            return None
        if tentative:
            _TRIED[kind] = True
        cotangents = brought.cotangents
        found = Arrived(cotangents, brought.layouts, B, working_dtype({c.dtype for c in cotangents.values()}))
        with without_autocast(losses.device):
            gram = _gram(todo, found, T, per, losses.device)
            info = method.solve(gram.matrix, coarsest(parameters), context)
            info.explicit = todo.explicit
            alpha = info.alpha.view(T, B) if per == "all" else info.alpha.mT if per == "example" else info.alpha
            own, parts = brought.heads, todo.parts()
            del todo, brought
            updates = _gradients(parts, alpha.to(found.dtype), found)
        if weighted:
            own = one_pass(losses, heads, alpha.to(losses.dtype), retain_graph=retain_graph)
        updates += [(p, g) for p, g in zip(heads, own, strict=True) if g is not None]
    return updates, info


def _gradients(parts: list[_Part], alpha: Tensor, found: Arrived) -> list[tuple[Tensor, Tensor]]:
    """Every parameter with Σ α_tb g_tb of its gradients; empties `parts`, and drops what has been read."""
    readers = Counter(edge for part in parts for edge in part.edges)
    updates: list[tuple[Tensor, Tensor]] = []
    for _ in range(len(parts)):
        part = parts.pop(0)
        updates += part.gradients(alpha, found)
        for edge in part.edges:
            readers[edge] -= 1
            if not readers[edge]:
                found.cotangents.pop(edge, None)
    return updates


def gram(losses: Tensor, parameters: Sequence[Tensor], check: bool = True) -> Tensor:
    """The Gram matrix [T·B, T·B] of losses [T, B], float64, with loss (t, b) at t·B + b; the graph is kept.

    Raises:
        ValueError: a loss depends on several examples.
        NotImplementedError: as `update`.
    """
    T, B = losses.shape
    leaves = leaves_of([losses], [], joints=False)
    named = [(p, f"parameter {k}") for k, p in enumerate(parameters)]
    with torch.no_grad():
        todo, brought = _resolved(losses, named, leaves, [], check=check, retain_graph=True)
        dtype = working_dtype({c.dtype for c in brought.cotangents.values()})
        with without_autocast(losses.device):
            found = Arrived(brought.cotangents, brought.layouts, B, dtype)
            return _gram(todo, found, T, "all", losses.device).matrix


def _resolved(
    losses: Tensor,
    named: Sequence[tuple[Tensor, str]],
    leaves: Leaves,
    heads: Sequence[Tensor],
    *,
    check: bool,
    retain_graph: bool,
) -> tuple[_Plan, Brought]:
    """The plan, and what the passes brought for it.

    Only the check can tell whether an operation that takes parts of a parameter, as an embedding does, takes some for
    each example or the same for all.

    Raises:
        ValueError: examples mix.
    """
    graph, B = _graph(leaves), losses.shape[1]
    nodes, parameters = list(leaves.owner), [p for p, _ in named]
    kind = None if check else kind_of(losses, parameters, leaves)
    known = _KNOWN.get(kind)
    half = any(x.dtype is torch.float16 for node in nodes for x in node._input_metadata if not x.is_nested_tensor)
    at = {id(node.variable): node for node in nodes if is_leaf(node)}
    reached = [(at[id(p)], p, name) for p, name in named if id(p) in at]
    constant = {nodes[k] for k in known.constant} if known is not None else set[Any]()
    odd = {nodes[k] for k in known.odd} if known is not None else set[Any]()
    while True:
        derived = Derived((node for node, _, _ in reached), constant)
        todo = _plan(reached, graph, derived, odd, B)
        readings = todo.readings()
        keys = list(dict.fromkeys(k for reading in readings for k in keys_of(reading)))
        layouts = dict.fromkeys(keys, Layout()) if B == 1 else None
        if known is not None:
            layouts = dict(zip(keys, known.layouts, strict=True))
        # What the graph saved is kept if it is needed again, or may be.
        doubtful = layouts is None and any(_is_doubtful(reading, derived, B) for reading in readings)
        keep = retain_graph or todo.formed is not None or doubtful
        uneven = any(isinstance(lead, int) and lead % B for _, _, lead in keys)  # that of a nested tensor is symbolic
        scattered = layouts is None and (uneven or any(_scatters(node.name()) for node in nodes))
        brought = run(
            *(losses, readings, heads),
            layouts=layouts,
            retain_graph=keep,
            half=half,
            sure=kind is not None,
            scattered=scattered,
        )
        if not brought.mixed:
            if layouts is None and kind is not None and brought.sure:
                places = {node: k for k, node in enumerate(nodes)}
                found = [brought.layouts[k] for k in keys]
                _KNOWN[kind] = Known([places[x] for x in constant], [places[x] for x in odd], found)
            return todo, brought
        mixed = dict(brought.mixed)
        again = {node for node, _ in mixed if derived.may_be_constant(node, B)}
        formless = {edge[0] for edge, reading in mixed.items() if _is_batched(reading)} - again
        # Where even the losses would be made of parameters alone, some of those nodes have rows of examples.
        all_derived = Derived((node for node, _, _ in reached), constant | again)(edge_of(losses)[0])
        if not keep or not (again or formless) or all_derived:
            layers = {name for name, _ in BIASES}  # which no weight is made by
            made = any(node.name() not in layers and derived.may_be_constant(node, B, even=True) for node, _ in mixed)
            raise ValueError(_mixed(next(iter(mixed)), leaves, B if made else None))
        constant |= again
        odd |= formless


@functools.cache
def _scatters(operation: str) -> bool:
    """Whether rows may come out of an operation of this name in another order, or others' rows beside them."""
    return any(word in operation for word in _SCATTERING)


def _is_batched(reading: Reading) -> bool:
    """Whether it is a batch of products, which may be the batch of examples: a matrix for each."""
    return isinstance(reading, Use) and reading.groups > 1 and reading.outer > 1


def _is_doubtful(reading: Reading, derived: Derived, B: int) -> bool:
    """Whether rows may differ from those of the form, or may not belong to examples."""
    if _is_batched(reading):
        return True
    for node, output in edges_of(reading):
        shape = node._input_metadata[output].shape
        if (len(shape) < 3 or B not in shape[:2]) and derived.may_be_constant(node, B):
            return True
    return False


def _graph(leaves: Leaves) -> Survey:
    """The whole graph: nothing is cut off."""
    users: dict[Any, list[tuple[Any, int, int]]] = {}
    for node in leaves.owner:
        for i, (behind, output) in enumerate(node.next_functions):
            if behind is not None:
                users.setdefault(behind, []).append((node, i, output))
    nodes = [node for node in leaves.owner if node.next_functions]
    return Survey([], frozenset(), {}, [], False, nodes, not all(map(is_builtin, nodes)), users)


def _plan(reached: Sequence[tuple[Any, Tensor, str]], graph: Survey, derived: Derived, odd: set[Any], B: int) -> _Plan:
    weights: list[Weight] = []
    entries: list[Entries] = []
    others: list[tuple[Tensor, str]] = []
    readers: dict[Any, str] = {}  # operations that are bypassed, with the name of what they read
    ways: dict[Edge, str] = {}
    for node, parameter, name in reached:
        parts = parts_of(node, graph) or []
        if not parts:
            continue
        for part in parts:
            for consumer in part.consumers:
                readers.setdefault(consumer.node, name)
                ways.update((edge, name) for edge in consumer.way)
        if any(consumer.node in odd for part in parts for consumer in part.consumers):
            others.append((parameter, name))
            continue
        own = [(uses_of(part.consumers, parameter.device), part) for part in parts]
        if all(uses is not None and all(is_use(use, derived) and use.hold() for use in uses) for uses, _ in own):
            weights += [Weight(parameter, uses, part.block) for uses, part in own if uses is not None]
            continue
        small = [[(Entrywise.of(c.node, c.operand), c) for c in part.consumers] for part in parts]
        if all(
            use is not None and c.order is None and not derived(c.node) and use.hold()
            for row in small
            for use, c in row
        ):
            for row, part in zip(small, parts, strict=True):
                entries.append(Entries(parameter, [(u, c.flipped) for u, c in row if u is not None], part.block))
            continue
        others.append((parameter, name))
    _refuse_hooks(readers, ways)
    formed = Formed([p for p, _ in others], graph.users, derived, odd) if others else None
    if formed is not None:
        for reading in formed.uses:
            if not isinstance(reading, Operation) and not reading.hold():
                raise NotImplementedError(f"batch_dim: {reading.node.name()} saved a tensor that is not plain")
    return _Plan(weights, _without_biases(entries, weights, B), formed, tuple(name for _, name in others))


def _without_biases(entries: Sequence[Entries], weights: Sequence[Weight], B: int) -> list[Entries]:
    """The parameters without biases of a weight with one row for each example, which takes those over."""
    single = {
        use.node: weight
        for weight in weights
        for use in weight.uses
        if len(weight.uses) == 1 and use.groups == 1 and use.rows == B and use.outer == 1 and not use.is_indexed
    }
    rest = []
    for entry in entries:
        node = entry.bias_of()
        weight = None if node is None else single.get(node)
        if weight is None or weight.bias is not None or entry.parameter.shape != (weight.uses[0].width,):
            rest.append(entry)
        else:
            weight.bias = entry.parameter
    return rest


def _refuse_hooks(readers: Mapping[Any, str], ways: Mapping[Edge, str]) -> None:
    """Raises NotImplementedError if a closed form would bypass hooks."""
    hooked = [
        name
        for node, name in [*readers.items(), *((node, name) for (node, _), name in ways.items())]
        if has_hooks(node)
    ]
    hooked += [ways[edge] for edge in seen_by_hooks(ways)]
    if hooked:
        raise NotImplementedError(f"batch_dim: {hooked[0]} is read by an operation, or as a view, that has hooks")


def _mixed(edge: Edge, leaves: Leaves, wide: int | None) -> str:
    """What is wrong with the rows of an edge; `wide`: B, where a weight may be what is as wide as the batch."""
    node, output = edge
    why = ""
    for other in leaves.owner:  # InstanceNorm runs as a batch norm on a batch of one
        if "BatchNorm" in other.name() and getattr(other, "_saved_training", True) and _rows(other) != 1:
            why = f"; there is {other.name()} with statistics of the batch (GroupNorm has none, .eval() takes none)"
    if not why and wide is not None:
        why = (
            ". If that is a weight, made of parameters and buffers as by a parametrization, its dimension of "
            f"{wide} is taken for that of the examples, which it is not in a batch of another size"
        )
    return (
        "losses: expected loss b to depend on example b alone, but losses of several reach the same rows of what "
        f"{node.name()} {list(node._input_metadata[output].shape)} returns{why}. method.backward(losses.unbind()) "
        "takes any losses"
    )


def _rows(node: Any) -> int:
    return int(node._input_metadata[0].shape[0])


def _gram(todo: _Plan, found: Arrived, T: int, per: Per, device: torch.device) -> Gram:
    gram = Gram(T, found.examples, per, device)
    rows = [g for entry in todo.entries if (g := entry.form(found)) is not None]
    if rows:
        gram.add_rows(torch.cat(rows, 2) if len(rows) > 1 else rows[0])
    parts = []
    singles = [(weight, factors) for weight in todo.weights if (factors := weight.single(gram, found)) is not None]
    done, some = set[int](), max(1, _PRODUCTS // found.examples**2)
    for k in range(0, len(singles), some):
        if gram.add_products([factors for _, factors in singles[k : k + some]]):
            done.update(id(weight) for weight, _ in singles[k : k + some])
    others: list[Weight | Formed] = [weight for weight in todo.weights if id(weight) not in done]
    if todo.formed is not None:
        others.append(todo.formed)
    for part in others:
        # What may have to be computed again is kept apart.
        own = gram.like() if isinstance(part, Weight) and part.has_rows(found.examples) else gram
        sizes = part.add(own, found)
        if own is not gram:
            gram.add(own)
            if sizes is not None:
                parts.append((part, own, sizes))
    if device.type == "cpu" and found.dtype is not torch.float64 and parts:  # nothing waits for a GPU
        allowed = CANCELLED * gram.diagonal
        exact = found._replace(dtype=torch.float64)
        for part, own, sizes in parts:
            if (len(parts) * sizes > allowed).any():
                again = gram.like()
                part.add(again, exact)
                gram.replace(own, again)
    return gram
