"""Hooks of a graph that this engine would bypass, or call with values other than those of T backward passes.

A closed form replaces the backward of an operation, and of the views and casts between it and the parameter: hooks
there may change the gradient. A pass of all cotangents at once shows hooks a batch that they cannot keep.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import is_not
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode

from fastmtl.gramian.survey import Survey
from fastmtl.graph import Edge

__all__ = ["has_hooks", "is_hooked", "seen_by_hooks"]


class _Watch(TorchDispatchMode):
    """Records whether any operation on tensors runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.active = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.active = True
        return function(*args, **(kwargs or {}))


def seen_by_hooks(edges: Iterable[Edge], *, first: bool = False) -> list[Edge]:
    """Those of the edges, or the first, whose gradient hooks of tensors would see, `retain_grad` included.

    Such hooks are listed nowhere. So a pass for each edge, which ends where it begins, brings zeros to it: nothing but
    hooks runs. One pass for all of them comes first, which is usually enough.
    """
    found: list[Edge] = []
    probes = [(edge, _zeros(edge)) for edge in dict.fromkeys(edges)]
    known = [(edge, zeros) for edge, zeros in probes if zeros is not None]
    with _Watch() as watch:
        if len(known) > 1 and len(known) == len(probes) and not _are_seen(known, watch):
            return found
        for edge, zeros in probes:
            if zeros is None or _are_seen([(edge, zeros)], watch):
                found.append(edge)
                if first:
                    break
    return found


def _zeros(edge: Edge) -> Tensor | None:
    """A gradient of zeros that takes no memory; None for a nested tensor."""
    like = edge[0]._input_metadata[edge[1]]
    return None if like.is_nested_tensor else torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)


def _are_seen(probes: Sequence[tuple[Edge, Tensor]], watch: _Watch) -> bool:
    """Whether hooks see what arrives at one of these edges; true, too, if one of several lies behind another."""
    ways = tuple(GradientEdge(*edge) for edge, _ in probes)
    zeros = tuple(zeros for _, zeros in probes)
    watch.active = False
    owners = [getrefcount(x) for x in zeros]
    try:
        # What `torch.autograd.grad` calls after checking its arguments, which takes longer than this pass.
        arrived = _engine_run_backward(ways, zeros, True, False, ways, allow_unreachable=True, accumulate_grad=False)
    except Exception:  # from a hook that does not take zeros
        return True
    replaced = any(map(is_not, arrived, zeros))
    del arrived
    return replaced or watch.active or [getrefcount(x) for x in zeros] != owners


def is_hooked(graph: Survey) -> bool:
    """Whether anything in the shared part of a graph has hooks; those of one tensor may be called, with zeros."""
    read = [(node, output) for node in graph.nodes for _, _, output in graph.users.get(node, ())]
    edges = dict.fromkeys([*graph.frontier, *read])
    return any(map(has_hooks, graph.nodes)) or bool(seen_by_hooks(edges, first=True))


def has_hooks(node: Any) -> bool:
    """Whether the node itself has hooks, as opposed to hooks of its output tensor."""
    handles = [node.register_hook(_nothing), node.register_prehook(_nothing)]
    found = any(len(handle.hooks_dict_ref()) > 1 for handle in handles)
    for handle in handles:
        handle.remove()
    return found


def _nothing(*_: Any) -> None:
    pass
