"""The paths from T losses to the shared parameters' gradients. Each is one file, and says itself what it cannot do.

A path is a module with the two functions of `Path`, listed in `PATHS`: the first that takes a step runs it. Its `check`
refuses options that exclude each other whatever the losses are. If a path forms the tasks' rows, `groups` and
`averaged` determine how they are aggregated.
"""

from __future__ import annotations

from typing import Protocol

from fastmtl.options import flag
from fastmtl.training.paths import (
    amortised,
    averaged,
    features,
    full,
    gramian,
    groups,
    per_example,
    sharded,
    upper_bound,
)
from fastmtl.training.step import Options, Outcome, Step

__all__ = ["PATHS", "Path", "check"]


class Path(Protocol):
    """One way to the gradients."""

    def takes(self, step: Step) -> bool:
        """Whether this path is for the step. Raises ValueError if it was asked for but cannot do it."""
        ...

    def run(self, step: Step) -> Outcome | None:
        """The gradients, without writing any; None if this path is not worthwhile, and the next one should be tried."""
        ...


PATHS: tuple[Path, ...] = (amortised, per_example, upper_bound, gramian, sharded, features, full)


def check(options: Options) -> None:
    """Raises ValueError if options exclude each other or the method, before anything else is examined."""
    for module in (per_example, upper_bound, groups, features, averaged, gramian, amortised):
        module.check(options)
    for name in ("batched", "scale_heads", "retain_graph", "check"):  # TypeError where one is neither True nor False
        flag(getattr(options, name), name)
