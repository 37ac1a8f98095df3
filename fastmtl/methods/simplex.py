"""Weights on the simplex, for methods that move them a little in every step."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["put_back", "shares_of", "to_simplex"]


def to_simplex(x: Tensor, there: Tensor) -> Tensor:
    """The point nearest to x [..., T] with w >= 0 and Σ w = 1, of those that are 0 where `there` [..., T] is false."""
    descending = torch.where(there, x, -torch.inf).sort(-1, descending=True).values
    beyond = descending.cumsum(-1) - 1
    counts = torch.arange(1, x.shape[-1] + 1, device=x.device)
    kept = (descending * counts > beyond).sum(-1, keepdim=True).clamp_min(1)
    shift = beyond.gather(-1, kept - 1) / kept
    return torch.where(there, (x - shift).clamp_min(0), 0.0)


def shares_of(w: Tensor, there: Tensor) -> Tensor:
    """Remembered weights w [..., T] of the tasks that are there, as shares of one; equal ones where all are 0."""
    some = torch.where(there, w, 0.0)
    total = some.sum(-1, keepdim=True)
    equal = there.to(w.dtype) / there.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(total > 0, some / total, equal)


def put_back(w: Tensor, shares: Tensor, there: Tensor, when: Tensor) -> None:
    """Keeps new shares in w, where `when` [...] is true: absent tasks keep theirs, and the others their sum."""
    total = torch.where(there, w, 0.0).sum(-1, keepdim=True)
    w.copy_(torch.where(when[..., None] & there, shares * total, w))
