"""Every method under one name and behind one call, whether it works on gradients, on a representation or on losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

import fastmtl
from fastmtl import scalarization

__all__ = ["METHODS", "Balancer"]

# How each is made for T tasks, with its authors' options. The first are the paper's rows, in its order.
METHODS: dict[str, Callable[[int], Any]] = {
    "uniform": lambda tasks: scalarization.LS(),
    "dwa": scalarization.DWA,
    "uncertainty": scalarization.Uncertainty,
    "gradnorm": scalarization.GradNorm,
    "rlw": lambda tasks: scalarization.RLW(),
    "mgda": lambda tasks: fastmtl.MGDA(),
    "mgda-ub": lambda tasks: fastmtl.MGDA(),
    "graddrop": lambda tasks: fastmtl.GradDrop(),
    "pcgrad": lambda tasks: fastmtl.PCGrad(),
    "gradvac": lambda tasks: fastmtl.GradVac(),
    "cagrad": lambda tasks: fastmtl.CAGrad(c=0.4),
    "imtl": lambda tasks: fastmtl.IMTL(),
    "nash": lambda tasks: fastmtl.NashMTL(),
    "aligned": lambda tasks: fastmtl.AlignedMTL(),
    "aligned-ub": lambda tasks: fastmtl.AlignedMTL(),
    # Not in the paper.
    "imtl-l": scalarization.IMTLL,
    "gls": lambda tasks: scalarization.GLS(),
    "stch": scalarization.STCH,
    "famo": scalarization.FAMO,
    "rgw": lambda tasks: fastmtl.RLW(),
    "upgrad": lambda tasks: fastmtl.UPGrad(),
    "dualproj": lambda tasks: fastmtl.DualProj(),
    "fairgrad": lambda tasks: fastmtl.FairGrad(),
    "config": lambda tasks: fastmtl.ConFIG(),
}


class Balancer(nn.Module):
    """A method of this name for T tasks: from task losses to `.grad` of all parameters.

    As a module it has what the method learns (`parameters()`, for the optimizer) and remembers (`state_dict()`).

    Args:
        name: one of `METHODS`; names that end in `-ub` aggregate gradients of the representation.
        tasks: number of tasks T.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, name: str, tasks: int) -> None:
        super().__init__()
        if name not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
        self.name, self.tasks = name, tasks
        self.upper_bound = name.endswith("-ub")
        self.method = METHODS[name](tasks)

    def extra_repr(self) -> str:
        """Name, number of tasks and options."""
        return f"{self.name!r}, tasks={self.tasks}, method={self.method!r}"

    def backward(
        self, losses: Sequence[Tensor], shared: Iterable[Tensor], representation: Any = None
    ) -> fastmtl.Info | None:
        """Adds to `.grad`: the aggregated gradient to shared parameters, each loss's own to the others.

        Args:
            losses: T scalar losses.
            shared: the shared parameters; the last is the layer whose gradient norms GradNorm balances.
            representation: what the encoder returned, for the methods that need it.

        Returns:
            What a method on gradients saw and did; None for the methods on losses.
        """
        shared = list(shared)
        if self.upper_bound:
            return self.method.backward(losses, representation=representation)
        if not isinstance(self.method, scalarization.Scalarization):
            return self.method.backward(losses, shared=shared)
        layer = [next(p for p in reversed(shared) if p.ndim > 1)] if self.name == "gradnorm" else []
        self.method(losses, *layer).backward()
        return None

    def after_step(self, losses: Callable[[], Sequence[Tensor]]) -> None:
        """After the optimizer's step; `losses` computes those of the same batch again, for the one that asks (FAMO)."""
        if isinstance(self.method, scalarization.FAMO):
            self.method.update(losses())

    def end_epoch(self) -> None:
        """After an epoch: DWA compares epochs."""
        if isinstance(self.method, scalarization.DWA):
            self.method.epoch()
