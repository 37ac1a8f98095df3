"""Which points a sweep measures: ranges as users type them, and the grid that they span."""

from __future__ import annotations

import itertools
import math
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastmtl import methods
from fastmtl.methods.base import GramMethod

__all__ = ["DTYPES", "METHODS", "Grid", "Point", "names", "numbers"]

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
METHODS: dict[str, type[GramMethod]] = {
    name: getattr(methods, name) for name in methods.__all__ if issubclass(getattr(methods, name), GramMethod)
}


@dataclass(frozen=True)
class Point:
    """One measurement: gradients [batch, tasks, params] of this dtype, aggregated by `method`.

    `gradients`: "random", with condition number `kappa`; or "real", of single examples: one matrix, with whatever
    condition number it has.
    """

    tasks: int
    params: int
    batch: int = 1
    dtype: str = "float32"
    threads: int = 1
    method: str = "AlignedMTL"
    kappa: float = 1.0
    gradients: str = "random"

    @property
    def shape(self) -> tuple[int, ...]:
        """The gradients' shape: [T, P], or [B, T, P] if B > 1."""
        matrix = (self.tasks, self.params)
        return matrix if self.batch == 1 else (self.batch, *matrix)

    @property
    def bytes(self) -> int:
        """The gradients' size in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        name = f"T{self.tasks}-P{self.params}-B{self.batch}-{self.dtype}-t{self.threads}-{self.method}"
        return f"{name}-k{self.kappa:.6g}" if self.gradients == "random" else f"{name}-{self.gradients}"


@dataclass(frozen=True)
class Grid:
    """The points of a sweep, and how many were left out: too large, or with fewer parameters than tasks."""

    points: list[Point]
    large: int
    wide: int

    @classmethod
    def product(cls, max_bytes: float, **axes: Sequence[Any]) -> Grid:
        """The product of `axes` (values by the names of `Point`), small ones first.

        Args:
            max_bytes: how large a point's gradients may be.
            axes: the values; T > P is left out, since plain PyTorch has no answer for dependent gradients.
        """
        names = ("method", "batch", "dtype", "threads", "kappa", "gradients", "params", "tasks")
        order = [name for name in names if name in axes]
        every = [
            Point(**dict(zip(order, values, strict=True)))
            for values in itertools.product(*(axes[name] for name in order))
        ]
        every = list(dict.fromkeys(p if p.gradients == "random" else replace(p, kappa=1.0, batch=1) for p in every))
        fitting = [point for point in every if point.bytes <= max_bytes]
        kept = [point for point in fitting if point.tasks <= point.params]
        return cls(kept, len(every) - len(fitting), len(fitting) - len(kept))


def numbers(factor: float, least: float = 1, whole: bool = True) -> Callable[[str], list[float]]:
    """A parser for an option: a list of numbers and geometric ranges, `2:64,100`.

    `a:b` is a, a·factor, a·factor², … and b; `a:b:f` has the factor f.

    Args:
        factor: the factor of ranges that give none.
        least: the smallest allowed number.
        whole: whether numbers are integers (in a range, the nearest ones); 1e3 is one.
    """

    def read(text: str) -> list[float]:
        found: set[float] = set()
        for part in text.split(","):
            try:
                ends = [float(number) for number in part.split(":")]
            except ValueError:
                ends = []
            if not 1 <= len(ends) <= 3 or not all(map(math.isfinite, ends)):
                raise ArgumentTypeError(f"expected numbers and ranges as in 2:64,100, got {text!r}")
            low, high, step = (*ends, *ends, factor)[:3] if len(ends) == 1 else (*ends, factor)[:3]
            if low < least or high < low or step <= 1:
                raise ArgumentTypeError(f"expected {least:g} <= a <= b and a factor > 1 in a:b:factor, got {part!r}")
            if whole and (low % 1 or high % 1):
                raise ArgumentTypeError(f"expected integers, got {part!r}")
            steps = math.floor(math.log(high / low) / math.log(step) + 1e-9)
            values = [low * step**i for i in range(steps + 1)] + [high]
            found.update(round(value) if whole else float(f"{value:.6g}") for value in values)
        return sorted(found)

    return read


def names(*choices: str) -> Callable[[str], list[str]]:
    """A parser for an option: a comma-separated list of some of the `choices`."""

    def read(text: str) -> list[str]:
        found = list(dict.fromkeys(text.split(",")))
        unknown = [name for name in found if name not in choices]
        if unknown:
            raise ArgumentTypeError(f"expected some of {', '.join(choices)}, got {unknown[0]!r}")
        return found

    return read
