"""Checks of a Gram matrix, and of the weights that a user's own method returns for it, before either is used."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.inputs import check_tangent, describe, transforming

__all__ = ["check_gram", "checked_weights"]


def check_gram(M: object) -> None:
    """Accepts [T, T] and [B, T, T] with T >= 1.

    Raises:
        TypeError: not a dense float32 or float64 tensor.
        ValueError: of another shape, or it requires grad or has a forward-mode tangent.
    """
    if not isinstance(M, Tensor) or M.dtype not in (torch.float32, torch.float64) or M.layout is not torch.strided:
        raise TypeError(f"M: expected a dense float32 or float64 tensor, got {describe(M)}")
    shape = M.shape
    if not 2 <= len(shape) <= 3 or shape[-1] != shape[-2] or shape[-1] == 0:
        raise ValueError(f"M: expected shape [T, T] or [B, T, T] with T >= 1, got {describe(M)}")
    if M.requires_grad and torch.is_grad_enabled():
        raise ValueError("M: has requires_grad=True, but task weights have no derivative; pass it detached")
    if transforming():
        check_tangent(M, "M", "task weights have")


def checked_weights(method: object, alpha: object, M: Tensor) -> Tensor:
    """The weights that `weigh` returned for M, float64 and contiguous.

    Raises:
        TypeError: not a tensor of a floating dtype.
        ValueError: of another shape or device, or it requires grad.
    """
    name, shape = f"{method!r}.weigh", list(M.shape[:-1])
    expected = f"expected task weights of shape {shape} on {M.device} for M of shape {list(M.shape)}"
    eager = not torch.compiler.is_compiling()  # a traced backward cannot query layout and requires_grad
    if not isinstance(alpha, Tensor) or not alpha.is_floating_point() or (eager and alpha.layout is not torch.strided):
        raise TypeError(f"{name}: {expected}, a floating tensor, got {describe(alpha)}")
    if alpha.shape != M.shape[:-1] or alpha.device != M.device:
        raise ValueError(f"{name}: {expected}, got {describe(alpha)}")
    if eager and alpha.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: {expected}, detached: the aggregation has no derivative; got requires_grad=True")
    return alpha.detach().to(torch.float64).contiguous()
