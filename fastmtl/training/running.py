"""The running backward: where it was called, what it accumulates, and what it returns."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fastmtl.graph import Edge, is_leaf, trunk_of

__all__ = ["asked_behind", "executes", "is_mean", "nested_among", "probe_like", "running_call", "takes_derivative"]

# The functions that run a backward, with their names for the tensors that it starts from.
_ROOTS = {torch.autograd.backward.__code__: "tensors", torch.autograd.grad.__code__: "outputs"}
_probes: dict[torch.device, Tensor] = {}


def probe_like(like: Tensor) -> Tensor:
    """A leaf beside h, one per device. A backward executes its node only if it accumulates gradients of all leaves."""
    probe = _probes.get(like.device)
    if probe is None:
        probe = torch.empty((), device=like.device, requires_grad=True)
        if type(probe) is Tensor:  # not a fake tensor
            _probes[like.device] = probe
    return probe


def executes(node: Any) -> bool:
    """Whether the running backward executes a node."""
    return torch._C._will_engine_execute_node(node)


def asked_behind(edges: Sequence[Edge]) -> tuple[bool, bool]:
    """Whether the running backward accumulates gradients behind edges, and whether it returns any of parameters."""
    parameters = False
    for leaf in trunk_of(edges).nodes:
        if not is_leaf(leaf):
            continue
        try:
            if executes(leaf):
                return True, parameters
        except RuntimeError:  # torch's answer for a leaf whose gradient `autograd.grad` returns
            parameters |= isinstance(leaf.variable, torch.nn.Parameter)
    return False, parameters


def running_call() -> tuple[str, list[Tensor]] | None:
    """Which of `torch.autograd.backward` and `grad` is running, and from which tensors; None if that is not clear.

    For a GPU, autograd runs in a thread of its own while the call waits in another.
    """
    here = _call_in(sys._getframe(1))
    if here is not None:
        return here
    others = [call for frame in sys._current_frames().values() if (call := _call_in(frame)) is not None]
    return others[0] if len(others) == 1 else None


def _call_in(frame: FrameType | None) -> tuple[str, list[Tensor]] | None:
    while frame is not None:
        name = _ROOTS.get(frame.f_code)
        if name is not None:
            roots = frame.f_locals[name]
            roots = roots if isinstance(roots, (list, tuple)) else [roots]
            return frame.f_code.co_name, [x for x in roots if isinstance(x, Tensor)]
        frame = frame.f_back
    return None


def takes_derivative() -> bool:
    """Whether `torch.autograd.grad` is running, as far as that can be told."""
    call = running_call()
    return call is not None and call[0] == "grad"


def is_mean(root: Tensor, tasks: int) -> bool:
    """Whether a tensor is the mean of a stack of that many others, times constants."""
    node: Any = root.grad_fn
    while node is not None:
        following = [edge[0] for edge in node.next_functions if edge[0] is not None]
        if len(following) != 1:
            return False
        if type(node).__name__ in ("MeanBackward0", "MeanBackward1"):
            inner = following[0]
            return type(inner).__name__ in ("StackBackward0", "CatBackward0") and len(inner.next_functions) == tasks
        if type(node).__name__ not in ("MulBackward0", "DivBackward0", "ToCopyBackward0", "ViewBackward0"):
            return False
        node = following[0]
    return False


def nested_among(edges: Sequence[Edge]) -> frozenset[int]:
    """Which tensors of h lie behind others of h."""
    inside = trunk_of(edges).nested
    return frozenset(k for k, edge in enumerate(edges) if edge in inside)
