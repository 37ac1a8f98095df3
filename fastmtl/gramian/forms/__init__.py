"""Closed forms: how an operation's use of a parameter makes the parameter's gradient an outer product."""

from __future__ import annotations

from fastmtl.gramian.forms._use import Use
from fastmtl.gramian.forms.convolution import convolution
from fastmtl.gramian.forms.embedding import embedding
from fastmtl.gramian.forms.product import product
from fastmtl.gramian.survey import Consumer

__all__ = ["Use", "is_bias", "is_small", "use_of"]

_FORMS = {
    "AddmmBackward0": product,
    "MmBackward0": product,
    "ConvolutionBackward0": convolution,
    "EmbeddingBackward0": embedding,
}
# Where the bias is an operand of the same operation: which, and which one the weight is.
_BIASES = {"AddmmBackward0": (0, 2), "ConvolutionBackward0": (2, 1)}
# Operations whose own T gradients of a parameter, one number a channel, are the cheapest form there is.
_SMALL = frozenset(
    {
        "AddBackward0",
        "SubBackward0",
        "MulBackward0",
        "DivBackward0",
        "ExpandBackward0",
        "NativeLayerNormBackward0",
        "NativeGroupNormBackward0",
        "NativeBatchNormBackward0",
        "CudnnBatchNormBackward0",
        "FusedRmsNormBackward0",
    }
)


def use_of(consumer: Consumer) -> Use | None:
    """The closed form of this use of a parameter, None where there is none."""
    form = _FORMS.get(consumer.node.name())
    return None if form is None else form(consumer.node, consumer.operand, consumer.flipped)


def is_bias(consumer: Consumer, weight: Consumer | None = None) -> bool:
    """Whether the parameter is the bias of this operation; of the one that reads the weight so, where it is given."""
    operands = _BIASES.get(consumer.node.name())
    if operands is None or consumer.operand != operands[0]:
        return False
    return weight is None or (weight.node is consumer.node and weight.operand == operands[1])


def is_small(consumer: Consumer) -> bool:
    """Whether explicit gradients are this use's closed form."""
    return consumer.node.name() in _SMALL or is_bias(consumer)
