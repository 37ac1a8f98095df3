"""GradDrop: Just Pick a Sign (Chen et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.info import Info
from fastmtl.weighting._method import Method

__all__ = ["GradDrop"]


class GradDrop(Method):
    """GradDrop: in every coordinate, only the gradients of one sign are summed.

    The sign is drawn at random, positive with the probability P = ½ (1 + Σ_t g_t / Σ_t |g_t|), the sign purity of that
    coordinate (Algorithm 1 of the paper, on the gradients as they are). It works on the gradients, not on their Gram
    matrix: `info` is empty.

    Args:
        generator: source of randomness, on the gradients' device; default: torch's global one.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def __repr__(self) -> str:
        return "GradDrop()"

    def _aggregate_matrix(self, G: Tensor, out: Tensor) -> None:
        self._drop(list(G.unbind(-2)), out)

    def _aggregate_list(self, grads: Sequence[Tensor | None], T: int, dtype: torch.dtype, out: list[Tensor]) -> Info:
        K = len(out)
        for k, target in enumerate(out):
            self._drop([g for g in grads[k::K] if g is not None], target)
        return Info.of()

    def _drop(self, gradients: list[Tensor], out: Tensor) -> None:
        wide = torch.promote_types(out.dtype, torch.float32)
        positive, negative = (torch.zeros(out.shape, dtype=wide, device=out.device) for _ in range(2))
        for g in gradients:
            positive += g.to(wide).clamp_min(0)
            negative -= g.to(wide).clamp_max(0)
        total = positive + negative
        drawn = torch.rand(out.shape, dtype=wide, device=out.device, generator=self.generator)
        chosen = torch.where(drawn * total < positive, positive, -negative)
        # Any non-finite gradient makes its coordinate non-finite, whichever sign was drawn.
        out.copy_(torch.where(total.isfinite(), chosen, total - total))
