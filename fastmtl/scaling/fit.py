"""How time grows: exponents from log-log least squares, beside those of the operation counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Growth", "growth", "table"]

STAGES = ("gram", "weights", "combine", "fastmtl", "pure")
# Multiply-adds: T² P / 2 for half of the Gram matrix, of order T³ for its eigendecomposition, T P for the combination.
THEORY = {
    "tasks": ("T", {"gram": "2", "weights": "3", "combine": "1", "fastmtl": "1..3", "pure": "1..3"}),
    "params": ("P", {"gram": "1", "weights": "0", "combine": "1", "fastmtl": "0..1", "pure": "0..1"}),
}


class Growth(NamedTuple):
    """y ~ x^exponent over the `points` from `low` to `high`, with the exponent's standard error."""

    exponent: float
    error: float
    low: float
    high: float
    points: int

    def __str__(self) -> str:
        return f"{self.exponent:.2f} ± {self.error:.2f}"


def growth(x: Sequence[float], y: Sequence[float]) -> Growth | None:
    """The exponent by least squares on logarithms, over the upper part of the range.

    That is the part above the geometric middle of `x`, or the last three points if these are more: below, the fixed
    costs of a call hide how the work grows. None for fewer than three points.
    """
    pairs = sorted(zip(x, y, strict=True))
    if len(pairs) < 3:
        return None
    middle = math.sqrt(pairs[0][0] * pairs[-1][0])
    upper = [pair for pair in pairs if pair[0] >= middle]
    pairs = max(upper, pairs[-3:], key=len)
    u, v = ([math.log(pair[i]) for pair in pairs] for i in (0, 1))
    n, u_mean, v_mean = len(pairs), sum(u) / len(u), sum(v) / len(v)
    spread = sum((a - u_mean) ** 2 for a in u)
    slope = sum((a - u_mean) * (b - v_mean) for a, b in zip(u, v, strict=True)) / spread
    residual = sum((b - v_mean - slope * (a - u_mean)) ** 2 for a, b in zip(u, v, strict=True))
    return Growth(slope, math.sqrt(residual / (n - 2) / spread), pairs[0][0], pairs[-1][0], n)


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Growth with T at fixed P and with P at fixed T, a line per series of at least three points, theory first.

    Args:
        rows: points, as from `study.columns`.
    """
    rows = [row for row in rows if "error" not in row]
    parts = []
    for axis, (symbol, theory) in THEORY.items():
        series: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        fixed = [
            name
            for name in ("tasks", "params", "batch", "dtype", "threads", "method", "kappa", "gradients")
            if name != axis
        ]
        for row in rows:
            series.setdefault(tuple(row[name] for name in fixed), []).append(row)
        other, rest = fixed[0], fixed[1:]
        varying = [name for name in rest if len({row[name] for row in rows}) > 1]
        head = [THEORY[other][0], *varying, symbol, *STAGES]
        lines = [["theory", *("" for _ in varying), "", *(theory[stage] for stage in STAGES)]]
        for key, members in series.items():
            fits = {
                stage: growth([m[axis] for m in members], [m[f"seconds_{stage}"] for m in members])
                for stage in STAGES
                if f"seconds_{stage}" in members[0]
            }
            whole = fits["fastmtl"]
            if whole is not None:
                values = dict(zip(fixed, key, strict=True))
                settings = [f"{v:g}" if isinstance(v := values[name], float) else str(v) for name in varying]
                ends = f"{whole.low:,}..{whole.high:,}"
                lines.append([f"{values[other]:,}", *settings, ends, *(str(fits.get(s) or "") for s in STAGES)])
        if len(lines) > 1:
            parts.append(f"time ~ {symbol}^x, upper part of the range\n\n{_aligned([head, *lines])}")
    return "\n\n".join(parts)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
