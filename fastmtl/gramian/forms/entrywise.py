"""Parameters that are broadcast, added or multiplied entry by entry: biases, affine parameters of norms, scales.

The gradient is the cotangent times a factor of the same shape, summed over whatever the parameter is broadcast over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastmtl.gramian.forms import convolution, product
from fastmtl.gramian.saved import Saved, is_plain
from fastmtl.graph import Edge
from fastmtl.inputs import DTYPES

__all__ = ["ENTRYWISE", "Broadcast", "Entrywise", "Factor"]

Broadcast: TypeAlias = "tuple[torch.Size, torch.Size]"


class Made(NamedTuple):
    """A factor that is made from what the operation saved, when it is needed."""

    make: Callable[..., Tensor]
    saved: tuple[Tensor, ...]


Factor: TypeAlias = Made | Tensor | float


class Entrywise:
    """One use of such a parameter.

    Attributes:
        edge: where the cotangents arrive.
        shape: of a cotangent, as far as the parameter is concerned: as many dimensions as `spread`.
        spread: the parameter's shape as it is broadcast: 1 where it does not vary.
        operand: shape of what the operation reads.
        leading: how many dimensions of a cotangent there are up to the last one along which the parameter is constant.
        lead: the number of entries over these.
        outer: as in `Use`.
    """

    outer = 1

    def __init__(self, node: Any, operand: torch.Size, broadcast: Broadcast, factor: Callable[[Any], Factor]) -> None:
        self.edge: Edge = (node, 0)
        self.operand = operand
        self.shape, self.spread = broadcast
        k = len(self.shape)
        while k and self.spread[k - 1] > 1:
            k -= 1
        self.leading = k or len(self.shape)  # all, if it varies along all
        self.lead = math.prod(self.shape[: self.leading])
        self._factor = factor
        self._held: Factor = 1.0

    @classmethod
    def of(cls, node: Any, operand: int) -> Entrywise | None:
        """The use of an operation's operand, if it has this form: nothing complex, whose factor is conjugated."""
        known = ENTRYWISE.get((node.name(), operand))
        if known is None or not known[0].covers(node) or node._input_metadata[0].dtype not in DTYPES:
            return None
        _, spread, factor = known
        source, output = node.next_functions[operand]
        shape = torch.Size(source._input_metadata[output].shape)
        broadcast = spread(node, shape)
        return None if broadcast is None else cls(node, shape, broadcast, factor)

    @property
    def node(self) -> Any:
        """The graph node of the operation."""
        return self.edge[0]

    def hold(self) -> bool:
        """Keeps what the operation saved; False if the form does not apply."""
        held = self._held = self._factor(self.node)
        saved = held.saved if isinstance(held, Made) else (held,) if isinstance(held, Tensor) else ()
        device = self.node._input_metadata[0].device
        return all(is_plain(x, device) for x in saved)

    def products(self, arrived: Tensor) -> Tensor:
        """The entries [c, *shape] that are summed, from c cotangents as they arrived."""
        held = self._held
        if isinstance(held, Made):
            arrived = arrived * held.make(*held.saved)
        elif isinstance(held, Tensor) or held != 1:
            arrived = arrived * held
        return arrived.reshape(len(arrived), *self.shape)


# ------------------------------------------------------------------------------------------------- how it is broadcast


def _aligned(node: Any, operand: torch.Size) -> Broadcast:
    """As PyTorch broadcasts: from the right."""
    shape = torch.Size(node._input_metadata[0].shape)
    return shape, torch.Size([1] * (len(shape) - len(operand)) + list(operand))


def _channels(node: Any, operand: torch.Size) -> Broadcast:
    """Dimension 1."""
    shape = torch.Size(node._input_metadata[0].shape)
    return shape, torch.Size([1, *operand] + [1] * (len(shape) - 2))


def _repeated(node: Any, operand: torch.Size) -> Broadcast | None:
    """One after the other, all of it."""
    if any(times != 1 for times in node._saved_repeats[1:]):
        return None
    n = operand.numel()
    return torch.Size([math.prod(node._input_metadata[0].shape) // max(1, n), n]), torch.Size([1, n])


# -------------------------------------------------------------------------------------------------------- the factors


def _one(_: Any) -> Factor:
    return 1.0


def _standardised_layers(node: Any) -> Factor:
    return Made(lambda x, mean, rstd: (x - mean) * rstd, (node._saved_input, node._saved_result1, node._saved_result2))


def _standardised_groups(node: Any) -> Factor:
    def make(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        by_group = x.reshape(*mean.shape, -1)
        return ((by_group - mean[..., None]) * rstd[..., None]).reshape(x.shape)

    return Made(make, (node._saved_input, node._saved_result1, node._saved_result2))


def _standardised_batch(node: Any) -> Factor:
    eps, training = node._saved_eps, node._saved_training

    def make(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.ndim - 2))
        rstd = scale if training else (scale + eps).rsqrt()
        return (x - mean.view(shape)) * rstd.view(shape)

    if training:
        return Made(make, (node._saved_input, node._saved_result1, node._saved_result2))
    return Made(make, (node._saved_input, node._saved_running_mean, node._saved_running_var))


def _negative(x: Tensor) -> Tensor:
    return x.clamp_max(0)


def _of_divisor(node: Any) -> Factor:
    return Made(lambda x, y: -x / y.square(), (node._saved_self, node._saved_other))


_LAYER = Saved("bias", "input", "normalized_shape", "result1", "result2", "weight")
_GROUP = Saved("C", "HxW", "N", "group", "input", "result1", "result2", "weight")
_BATCH = Saved("eps", "input", "result1", "result2", "running_mean", "running_var", "training", "weight")
_ALPHA, _BOTH = Saved("alpha"), Saved("other", "self")

# By operation and operand: what is known of the node, how the operand is broadcast, the factor.
ENTRYWISE: dict[tuple[str, int], tuple[Saved, Any, Callable[[Any], Factor]]] = {
    ("AddBackward0", 0): (_ALPHA, _aligned, _one),
    ("AddBackward0", 1): (_ALPHA, _aligned, lambda node: float(node._saved_alpha)),
    ("SubBackward0", 0): (_ALPHA, _aligned, _one),
    ("SubBackward0", 1): (_ALPHA, _aligned, lambda node: -float(node._saved_alpha)),
    ("MulBackward0", 0): (_BOTH, _aligned, lambda node: node._saved_other),
    ("MulBackward0", 1): (_BOTH, _aligned, lambda node: node._saved_self),
    ("DivBackward0", 0): (_BOTH, _aligned, lambda node: Made(torch.reciprocal, (node._saved_other,))),
    ("DivBackward0", 1): (_BOTH, _aligned, _of_divisor),
    ("ExpandBackward0", 0): (Saved("self_sym_sizes"), _aligned, _one),
    ("RepeatBackward0", 0): (Saved("repeats", "self_sym_sizes"), _repeated, _one),
    ("NativeLayerNormBackward0", 1): (_LAYER, _aligned, _standardised_layers),
    ("NativeLayerNormBackward0", 2): (_LAYER, _aligned, _one),
    ("NativeGroupNormBackward0", 1): (_GROUP, _channels, _standardised_groups),
    ("NativeGroupNormBackward0", 2): (_GROUP, _channels, _one),
    ("NativeBatchNormBackward0", 1): (_BATCH, _channels, _standardised_batch),
    ("NativeBatchNormBackward0", 2): (_BATCH, _channels, _one),
    ("AddmmBackward0", 0): (product.BIAS, _aligned, _one),
    ("ConvolutionBackward0", 2): (convolution.BIAS, _channels, _one),
    ("PreluKernelBackward0", 1): (Saved("self", "weight"), _aligned, lambda node: Made(_negative, (node._saved_self,))),
}
