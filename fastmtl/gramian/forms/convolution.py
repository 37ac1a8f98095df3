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

__all__ = ["BIAS", "WEIGHT", "Convolution", "weight"]

_READ = ("input", "weight", "bias_sym_sizes_opt", "stride", "padding", "dilation", "groups", "output_padding")
# The padding of the output is for transposed ones. Only their weight's gradient depends on whether they are transposed.
WEIGHT = Saved(*_READ, transposed=False)
BIAS = Saved(*_READ, "transposed")


def weight(node: Any, flipped: bool) -> Use | None:
    """The use of a convolution's weight, unless it is transposed."""
    dims = len(node._input_metadata[0].shape) - 2
    stated = (node._saved_stride, node._saved_padding, node._saved_dilation)
    if flipped or any(len(each) != dims for each in stated):  # one number may be meant for all dimensions
        return None
    return Convolution(node)


class Convolution(Use):
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
        """See `Use.hold`."""
        self._x, self._weight = self.node._saved_input, self.node._saved_weight
        return self._reads(self._x) and self._reads(self._weight)

    def factor(self, dtype: torch.dtype) -> Tensor:
        """See `Use.factor`."""
        dims = len(self._kernel)
        order = (0, 1, *range(3 + dims, 3 + 2 * dims), *range(2, 3 + dims))
        return self._parted(self._x).permute(order).to(dtype).reshape(self._groups, self.rows, self.depth)

    def windows(self, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        """The rows of A of some samples [g, n, S, I]."""
        # Along the positions, which are contiguous: runs are copied.
        parted = self._parted(self._x[start:stop]).to(dtype)
        return parted.reshape(self._groups, stop - start, self.depth, math.prod(self._out)).mT

    def _parted(self, x: Tensor) -> Tensor:
        """A view of the windows of x [g, n, C/g, *kernel, *out]."""
        around = [p for p in reversed(self.node._saved_padding) for _ in range(2)]
        x = F.pad(x, around) if any(around) else x
        batch, channels, *_ = x.shape
        own, *steps = x.stride()[1:]
        strides = [s * step for s, step in zip(self.node._saved_stride, steps, strict=True)]
        dilated = [d * step for d, step in zip(self.node._saved_dilation, steps, strict=True)]
        per_group = channels // self._groups
        return x.as_strided(
            (self._groups, batch, per_group, *self._kernel, *self._out),
            (per_group * own, x.stride(0), own, *dilated, *strides),
        )

    def sizes(self, dtype: torch.dtype) -> Tensor:
        """The largest entry of each sample's windows, or of the gaps between them: [batch]."""
        largest: Tensor = torch.linalg.vector_norm(self._x.flatten(1), math.inf, dim=1)
        return largest.to(dtype)

    def lengths(self, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
        """Norms of the rows of A [batch, positions], for one group and samples times `scale`, without making them."""
        x, node = self._x.to(dtype), self.node
        x = x if scale is None else x * scale.to(dtype).view(-1, *[1] * (x.ndim - 1))
        squares = x.square().sum(1, keepdim=True)
        shape = node._saved_stride, node._saved_padding, node._saved_dilation
        ones = squares.new_ones(1, 1, *self._kernel)
        found: Tensor = torch.convolution(squares, ones, None, *shape, False, [0] * len(self._kernel), 1)
        return found.flatten(1).clamp_min_(0).sqrt_()

    def of_samples(self, arrived: Tensor) -> Tensor:
        """The cotangents [c, batch, S, O] of one group, from c cotangents as they arrived."""
        return arrived.reshape(len(arrived), self._batch, self.width, -1).mT

    @property
    def inputs(self) -> int:
        """How many numbers the windows are made from."""
        return self._x.numel()

    def cotangents(self, arrived: Tensor) -> Tensor:
        """See `Use.cotangents`."""
        by_group = arrived.reshape(len(arrived), self._batch, self._groups, self.width, math.prod(self._out))
        return by_group.permute(0, 2, 1, 4, 3).reshape(len(arrived), self._groups, self.rows, self.width)

    def gradient(self, cotangent: Tensor) -> Tensor:
        """See `Use.gradient`."""
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
