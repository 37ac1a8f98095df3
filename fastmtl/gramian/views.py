"""How a parameter reaches the operation that reads it: transposed, viewed, copied, cast."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.gramian.saved import Saved
from fastmtl.graph import Edge, signed

__all__ = ["KINDS", "View"]


class _Kind(NamedTuple):
    """An operation that passes on every entry of its input, once.

    Attributes:
        saved: what of the node is known.
        apply: what it does to a tensor without data.
        named: attributes that distinguish two of them.
    """

    saved: Saved
    apply: Callable[[Tensor, Any], Tensor]
    named: tuple[str, ...] = ()


def _as_it_is(x: Tensor, _: Any) -> Tensor:
    return x


def _in_shape(x: Tensor, node: Any) -> Tensor:
    return x.view(node._input_metadata[0].shape)


def _transposed(x: Tensor, node: Any) -> Tensor:
    return x.transpose(signed(node._saved_dim0), signed(node._saved_dim1))


def _permuted(x: Tensor, node: Any) -> Tensor:
    return x.permute([signed(dim) for dim in node._saved_dims])


_SHAPED = Saved("self_sym_sizes")
KINDS = {
    "TBackward0": _Kind(Saved(), lambda x, _: x.t()),
    "TransposeBackward0": _Kind(Saved("dim0", "dim1"), _transposed, ("dim0", "dim1")),
    "PermuteBackward0": _Kind(Saved("dims"), _permuted, ("dims",)),
    "ToCopyBackward0": _Kind(Saved(), _as_it_is),
    "CloneBackward0": _Kind(Saved(), _as_it_is),
    "AliasBackward0": _Kind(Saved(), _as_it_is),
    "ViewBackward0": _Kind(_SHAPED, _in_shape),
    "UnsafeViewBackward0": _Kind(_SHAPED, _in_shape),
    "ReshapeAliasBackward0": _Kind(_SHAPED, _in_shape),
    "UnsqueezeBackward0": _Kind(Saved("dim"), _in_shape),
    "SqueezeBackward0": _Kind(_SHAPED, _in_shape),
    "SqueezeBackward1": _Kind(Saved("dim", "self_sym_sizes"), _in_shape),
    "SqueezeBackward2": _Kind(Saved("dim", "self_sym_sizes"), _in_shape),
}


class View(NamedTuple):
    """A parameter, or a block of one, in the order in which it is passed on.

    Attributes:
        start: the output of a node that is the parameter, or the block.
        nodes: the operations that pass it on, the last one first.
    """

    start: Edge
    nodes: tuple[Any, ...] = ()

    def through(self, node: Any) -> View | None:
        """The view behind one more operation; None if that does more than pass it on."""
        kind = KINDS.get(node.name())
        if kind is None or not kind.saved.covers(node) or node._input_metadata[0].is_nested_tensor:
            return None
        return View(self.start, (node, *self.nodes))

    def order(self) -> tuple[bool, Hashable]:
        """Whether it is read as its transpose, and what identifies its order: None for its own and the transpose's."""
        if not self.nodes:
            return False, None
        node, output = self.start
        if node._input_metadata[output].is_nested_tensor:
            return False, _key(self.nodes)
        shape = torch.Size(node._input_metadata[output].shape)
        if len(self.nodes) == 1 and len(shape) == 2 and self.nodes[0].name() == "TBackward0":
            return True, None
        like = torch.empty(shape, device="meta")
        try:
            for step in reversed(self.nodes):
                like = KINDS[step.name()].apply(like, step)
        except RuntimeError:  # not a view: copied in another order
            return False, _key(self.nodes)
        straight = like.is_contiguous()
        if like.ndim > 1 and like.mT.is_contiguous() and (not straight or like.shape == shape[::-1]):
            return True, None
        return False, None if straight else _key(self.nodes)


def _key(nodes: tuple[Any, ...]) -> Hashable:
    return tuple(_said(node) for node in nodes)


def _said(node: Any) -> Hashable:
    kind = KINDS[node.name()]
    named = (getattr(node, f"_saved_{name}") for name in kind.named)
    values = (tuple(x) if isinstance(x, (list, tuple)) else x for x in named)
    return node.name(), tuple(node._input_metadata[0].shape), *values
