"""Warnings about gradients that bypass the aliases of a fan-out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl import once
from fastmtl.training.running import takes_derivative

__all__ = ["Watch", "watch_for_heads"]

_BESIDE = "h beside its aliases"


class Watch:
    """Detects in a backward that something other than its aliases gives h a gradient, and warns.

    It is part of the graph of h, so it holds nothing that is made from h.
    """

    def __init__(self, site: once.Site, tasks: int, looks: bool) -> None:
        self.site = site
        self.tasks = tasks
        self.looks = looks  # whether in this step: not in all, since it costs time
        self.watched: set[int] = set()  # tensors of h
        self.passed = -1  # the backward in which the aliases' gradients last arrived
        self.updates: list[Tensor | None] | None = None  # their aggregation, until it reaches h
        self.nested: frozenset[int] = frozenset()  # tensors of h from which others of h are made

    def over(self, x: Tensor, k: int) -> None:
        """Starts watching the gradient of tensor k of h."""
        if x.is_leaf:  # a parameter, which may be used elsewhere; and hooks would stay on it
            return
        self.watched.add(k)
        others = dict(x._backward_hooks or {})
        x.register_hook(self._looking_at(k))
        if others:  # they may change the gradient, so ours has to run first
            hooks: Any = x._backward_hooks
            ours = {key: hook for key, hook in hooks.items() if key not in others}
            hooks.clear()
            hooks.update(ours | others)

    def _looking_at(self, k: int) -> Callable[[Tensor | None], None]:
        def look(gradient: Tensor | None) -> None:
            if gradient is None:
                return
            if self.passed != torch._C._current_graph_task_id():
                self._without_aliases()
            elif self.updates is not None:
                # We held ours until now, so autograd cannot have added to it in place: any sum is another tensor.
                ours, self.updates[k] = self.updates[k], None
                more = gradient is not ours and k not in self.nested
                if more and once.first("compared", self.site) and not _same(gradient, ours):
                    self.warn_beside("h has got a gradient")

        return look

    def _without_aliases(self) -> None:
        if not takes_derivative():
            self.warn_missing(range(self.tasks), False)

    def warn_missing(self, tasks: Sequence[int], given: bool, others: Sequence[int] = ()) -> None:
        """Warns of aliases that bring no gradient; `given`: although `total` was given their losses."""
        if len(tasks) == self.tasks:
            self._warn_unread()
            return
        names = ", ".join(f"hs[{t}]" for t in tasks)
        if others:
            what = f"losses[{tasks[0]}] depends on {', '.join(f'hs[{u}]' for u in others)} and not on its alias {names}"
        else:
            what = f"{names} of {self.tasks} aliases {'has' if len(tasks) == 1 else 'have'} got no gradient"
        absent = (
            "Where a task's loss does not depend on h in this step, pass None to hs.total for that task and add its "
            "loss to what total returns"
            if given
            else "Where a task is absent in this step, say so by hs.total(losses), with None for it"
        )
        once.warn(
            "alias without gradient",
            self.site,
            f"fan_out: {what}. Head t has to read hs[t]: a gradient that reaches h another way is only added, not "
            f"aligned. {absent}",
        )

    def _warn_unread(self) -> None:
        """Warns that no alias brings a gradient, which covers the warning about h beside its aliases."""
        once.first(_BESIDE, self.site)
        once.warn(
            "alias without gradient",
            self.site,
            f"fan_out: the heads read h itself, or another tensor, not {self._aliases()}, so nothing is aligned. Call "
            "heads[t](hs[t])",
        )

    def warn_beside(self, what: str) -> None:
        """Warns of a use of h beside its aliases."""
        once.warn(
            _BESIDE,
            self.site,
            f"fan_out: {what} beside the aliases {self._aliases()}. Gradients that arrive there are added "
            "plainly, not aggregated: head t has to read hs[t], and h has to contain all that heads read",
            most=1,
        )

    def _aliases(self) -> str:
        return "hs[0]" if self.tasks == 1 else f"hs[0] ... hs[{self.tasks - 1}]"


def watch_for_heads(called: list[bool], site: once.Site, names: Sequence[str]) -> Callable[[Tensor], None]:
    """A hook for an encoder's output, which warns if it gets a gradient although no head was called with it."""

    def look(_: Tensor) -> None:
        if not called[0] and not takes_derivative():
            once.warn(
                "no head called",
                site,
                f"attach: the encoder got a gradient, but none of {', '.join(names)} was called with its output, so "
                "nothing was aggregated",
            )

    return look


def _same(x: Tensor, y: Tensor | None) -> bool:
    """Whether only zeros were added to y. This waits for the device."""
    return y is not None and torch.equal(x, y)
