"""Trimmed mean: Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates (Yin et al., ICML 2018)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.info import Info
from fastmtl.inputs import has_numbers
from fastmtl.methods.base import Method
from fastmtl.methods.memory import Pieces
from fastmtl.options import integer, option
from fastmtl.rule import Context

__all__ = ["TrimmedMean"]

_FEW = 4096  # up to this many columns, torch's sort is faster than a network of minima and maxima


class TrimmedMean(Method):
    """The mean of each coordinate without its largest and smallest entries; some gradients may be adversarial.

    In every coordinate the `trim` largest and the `trim` smallest of the T entries are left out, and the others are
    averaged. It works on the gradients, not on their Gram matrix, so `info` is empty.

    Absent tasks (zero gradients) have no entries; for a present task, missing gradients are zeros. If so many tasks are
    absent that no entry would be left, fewer are trimmed, so that one or two remain.

    Source: Yin, Chen, Ramchandran, Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical
    Rates", ICML 2018, Definition 2.

    Args:
        trim: how many entries are left out at either end; T has to be at least 2 `trim` + 1. 0 is the mean.

    Raises:
        TypeError: `trim` is not an integer.
        ValueError: `trim` is negative; (in a step) too few tasks.
    """

    trim: int = option(integer(0))

    def __init__(self, *, trim: int = 1) -> None:
        super().__init__()
        self.trim = trim

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"trim={self.trim}"

    def check_tasks(self, T: int) -> None:
        if 2 * self.trim + 1 > T:
            raise ValueError(f"{self!r}: expected at least {2 * self.trim + 1} tasks, got {T}")

    def aggregate_matrix(self, G: Tensor, out: Tensor, context: Context) -> None:
        self._aggregate(Pieces(G, G.shape[-2], out))

    def aggregate_list(
        self, grads: Sequence[Tensor | None], T: int, dtype: torch.dtype, out: list[Tensor], context: Context
    ) -> Info:
        self._aggregate(Pieces(grads, T, out))
        return Info.of()

    def _there(self, G: Pieces) -> Tensor:
        """Which tasks are present, bool [..., T]."""
        there = G.out[0].new_zeros((*G.batch, G.T), dtype=torch.bool)
        for t, _, _, g in G:
            if g is not None:
                there[..., t] |= g.any(-1)
        return there

    def _aggregate(self, G: Pieces) -> None:
        there = self._there(G)
        if isinstance(G.grads, Tensor) and G.P <= _FEW and has_numbers(there) and bool(there.all()):
            ordered = G.grads.to(G.kept).sort(-2).values
            mean = ordered[..., self.trim : G.T - self.trim, :].mean(-2, dtype=torch.float64)
            ends = ordered[..., :: max(G.T - 1, 1), :]  # includes any entry that is not finite
            broken = (ends - ends).sum((-2, -1))
            G.write(mean if math.isfinite(broken.sum().item()) else mean + broken[..., None])
            return
        n = there.sum(-1)
        trim = torch.minimum(torch.full_like(n, self.trim), (n - 1).clamp_min(0) // 2)
        place = torch.arange(G.T, device=n.device)
        # Averages these positions of the sorted entries; entries of absent tasks come last.
        kept = (place >= trim[..., None]) & (place < (n - trim)[..., None])
        share = 1.0 / (n - 2 * trim).clamp_min(1).to(torch.float64)
        broken = torch.zeros(G.batch, dtype=torch.float64, device=n.device)
        flat = torch.empty((*G.batch, G.P), dtype=G.kept, device=n.device)
        for k, (begin, end) in enumerate(G.spans):
            rows = [g for *_, g in G.piece(k)]
            for start, stop in G.blocks(begin, end):
                here = slice(start - begin, stop - begin)
                part = [flat.new_zeros(1) if g is None else g[..., here].to(flat.dtype) for g in rows]
                for g in part:
                    broken += (g - g).sum(-1)  # NaN where one is not finite
                part = [torch.where(there[..., t, None], g, torch.inf) for t, g in enumerate(part)]
                part = [g.expand((*G.batch, stop - start)) for g in part]
                _sort(part)
                total = torch.zeros((*G.batch, stop - start), dtype=torch.float64, device=n.device)
                for t, g in enumerate(part):
                    total += torch.where(kept[..., t, None], g, 0.0)
                flat[..., start:stop] = total * share[..., None]
        G.write(flat + broken[..., None].to(flat.dtype))


def _sort(rows: list[Tensor]) -> None:
    """Sorts the entries of T rows coordinate by coordinate: Batcher's network of minima and maxima."""
    T, p = len(rows), 1
    while p < T:
        k = p
        while k:
            for j in range(k % p, T - k, 2 * k):
                for i in range(j, min(j + k, T - k)):
                    if i // (2 * p) == (i + k) // (2 * p):
                        a, b = rows[i], rows[i + k]
                        rows[i], rows[i + k] = torch.minimum(a, b), torch.maximum(a, b)
            k //= 2
        p *= 2
