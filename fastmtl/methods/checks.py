"""What a method of one's own returns, before it is used."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.inputs import describe

__all__ = ["checked_weights"]


def checked_weights(method: object, alpha: object, M: Tensor) -> Tensor:
    """What `weigh` returned for M, float64 and contiguous.

    Raises:
        TypeError: no tensor of a floating dtype.
        ValueError: of another shape or device, or one that requires grad.
    """
    name, shape = f"{method!r}.weigh", list(M.shape[:-1])
    expected = f"expected task weights of shape {shape} on {M.device} for M of shape {list(M.shape)}"
    eager = not torch.compiler.is_compiling()  # a backward that is traced may not ask for layout and requires_grad
    if not isinstance(alpha, Tensor) or not alpha.is_floating_point() or (eager and alpha.layout is not torch.strided):
        raise TypeError(f"{name}: {expected}, a floating tensor, got {describe(alpha)}")
    if alpha.shape != M.shape[:-1] or alpha.device != M.device:
        raise ValueError(f"{name}: {expected}, got {describe(alpha)}")
    if eager and alpha.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: {expected}, detached: the aggregation has no derivative; got requires_grad=True")
    return alpha.detach().to(torch.float64).contiguous()
