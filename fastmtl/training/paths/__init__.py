"""The ways from T losses to the shared parameters' gradients. One file is one path, and says itself what it cannot do.

A path is a module with the two functions of `Path`, in its place in `PATHS`: the first that takes a step runs it. Where
options exclude each other whatever the losses are, it says so in a `check`. How the tasks' rows are aggregated, where a
path forms them, is a matter of `groups` and `averaged`.
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
        """Whether this path is for the step. Raises ValueError where it was asked for and cannot."""
        ...

    def run(self, step: Step) -> Outcome | None:
        """The gradients; nothing is written. None where this path is not worth it: the next one is asked then."""
        ...


PATHS: tuple[Path, ...] = (amortised, per_example, upper_bound, gramian, sharded, features, full)


def check(options: Options) -> None:
    """Raises ValueError where options exclude each other or the method, before anything else is looked at."""
    for module in (per_example, upper_bound, groups, features, averaged, gramian, amortised):
        module.check(options)
    for name in ("batched", "scale_heads", "retain_graph", "check"):  # TypeError where one is neither True nor False
        flag(getattr(options, name), name)
