"""What takes less, in multiply-adds of a large product: which form, how many cotangents at once, which engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmtl.gramian.forms import Use

if TYPE_CHECKING:
    from fastmtl.gramian.plan import Plan
    from fastmtl.gramian.survey import Survey

__all__ = ["chunk_of", "is_cheaper_explicit", "prefers_full"]

_GRAM = 4.0  # one multiply-add of a float64 Gram matrix of explicit gradients, which are also written and read
_SMALL_PRODUCT = 4.0  # one of the T x T products of a row with all others
_TOGETHER = 1 << 20  # bytes of one task's cotangents up to which operations cost more to start
_MEMORY = 1 << 26  # bytes of cotangents at once


def is_cheaper_explicit(blocks: Sequence[Sequence[Use]], T: int, parameters: int) -> bool:
    """Whether T explicit gradients of a weight of so many entries take less than the closed forms of its blocks."""
    explicit = T * (T + 1) / 2 * parameters * _GRAM
    closed = 0.0
    for uses in blocks:
        for use in uses:
            explicit += T * (use.elements if use.is_indexed else use.elements * use.depth)
        for side in (0, 1):
            own = [use for use in uses if use.side == side]
            if own:
                closed += _one_side(own[0], sum(use.rows for use in own), T)
        if len({use.side for use in uses}) == 2:
            one, other = (sum(use.rows for use in uses if use.side == side) for side in (0, 1))
            widths = sum(0 if use.is_indexed else use.depth for use in uses[:2]) + uses[0].depth
            closed += one * other * T * (widths + T * _SMALL_PRODUCT)
    return explicit < closed


def _one_side(use: Use, N: int, T: int) -> float:
    if use.is_indexed:
        return T * N * use.width * (1.0 + T * _GRAM / 2)
    return use.groups * N * (N * use.depth / 2 + T * N * use.width / 2 + T * T * use.width * _SMALL_PRODUCT)


def chunk_of(cotangent_bytes: int, T: int) -> int:
    """How many tasks' cotangents go through the graph at once, given the bytes of one task's that are kept."""
    if cotangent_bytes > _TOGETHER:
        return 1
    return max(1, min(T, _MEMORY // max(1, cotangent_bytes)))


def prefers_full(todo: Plan, graph: Survey, T: int) -> bool:
    """Whether T backward passes take less than the gramian engine."""
    return False
