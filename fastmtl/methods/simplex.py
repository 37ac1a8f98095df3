"""Weights on the simplex, for methods that move them a little in every step."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.inputs import has_numbers

__all__ = ["Shares", "to_simplex"]


def to_simplex(x: Tensor) -> Tensor:
    """The point nearest to x [..., T] with w >= 0 and Σ w = 1; 0 where x is -∞."""
    sums = x.sort(-1, descending=True).values.cumsum(-1)
    # (Σ_{i <= k} x_i - 1) / k is largest for the k that are not cut off.
    counts = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    return x.sub_(((sums - 1) / counts).amax(-1, keepdim=True)).clamp_min_(0)


class Shares:
    """Remembered weights, as shares of one of the tasks that are there; absent ones keep what they have.

    Args:
        w: the weights [..., T], whose sum is one.
        there: which tasks are there, bool [..., T].
    """

    def __init__(self, w: Tensor, there: Tensor) -> None:
        self.w, self.there = w, there
        # On a CPU one can see, without waiting, that nobody is absent.
        self.all = has_numbers(there) and bool(there.all())
        if not self.all:
            some = torch.where(there, w, 0.0)
            self.total = some.sum(-1, keepdim=True)
            equal = there.to(w.dtype) / there.sum(-1, keepdim=True).clamp_min(1)
            self.now = torch.where(self.total > 0, some / self.total, equal)
        else:
            self.now = w

    def keep_out(self, slope: Tensor) -> Tensor:
        """`slope` [..., T], along which no step leads to an absent task; overwritten."""
        return slope if self.all else slope.masked_fill_(~self.there, torch.inf)

    def put_back(self, shares: Tensor, when: Tensor) -> Tensor:
        """Keeps new shares where `when` [...] is true, and returns them: 0 for absent tasks, NaN elsewhere."""
        when = when[..., None]
        if self.all:
            self.w.copy_(torch.where(when, shares, self.w))
        else:
            shares = torch.where(self.there, shares, 0.0)
            self.w.copy_(torch.where(when & self.there, shares * self.total, self.w))
        return torch.where(when, shares, torch.nan)
