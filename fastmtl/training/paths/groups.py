"""Groups of shared parameters, each aggregated separately, for the paths that form the tasks' gradients."""

from __future__ import annotations

from torch import Tensor

from fastmtl.info import Info
from fastmtl.inputs import Row, describe
from fastmtl.pipeline import aggregate_groups
from fastmtl.rule import Context, Rule
from fastmtl.training.step import Options, check_reached

__all__ = ["Rows", "check"]


def check(options: Options) -> None:
    """Raises ValueError for options and methods that groups exclude."""
    if options.groups is None:
        return
    if options.shared is not None:
        raise ValueError(f"shared: expected None where groups is given, got {describe(options.shared)}")
    if options.scale_heads:
        raise ValueError("scale_heads: expected False with groups, got True: each group has task weights of its own")
    if not options.method.on_gram:
        raise ValueError(f"groups: expected a method that works on the Gram matrix, got {describe(options.method)}")


class Rows(list[Row]):
    """The tasks' gradients of all groups, one group after another."""

    def __init__(self, groups: list[list[Tensor]]) -> None:
        super().__init__()
        self._groups = groups

    def combine(self, method: Rule, context: Context) -> tuple[list[Tensor | None], Info]:
        """The updates, and an info with one entry per group."""
        check_reached(self, "shared")
        return aggregate_groups(method, self, self._groups, context)
