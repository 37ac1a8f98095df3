"""Convolutions in any number of dimensions, with groups, strides, dilation and zero padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmtl.gramian.forms.use import Use
from fastmtl.gramian.saved import Saved

__all__ = ["BIAS", "WEIGHT", "weight"]

_READ = ("input", "weight", "bias_sym_sizes_opt", "stride", "padding", "dilation", "groups", "output_padding")
# The padding of the output is for transposed ones, and nothing but their weight's gradient depends on what they are.
WEIGHT = Saved(*_READ, transposed=False)
BIAS = Saved(*_READ, "transposed")


def weight(node: Any, flipped: bool) -> Use | None:
    """The weight of a convolution that is not transposed."""
    dims = len(node._input_metadata[0].shape) - 2
    stated = (node._saved_stride, node._saved_padding, node._saved_dilation)
    if flipped or any(len(each) != dims for each in stated):  # one number may stand for all dimensions
        return None
    return _Convolution(node)


class _Convolution(Use):
    """A matrix product of the weight with the windows of the padded input: I = C/g times the size of the kernel."""

    _x: Tensor
    _weight: Tensor

    def __init__(self, node: Any) -> None:
        self._batch, channels, *self._out = node._input_metadata[0].shape
        self._groups = node._saved_groups
        weight, output = node.next_functions[1]
        _, depth, *self._kernel = weight._input_metadata[output].shape
        super().__init__(
            node,
            groups=self._groups,
            rows=self._batch * math.prod(self._out),
            width=channels // self._groups,
            depth=depth * math.prod(self._kernel),
            side=0,
            lead=self._batch,
        )

    def hold(self) -> bool:
        self._x, self._weight = self.node._saved_input, self.node._saved_weight
        return self._reads(self._x) and self._reads(self._weight)

    def factor(self, dtype: torch.dtype) -> Tensor:
        x = self._x
        around = [p for p in reversed(self.node._saved_padding) for _ in range(2)]
        x = F.pad(x, around) if any(around) else x
        batch, channels, *_ = x.shape
        own, *steps = x.stride()[1:]
        strides = [s * step for s, step in zip(self.node._saved_stride, steps, strict=True)]
        dilated = [d * step for d, step in zip(self.node._saved_dilation, steps, strict=True)]
        per_group = channels // self._groups
        windows = x.as_strided(
            (self._groups, batch, *self._out, per_group, *self._kernel),
            (per_group * own, x.stride(0), *strides, own, *dilated),
        )
        return windows.to(dtype).reshape(self._groups, self.rows, self.depth)

    def cotangents(self, arrived: Tensor) -> Tensor:
        by_group = arrived.reshape(len(arrived), self._batch, self._groups, self.width, math.prod(self._out))
        return by_group.permute(0, 2, 1, 4, 3).reshape(len(arrived), self._groups, self.rows, self.width)

    def gradient(self, cotangent: Tensor) -> Tensor:
        node = self.node
        backward: Callable[..., tuple[Tensor, ...]] = torch.ops.aten.convolution_backward
        return backward(
            cotangent,
            self._x,
            self._weight,
            None,
            node._saved_stride,
            node._saved_padding,
            node._saved_dilation,
            False,
            node._saved_output_padding,
            self._groups,
            (False, True, False),
        )[1]
