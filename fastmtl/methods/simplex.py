"""Weights on the simplex, for methods that move them a little in every step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmtl.inputs import has_numbers

__all__ = ["Shares", "to_simplex"]

_FEW = 256  # up to this many numbers, sorting in Python is faster than a handful of small tensors


def to_simplex(x: Tensor) -> Tensor:
    """The point nearest to x [..., T] with w >= 0 and Σ w = 1; 0 where x is -∞. Overwrites x."""
    if x.ndim == 1 and len(x) <= _FEW and has_numbers(x):
        return x.sub_(_excess(x.tolist())).clamp_min_(0)
    sums = x.sort(-1, descending=True).values.cumsum(-1)
    # (Σ_{i <= k} x_i - 1) / k is largest if k counts the entries that stay positive.
    counts = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    return x.sub_(((sums - 1) / counts).amax(-1, keepdim=True)).clamp_min_(0)


def _excess(x: list[float]) -> float:
    """The same largest quotient, which rises with k and then falls."""
    total, excess = -1.0, -math.inf
    for k, largest in enumerate(sorted(x, reverse=True), 1):
        total += largest
        if total < excess * k:
            break
        excess = total / k
    return excess


class Shares:
    """Remembered weights, rescaled so that those of the present tasks sum to one; absent tasks keep theirs.

    Args:
        w: the weights [..., T], whose sum is one.
        there: which tasks are present, bool [..., T]; None for all.
    """

    def __init__(self, w: Tensor, there: Tensor | None) -> None:
        # On a CPU, checking that no task is absent costs no wait.
        if there is not None and has_numbers(there) and bool(there.all()):
            there = None
        self.w, self.there, self.now = w, there, w
        if there is not None:
            some = torch.where(there, w, 0.0)
            self.total = some.sum(-1, keepdim=True)
            equal = there.to(w.dtype) / there.sum(-1, keepdim=True).clamp_min(1)
            self.now = torch.where(self.total > 0, some / self.total, equal)

    def keep_out(self, slope: Tensor) -> Tensor:
        """`slope` [..., T], changed in place so that no step moves weight to an absent task."""
        return slope if self.there is None else slope.masked_fill_(~self.there, torch.inf)

    def put_back(self, shares: Tensor, when: Tensor | None = None) -> Tensor:
        """Stores new shares and returns them, 0 for absent tasks; all are NaN where `when` [...] is false.

        By default `when` is false where a share is not finite.
        """
        if when is None and self.there is None and shares.ndim == 1 and has_numbers(shares):
            if not math.isfinite(sum(shares.tolist())):
                return torch.full_like(shares, torch.nan)
            self.w.copy_(shares)
            return shares
        if self.there is not None:
            shares = torch.where(self.there, shares, 0.0)
        when = shares.isfinite().all(-1, keepdim=True) if when is None else when[..., None]
        if self.there is None:
            self.w.copy_(torch.where(when, shares, self.w))
        else:
            self.w.copy_(torch.where(when & self.there, shares * self.total, self.w))
        return torch.where(when, shares, torch.nan)
