"""Hooks of a graph, where this engine would pass them by or hand them something else than T backward passes do.

A closed form replaces an operation's backward, and those of the views and casts by which a parameter came to it: hooks
there may change the gradient. A pass of all cotangents at once shows hooks a batch that they cannot keep.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode

from fastmtl._graph import Edge
from fastmtl.gramian.survey import Survey

__all__ = ["has_hooks", "is_hooked", "seen_by_hooks"]


class _Watch(TorchDispatchMode):
    """Notices any operation on tensors."""

    active = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.active = True
        return function(*args, **(kwargs or {}))


def seen_by_hooks(edges: Iterable[Edge]) -> Iterator[Edge]:
    """Those of the edges whose gradient hooks of tensors would see, `retain_grad` included.

    Nobody lists such hooks. So a pass for each edge, which ends where it begins, brings zeros to it: all that runs is
    hooks, once.
    """
    zero: dict[Any, Tensor] = {}
    for edge in edges:
        like, way = edge[0]._input_metadata[edge[1]], (GradientEdge(*edge),)
        if like.is_nested_tensor:  # who knows
            yield edge
            continue
        kind = like.dtype, like.device
        if kind not in zero:
            zero[kind] = torch.zeros((), dtype=like.dtype, device=like.device)
        zeros = zero[kind].expand(like.shape)
        owners = getrefcount(zeros)
        with _Watch() as watch:
            try:
                # What `torch.autograd.grad` calls, which takes longer than this does to check what it is given.
                arrived = _engine_run_backward(
                    way, (zeros,), True, False, way, allow_unreachable=True, accumulate_grad=False
                )
            except Exception:  # a hook's, that takes no zeros
                arrived = ()
        replaced = not any(g is zeros for g in arrived)
        del arrived
        if replaced or watch.active or getrefcount(zeros) > owners:
            yield edge


def is_hooked(graph: Survey) -> bool:
    """Whether anything in the shared part of a graph has hooks; those of one tensor may be called, with zeros."""
    if any(map(has_hooks, graph.nodes)):
        return True
    read = [(node, output) for node in graph.nodes for _, _, output in graph.users.get(node, ())]
    return any(True for _ in seen_by_hooks(dict.fromkeys([*graph.frontier, *read])))


def has_hooks(node: Any) -> bool:
    """Whether the node has hooks of its own, which are not those of its output as a tensor."""
    handles = [node.register_hook(_nothing), node.register_prehook(_nothing)]
    found = any(len(handle.hooks_dict_ref()) > 1 for handle in handles)
    for handle in handles:
        handle.remove()
    return found


def _nothing(*_: Any) -> None:
    pass
