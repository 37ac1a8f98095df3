"""Every method under one name and behind one call, whether it works on gradients, on a representation or on losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

import fastmtl
from fastmtl import catalog

__all__ = ["CHOICE", "METHODS", "Balancer", "check_name", "method_of"]

_PAPER = "uniform dwa uncertainty gradnorm rlw mgda mgda-ub graddrop pcgrad gradvac cagrad imtl nash aligned aligned-ub"
_MORE = "imtl-l gls stch famo rgw upgrad dualproj fairgrad config"
# The paper's rows, in its order, and others: the library's names; `-ub` aggregates gradients of the representation.
METHODS = (*_PAPER.split(), *_MORE.split())
CHOICE = (
    f"Some of {', '.join(METHODS)}, each with @8, say, or @auto for task weights in every eighth step, or as they turn"
)
_OPTIONS = {"cagrad": {"c": 0.4}}  # the authors', where the library's defaults are others


def check_name(name: str) -> tuple[str, int | Literal["auto"]]:
    """One of `METHODS`, and how often it computes task weights: `aligned@8` in every eighth step, `aligned@auto`.

    Raises:
        ValueError: a name that is not one of `METHODS`, or a period that is none.
    """
    known, _, period = name.partition("@")
    if known not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {known!r}")
    if period == "auto" or period.isdigit() or known == name:
        return known, "auto" if period == "auto" else int(period or 1)
    raise ValueError(f"method: expected {known}, {known}@K with a whole number K, or {known}@auto, got {name!r}")


def method_of(name: str, tasks: int) -> Any:
    """The method of this name for T tasks.

    Raises:
        ValueError: a name that is not one of `METHODS`.
    """
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    return catalog.make(name.removesuffix("-ub"), tasks=tasks, **_OPTIONS.get(name, {}))


class Balancer(nn.Module):
    """A method of this name for T tasks: from task losses to `.grad` of all parameters.

    As a module it has what the method learns (`parameters()`, for the optimizer) and remembers (`state_dict()`).

    Args:
        name: one of `METHODS`; names that end in `-ub` aggregate gradients of the representation, and with `@8`, say,
            weights are computed in every eighth step (`every` of `backward`).
        tasks: number of tasks T.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, name: str, tasks: int) -> None:
        super().__init__()
        self.tasks = tasks
        self.name, self.every = check_name(name)
        self.upper_bound = self.name.endswith("-ub")
        self.method = method_of(self.name, tasks)

    def extra_repr(self) -> str:
        """Name, number of tasks and options."""
        return f"{self.name!r}, tasks={self.tasks}, every={self.every!r}, method={self.method!r}"

    def backward(self, losses: Sequence[Tensor], shared: Iterable[Tensor], representation: Any = None) -> fastmtl.Info:
        """Adds to `.grad`: the aggregated gradient to shared parameters, each loss's own to the others.

        Args:
            losses: T scalar losses.
            shared: the shared parameters; the last is the layer whose gradient norms GradNorm balances.
            representation: what the encoder returned, for the methods that need it.

        Returns:
            What the method saw and did; of a method on losses, the task weights.
        """
        where: dict[str, Any] = {"representation": representation} if self.upper_bound else {"shared": shared}
        if self.every != 1:
            where["every"] = self.every
        return self.method.backward(losses, **where)

    def after_step(self, losses: Callable[[], Sequence[Tensor]]) -> None:
        """After the optimizer's step; `losses` computes those of the same batch again, for the one that asks (FAMO)."""
        self.method.after_step(losses)

    def end_epoch(self) -> None:
        """After an epoch: DWA compares epochs."""
        self.method.end_epoch()
