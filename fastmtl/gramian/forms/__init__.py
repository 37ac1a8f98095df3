"""Closed forms: how an operation's use of a parameter makes the parameter's gradient an outer product.

A form declares what it knows of the operation (`Saved`). Anything else that the operation does, or that another version
of torch saves, makes the use an explicit one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastmtl.gramian.forms import convolution, embedding, product
from fastmtl.gramian.forms.entrywise import ENTRYWISE, Entrywise
from fastmtl.gramian.forms.use import Use
from fastmtl.gramian.saved import Saved
from fastmtl.gramian.survey import Consumer
from fastmtl.inputs import DTYPES

__all__ = ["BIASES", "ENTRYWISE", "FORMS", "SMALL", "Bias", "Entrywise", "Form", "Use", "is_bias", "is_small", "use_of"]


class Form(NamedTuple):
    """The closed form of one operand.

    Attributes:
        make: the use, from the node and whether the operand is the parameter's transpose; None if there is none.
        saved: what it knows of the node.
    """

    make: Callable[[Any, bool], Use | None]
    saved: Saved


class Bias(NamedTuple):
    """An operand that is added to every row.

    Attributes:
        weight: the operand that is the weight of the same operation.
        saved: what is known of the node, for the gradient to be the sum of the cotangents.
    """

    weight: int
    saved: Saved


# By operation and operand.
FORMS = {
    ("MmBackward0", 0): Form(product.left, product.MM),
    ("MmBackward0", 1): Form(product.right, product.MM),
    ("AddmmBackward0", 1): Form(product.left_of_sum, product.ADDMM),
    ("AddmmBackward0", 2): Form(product.right_of_sum, product.ADDMM),
    ("BmmBackward0", 0): Form(product.left, product.BMM),
    ("BmmBackward0", 1): Form(product.right, product.BMM),
    ("ConvolutionBackward0", 1): Form(convolution.weight, convolution.WEIGHT),
    ("EmbeddingBackward0", 0): Form(embedding.table, embedding.TABLE),
    ("EmbeddingBagBackward0", 0): Form(embedding.bag, embedding.BAG),
}
BIASES = {
    ("AddmmBackward0", 0): Bias(2, product.BIAS),
    ("ConvolutionBackward0", 2): Bias(1, convolution.BIAS),
}
# Operations for whose parameters, one number a channel, T explicit gradients are the cheapest form.
SMALL = frozenset({name for name, _ in ENTRYWISE} | {"CudnnBatchNormBackward0", "FusedRmsNormBackward0"})


def use_of(consumer: Consumer, device: torch.device) -> Use | None:
    """The closed form of this use of a parameter on this device, None if there is none."""
    node = consumer.node
    form = FORMS.get((node.name(), consumer.operand))
    if form is None or not form.saved.covers(node):
        return None
    result = node._input_metadata[0]
    if result.is_nested_tensor or result.dtype not in DTYPES or result.device != device:
        return None
    use = form.make(node, consumer.flipped)
    if use is not None:
        use.order, use.views = consumer.order, consumer.views
    return use


def is_bias(consumer: Consumer, weight: Consumer | None = None) -> bool:
    """Whether the parameter is the bias of this operation, whose weight is read here, if one is given."""
    bias = BIASES.get((consumer.node.name(), consumer.operand))
    if bias is None or not bias.saved.covers(consumer.node):
        return False
    return weight is None or (weight.node is consumer.node and weight.operand == bias.weight)


def is_small(consumer: Consumer) -> bool:
    """Whether explicit gradients are the best form for this use."""
    name = consumer.node.name()
    return (name in SMALL and (name, consumer.operand) not in FORMS) or (name, consumer.operand) in BIASES
