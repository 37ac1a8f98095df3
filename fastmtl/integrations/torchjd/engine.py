"""The Gramian of the Jacobian of per-example losses, from one ordinary backward pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastmtl import ops
from fastmtl.gramian import examples
from fastmtl.inputs import DTYPES, describe

__all__ = ["Engine"]


class Engine:
    """Replaces `torchjd.autogram.Engine`.

    Unlike that, it wraps nothing and runs no second forward pass, but reads the existing graph: modules may share
    parameters, use those of others, be recurrent, work in place and be random. Every call checks that no example of a
    batch depends on another; if one does, it raises instead of returning a wrong result.

    Args:
        modules: the modules whose parameters count.
        batch_dim: the dimension of the examples in what is differentiated; None for one backward pass per entry.

    Raises:
        ValueError: no parameter requires grad.
    """

    def __init__(self, *modules: nn.Module, batch_dim: int | None) -> None:
        self._parameters = list(dict.fromkeys(p for m in modules for p in m.parameters() if p.requires_grad))
        self._batch_dim = batch_dim
        if not self._parameters:
            raise ValueError("modules: expected at least one parameter that requires grad, got none")

    def compute_gramian(self, output: Tensor, /) -> Tensor:
        """The Gramian of the Jacobian of `output`; the graph is kept.

        Args:
            output: any tensor, as a vector of m objectives.

        Returns:
            [m, m], in the dtype of `output`.

        Raises:
            TypeError: `output` is not a floating tensor.
            ValueError: it lacks the dimension or requires no grad, or an entry depends on other examples.
        """
        if not isinstance(output, Tensor) or output.dtype not in DTYPES:
            raise TypeError(f"output: expected a floating tensor, got {describe(output)}")
        if not output.requires_grad or not output.numel():
            raise ValueError(f"output: expected a tensor that requires grad, got {describe(output)}")
        if self._batch_dim is None:
            return self._by_rows(output).to(output.dtype)
        if not -output.ndim <= self._batch_dim < output.ndim:
            raise ValueError(f"output: expected a dimension {self._batch_dim} (batch_dim), got {describe(output)}")
        ordered = output.movedim(self._batch_dim, -1)
        M = examples.gram(ordered.reshape(-1, ordered.shape[-1]), self._parameters)
        place = torch.arange(math.prod(output.shape), device=output.device).view(ordered.shape)
        place = place.movedim(-1, self._batch_dim).flatten()
        return M[place[:, None], place].to(output.dtype)

    def _by_rows(self, output: Tensor) -> Tensor:
        rows = [
            torch.autograd.grad(entry, self._parameters, retain_graph=True, allow_unused=True)
            for entry in output.flatten().unbind()
        ]
        with torch.no_grad():
            return ops.gram_rows([g for row in rows for g in row], len(rows))
