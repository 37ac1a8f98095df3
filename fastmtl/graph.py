"""What T losses reach in the autograd graph: their own leaves, common ones, and where their paths meet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fastmtl.inputs import Row

__all__ = [
    "SEVERAL",
    "Edge",
    "Leaves",
    "Trunk",
    "behind_joints",
    "computes",
    "edge_of",
    "is_leaf",
    "leaves_of",
    "nothing_behind",
    "reached_by",
    "signed",
    "trunk_of",
    "vjp",
]

# A graph node and the number of one of its outputs: how the graph represents a tensor.
Edge: TypeAlias = "tuple[Any, int]"
SEVERAL = -1  # the owner of a node that several losses reach

_LEAF = "AccumulateGrad"
# Operations that take one entry out of a tensor, or all entries one by one.
_PARTS = frozenset({"SelectBackward0", "UnbindBackward0"})
# Operations that pass input i on as output i: their outputs are unrelated. DistributedDataParallel puts one behind all
# outputs of a model, and full backward hooks put one around a module.
_JOINTS = frozenset({"_DDPSinkBackward", "BackwardHookFunctionBackward"})
_SPECIAL = _PARTS | _JOINTS | {_LEAF}


class Leaves(NamedTuple):
    """The leaf tensors that T losses reach.

    Attributes:
        private: those that one loss alone reaches, for each loss.
        common: those that several reach.
        overlap: whether some losses share a part of the graph that a backward pass frees.
        owner: for every node that a loss reaches, which loss, or `SEVERAL`; joints have none.
        parted: ids of common leaves of which each loss reads different entries, such as learned loss scales.
        idle: leaves behind those outputs of joints that no loss reaches.
        joined: whether a path leads through a joint or through a stack of losses.
    """

    private: list[list[Tensor]]
    common: list[Tensor]
    overlap: bool
    owner: dict[Any, int]
    parted: frozenset[int]
    idle: list[Tensor]
    joined: bool

    def all(self) -> list[Tensor]:
        """Every leaf that a loss reaches."""
        return [*self.common, *(leaf for leaves in self.private for leaf in leaves)]

    def shared(self) -> list[Tensor]:
        """The common leaves that at least two losses reach in the same entries."""
        return [leaf for leaf in self.common if id(leaf) not in self.parted]

    def meet(self, tensors: Iterable[Tensor]) -> bool:
        """Whether one of the tensors is one of the leaves."""
        ids = {id(leaf) for leaf in self.all()}
        return any(id(x) in ids for x in tensors)

    def without(self, tensors: Iterable[Tensor]) -> Leaves:
        """The leaves without these tensors."""
        ids = {id(x) for x in tensors}
        private = [[leaf for leaf in leaves if id(leaf) not in ids] for leaves in self.private]
        return self._replace(private=private, common=[leaf for leaf in self.common if id(leaf) not in ids])


def leaves_of(losses: Sequence[Tensor | None], cut: list[Tensor], joints: bool = True) -> Leaves:
    """The leaves that losses reach along paths that do not lead through the tensors of `cut`.

    Each graph node is visited at most twice: when the first loss finds it, and when a second loss shows it is common.

    Args:
        losses: T of them, None for a task that is absent.
        cut: where paths end.
        joints: whether paths lead straight through joints; otherwise joints are nodes like any other.
    """
    closed = {edge_of(x) for x in cut}
    owner: dict[Any, int] = {}
    passed: dict[Edge, int] = {}  # the owners of joints' outputs
    leaves: dict[Any, Tensor] = {}
    entries: dict[Any, dict[tuple[int, int], set[int]]] = {}  # leaf -> (dimension, index) -> the losses that read it
    whole: set[Any] = set()  # leaves that are also read as a whole

    overlap = straight = False
    for t, loss in enumerate(losses):
        if loss is None:
            continue
        stack = [(edge, "") for edge in (edge_of(loss),) if edge not in closed]  # also where the loss is a parameter
        while stack:
            edge, reader = stack.pop()
            node, output = edge
            kind = type(node).__name__
            if kind not in _SPECIAL:  # the common case, kept fast: this runs in every step
                known = owner.get(node)
                if known is None:
                    owner[node] = t
                elif known != t and known != SEVERAL:
                    owner[node], overlap = SEVERAL, True
                else:
                    continue
                for following in node.next_functions:
                    if following[0] is not None and following not in closed:
                        stack.append((following, kind))
                continue
            if joints and kind in _PARTS and node.next_functions[0] not in closed:
                one = _one_of_stack(node, output, begins=not reader)
                if one is not None:
                    straight = True
                    if one[0] is not None and one not in closed:
                        stack.append((one, reader))
                    continue
            joint = joints and kind in _JOINTS
            known = passed.get(edge) if joint else owner.get(node)
            if kind == _LEAF:
                if reader not in _PARTS:
                    whole.add(node)
            elif kind in _PARTS and is_leaf(source := node.next_functions[0][0]):
                entries.setdefault(source, {}).setdefault(_entry(node, output, kind), set()).add(t)
            if known in (t, SEVERAL):
                continue
            now = t if known is None else SEVERAL
            if joint:
                passed[edge] = now
            else:
                owner[node] = now
            if kind == _LEAF:
                leaves[node] = node.variable
                continue
            overlap |= known is not None or joint
            edges = _following(node, output) if joint else node.next_functions
            stack.extend((e, kind) for e in edges if e[0] is not None and e not in closed)
    private: list[list[Tensor]] = [[] for _ in losses]
    common: list[Tensor] = []
    for node, variable in leaves.items():
        (common if owner[node] == SEVERAL else private[owner[node]]).append(variable)
    parted = frozenset(
        id(leaves[node])
        for node, readers in entries.items()
        if node in leaves and node not in whole and _is_parted(readers)
    )
    joined = straight or bool(passed)
    # A pass sends zeros through the whole stack, which it frees.
    return Leaves(private, common, overlap or straight, owner, parted, _behind(passed, owner), joined)


def is_leaf(node: Any) -> bool:
    """Whether a node accumulates the gradient of a leaf, its `variable`."""
    return type(node).__name__ == _LEAF


def _one_of_stack(node: Any, output: int, begins: bool) -> Edge | None:
    """If a node takes a loss out of a stack [T] of losses, that loss as it was before; else None.

    `begins`: whether the node's output is itself a loss. The shape behind any other `unbind` is not known.
    """
    source = node.next_functions[0][0]
    if type(source).__name__ != "StackBackward0" or node._saved_dim or source._saved_dim:
        return None
    edges: Sequence[Edge] = source.next_functions
    if type(node).__name__ == "UnbindBackward0":
        return edges[output] if begins else None
    return edges[_unsigned(node._saved_index, len(edges))] if len(node._saved_self_sym_sizes) == 1 else None


def _entry(node: Any, output: int, kind: str) -> tuple[int, int]:
    """Dimension and index of the entry that is taken out, neither of them negative."""
    if kind == "UnbindBackward0":
        return _unsigned(node._saved_dim, len(node.next_functions[0][0].variable.shape)), output
    sizes = node._saved_self_sym_sizes
    dim = _unsigned(node._saved_dim, len(sizes))
    return dim, _unsigned(node._saved_index, int(sizes[dim]))


def _unsigned(i: int, n: int) -> int:
    """A saved index into n, counted from the front."""
    i = signed(i)
    return i + n if i < 0 else i


def signed(saved: int) -> int:
    """An integer that a node saved: autograd shows negative ones as unsigned, 2^64 too large."""
    return saved - 2**64 if saved >= 2**63 else saved


def _is_parted(readers: Mapping[tuple[int, int], set[int]]) -> bool:
    return len({dim for dim, _ in readers}) == 1 and all(len(who) == 1 for who in readers.values())


def _behind(passed: Iterable[Edge], owner: Mapping[Any, int]) -> list[Tensor]:
    """The leaves without an owner behind the outputs of these joints."""
    found: list[Tensor] = []
    stack = [node for node, _ in passed]
    seen: set[Any] = set(owner)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_leaf(node):
            found.append(node.variable)
        stack.extend(following for following, _ in node.next_functions if following is not None)
    return found


def _following(node: Any, output: int) -> Sequence[Edge]:
    """Where the gradient of an output goes next."""
    following: Sequence[Edge] = node.next_functions
    if type(node).__name__ in _JOINTS and output < len(following):
        return following[output : output + 1]
    return following


def behind_joints(edge: Edge) -> Edge:
    """Where an edge leads, past joints."""
    while type(edge[0]).__name__ in _JOINTS and edge[1] < len(edge[0].next_functions):
        edge = edge[0].next_functions[edge[1]]
    return edge


class Trunk(NamedTuple):
    """What lies behind tensors.

    Attributes:
        leaves: the leaves there (themselves, where they are leaves).
        nodes: the nodes there, starting with the tensors' own.
        nested: the edges of those tensors that lie behind another one.
    """

    leaves: list[Tensor]
    nodes: set[Any]
    nested: set[Edge]


def trunk_of(edges: Iterable[Edge]) -> Trunk:
    """What lies behind tensors, given their edges."""
    inside = set(edges)
    leaves: list[Tensor] = []
    nested: set[Edge] = set()
    seen: set[Edge] = set()
    nodes: set[Any] = set()
    stack = list(inside)
    while stack:
        edge = stack.pop()
        node, output = edge
        joint = type(node).__name__ in _JOINTS
        if (edge in seen) if joint else (node in nodes):
            continue
        seen.add(edge)
        nodes.add(node)
        for following in _following(node, output):
            if following in inside:
                nested.add(following)
            if following[0] is not None:
                stack.append(following)
        if is_leaf(node):
            leaves.append(node.variable)
    return Trunk(leaves, nodes, nested)


def reached_by(
    roots: Iterable[Tensor], ends: Mapping[Edge, int], trunk: set[Any], stop: frozenset[str] = frozenset()
) -> tuple[set[int], bool]:
    """Where paths from tensors lead.

    Args:
        roots: the tensors.
        ends: edges where paths end, each with a number.
        trunk: nodes where paths end too.
        stop: names of node types where paths end without counting.

    Returns:
        The numbers of the ends reached, and whether a path leads into the trunk and not just to one of its leaves.
    """
    numbers: set[int] = set()
    around = False
    seen: set[Edge] = set()
    stack = [edge_of(x) for x in roots if x.requires_grad]
    while stack:
        edge = stack.pop()
        node, output = edge
        key = edge if type(node).__name__ in _JOINTS else (node, 0)
        if edge in ends:
            numbers.add(ends[edge])
        elif node in trunk:
            around |= computes(node)
        elif key not in seen and type(node).__name__ not in stop:
            seen.add(key)
            stack.extend(following for following in _following(node, output) if following[0] is not None)
    return numbers, around


def computes(node: Any) -> bool:
    """Whether this is neither a leaf nor a function of a single leaf: casts of tied weights are not activations."""
    while len(following := node.next_functions) == 1 and following[0][0] is not None:
        node = following[0][0]
    return not is_leaf(node)


def edge_of(x: Tensor) -> Edge:
    """A tensor's edge; that of a leaf is its AccumulateGrad node."""
    if torch.is_inference_mode_enabled():  # there the view by which torch finds a leaf's has no history
        with torch.inference_mode(False):
            edge = get_gradient_edge(x)
    else:
        edge = get_gradient_edge(x)
    return edge.node, edge.output_nr


@contextmanager
def nothing_behind(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within this context, no gradient passes beyond these tensors."""
    outputs: dict[Any, set[int]] = {}
    for x in tensors:
        node, output = edge_of(x)
        outputs.setdefault(node, set()).add(output)

    def close(node: Any) -> Any:
        stopped = outputs[node]
        return node.register_prehook(lambda grads: tuple(None if i in stopped else g for i, g in enumerate(grads)))

    handles = [close(node) for node in outputs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def vjp(
    outputs: Sequence[Any],
    cotangents: Sequence[Tensor | None],
    inputs: Sequence[Any],
    *,
    retain_graph: bool = False,
    batched: bool = False,
) -> Row:
    """One backward pass: the inputs' gradients for cotangents at outputs, None for an input without one.

    Args:
        outputs: where the pass begins: tensors or `GradientEdge`s.
        cotangents: one for each output, None for an output that contributes nothing.
        inputs: where the pass ends: tensors or `GradientEdge`s.
        retain_graph: keep the graph for another pass.
        batched: cotangents have a leading dimension, over which the pass is vectorised; so have the results.
    """
    used = [k for k, g in enumerate(cotangents) if g is not None]
    if not used or not inputs:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(
            [outputs[k] for k in used],
            inputs,
            [cotangents[k] for k in used],
            retain_graph=retain_graph,
            allow_unused=True,
            is_grads_batched=batched,  # `torch.func.vmap` around this call gets `cdist` and others wrong
        )
    )
