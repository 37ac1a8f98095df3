"""The gradients that one backward brings to the aliases of a fan-out, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl import once
from fastmtl.graph import Edge, reached_by, trunk_of
from fastmtl.info import Info
from fastmtl.pipeline import aggregate_flat, aggregate_part
from fastmtl.rule import Context, Rule, context_of
from fastmtl.training.running import asked_behind, executes, is_mean, nested_among, probe_like, running_call
from fastmtl.training.watch import Watch

__all__ = ["FAN_OUT", "Capture"]

FAN_OUT = "fan_outBackward"  # the name of the type of a fan-out's graph nodes


class Capture:
    """The gradients of one fan-out, T·K of them (entry t·K + k), and what becomes of them.

    It holds no alias, so that the graph and its fan-out do not keep each other alive.
    """

    def __init__(
        self,
        method: Rule,
        tasks: int,
        names: tuple[str, ...] | None,
        sources: Sequence[Tensor],
        info: Info | None,
        reduce: Callable[[Tensor], Tensor] | None,
        context: Context,
        watch: Watch,
    ) -> None:
        self.method = method
        self.context: Context = context
        self.tasks = tasks
        self.names = names
        self.tensors: int = len(sources)
        self.buffers = info
        self.reduce = reduce
        self.watch = watch
        self.info = info
        self.gradients: Sequence[Tensor | None] | None = None
        self._of_losses: Info | None = None  # what a method on losses did with the losses
        self.derived = -1  # the backward that passed a derivative taken through the aliases
        self._marked = -1  # the backward that started at a total, and the tasks that the total said were present
        self._expected: Sequence[bool] = ()
        self._sources = [x.detach() for x in sources] if reduce is not None else []

    def take(self, losses: Sequence[Tensor | None]) -> None:
        """Keeps the losses for the method. They are unscaled: a loss scaler multiplies their sum."""
        self.context = self.context._replace(losses=context_of(self.method, losses, self.tasks).losses)

    def scalarize(self, losses: Sequence[Tensor | None]) -> Tensor:
        """The one loss that a method on losses makes of them, which are unscaled."""
        method: Any = self.method
        value: Tensor = method(losses)
        self._of_losses = method.info
        return value

    def expect(self, tasks: Sequence[bool]) -> None:
        """Marks the running backward as one that aggregates, with gradients of these tasks."""
        self._marked, self._expected = torch._C._current_graph_task_id(), tasks

    def pass_on(
        self, node: Any, grads: Sequence[Tensor | None], sums: Sequence[Tensor | None] | None = None
    ) -> Sequence[Tensor | None]:
        """The K gradients for the encoder, from the T·K that were captured (entry t·K + k).

        Args:
            node: the graph node whose backward this is; its first input is the probe.
            grads: the captured gradients.
            sums: their K sums over tasks, if autograd has formed them.
        """
        watch, current = self.watch, torch._C._current_graph_task_id()
        watch.passed, watch.updates = current, None
        probe, *behind = node.next_functions
        given = self._marked == current
        if not executes(probe[0]):  # `autograd.grad`, or `backward(inputs=...)`
            if given:
                self._check_asked(behind)
            elif not self._asks_for_parameters(behind, grads):
                return self._derivative(grads if sums is None else sums)
        if self.derived == current:
            raise NotImplementedError(_DERIVED)
        updates = self._aggregated(grads)
        missing = self._missing(grads)
        if missing:
            self._warn_missing(missing, given)
        if watch.looks:
            self._look_around(node, behind, given)
            watch.updates = [u if k in watch.watched else None for k, u in enumerate(updates)]
        return updates

    def trains(self, node: Any, current: int) -> bool:
        """Whether the running backward comes from `total`, or accumulates the gradients of all it reaches."""
        return self._marked == current or executes(node.next_functions[0][0])

    def _asks_for_parameters(self, behind: Sequence[Edge], grads: Sequence[Tensor | None]) -> bool:
        """Whether a call of `autograd.grad` or `backward(inputs=)` is for training: see `fan_out`."""
        accumulates, parameters = asked_behind(behind)
        if accumulates:
            return True
        if self._missing(grads):
            return False
        if not parameters and self.tasks > 1:
            once.warn(
                "derivative of all tasks",
                self.watch.site,
                "fan_out: torch.autograd.grad was asked for gradients of all tasks with respect to tensors that are "
                "not parameters, and returns the plain derivative, without aggregation. For an aggregated gradient, "
                "start at hs.total(losses)",
            )
        return parameters

    def _check_asked(self, behind: Sequence[Edge]) -> None:
        """Warns if a total is differentiated as a function of the inputs."""
        if once.first("asked", self.watch.site) and not any(asked_behind(behind)):
            once.warn(
                "derivative of the total",
                self.watch.site,
                "fan_out: torch.autograd.grad of total(losses) was asked for tensors that are not parameters. It "
                "returns what a training step would send there, from the aggregated gradient, which is not the "
                "derivative. For the derivative, start at the losses",
            )

    def _missing(self, grads: Sequence[Tensor | None]) -> list[int]:
        """The tasks without a gradient."""
        K = self.tensors
        if K == 1:
            return [t for t, g in enumerate(grads) if g is None]
        return [t for t in range(self.tasks) if all(g is None for g in grads[t * K : (t + 1) * K])]

    def _warn_missing(self, tasks: list[int], given: bool) -> None:
        unexpected = [t for t in tasks if self._expected[t]] if given else tasks
        if unexpected:  # if no alias brings anything, it does not matter which tasks are absent
            self.watch.warn_missing(tasks if len(tasks) == self.tasks else unexpected, given)

    def _look_around(self, node: Any, behind: Sequence[Edge], given: bool) -> None:
        """Warns of misuse that shows where a training backward starts, which is not at a total."""
        watch = self.watch
        if self.tensors > 1:
            watch.nested = nested_among(behind)
        call = None if given else running_call()
        if call is None:
            return
        if any(is_mean(root, self.tasks) for root in call[1]):
            once.warn(
                "mean of the losses",
                watch.site,
                f"fan_out: the {self.tasks} losses are averaged, not summed. The weights 1/T are part of the method: "
                "with a mean over the losses, all gradients are T times too small. hs.total(losses) sums them",
            )
        if once.first("roots", watch.site):  # this walks through the graph
            ends = {(node, i): 0 for i in range(self.tasks * self.tensors + 1)}
            if reached_by(call[1], ends, trunk_of(behind).nodes, frozenset({FAN_OUT}))[1]:
                watch.warn_beside("a loss depends on h, or on what h is made of,")

    def _sums(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The plain sums over tasks."""
        sums: list[Tensor | None] = []
        for k in range(self.tensors):
            parts = [g for g in grads[k :: self.tensors] if g is not None]
            sums.append(sum(parts[1:], parts[0]) if parts else None)
        return sums

    def _derivative(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The plain sums over tasks, as part of a graph."""
        sums = self._sums(grads)
        if not torch.is_grad_enabled():
            return sums
        here = [g for g in sums if g is not None]
        marked = iter(_Derivative.apply(self, probe_like(here[0]), *here) if here else ())
        return [None if g is None else next(marked) for g in sums]

    def _aggregated(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        self._check_repeated(grads)
        if torch.is_grad_enabled():  # create_graph=True
            detached = [g if g is None else g.detach() for g in grads]
            with torch.no_grad():
                updates = self._aggregate(detached)
            return _without_second_derivative(updates, grads)
        return self._aggregate(grads)

    def _aggregate(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        updates: Sequence[Tensor | None]
        if self.method.on_losses:
            if self._marked != torch._C._current_graph_task_id() or self._of_losses is None:
                raise RuntimeError(
                    f"fan_out: {self.method!r} works on the losses: pass them to the fan-out's total(losses), and call "
                    "backward on what it returns, not on a sum"
                )
            updates, info = self._sums(grads), self._of_losses
        elif self.reduce is not None:
            updates, info = aggregate_part(self.method, grads, self._sources, self.reduce, self.context)
        elif any(g is not None for g in grads):
            if self.method.needs_losses and self.context.losses is None:
                raise RuntimeError(
                    f"fan_out: {self.method!r} needs the losses: sum them by the fan-out's total(losses)"
                )
            updates, info = aggregate_flat(self.method, grads, self.tensors, None, self.context)
        else:
            return [None] * self.tensors
        self.gradients = grads
        self.info = info if self.buffers is None else self.buffers.copy_(info)
        self.info.names = self.names
        return updates

    def _check_repeated(self, grads: Sequence[Tensor | None]) -> None:
        if self.gradients is None:
            return
        before, now = ([g is not None for g in gradients] for gradients in (self.gradients, grads))
        if before == now:
            return
        first, second = (sorted({i // self.tensors for i, here in enumerate(p) if here}) for p in (before, now))
        if first == second:
            raise RuntimeError(
                "fan_out: expected gradients of the same tensors of h as in the first backward, got others"
            )
        raise RuntimeError(
            f"fan_out: expected gradients of tasks {first} as in the first backward through this fan-out, got those of "
            f"tasks {second}. Sum the losses and call backward once: one by one, they cannot be aggregated."
        )


class _Derivative(torch.autograd.Function):
    """Identity on a derivative that is part of a graph, to detect a backward that trains on derivatives."""

    @staticmethod
    def forward(ctx: Any, capture: Capture, probe: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.capture = capture
        return tuple(g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        current = torch._C._current_graph_task_id()
        if ctx.capture.trains(ctx, current):
            raise NotImplementedError(_DERIVED)
        ctx.capture.derived = current
        return None, None, *grads


_DERIVED = (
    "fan_out: a loss contains a derivative that was taken through the aliases (torch.autograd.grad with "
    "create_graph=True). Its gradient of the encoder does not pass through the aliases and cannot be aggregated. Let "
    "the heads read h itself, and call method.backward(losses, shared=encoder), which is exact"
)


class _NoSecondDerivative(torch.autograd.Function):
    """Identity on the first `count` tensors, whose dependence on the others has no derivative."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "fan_out: the aggregated gradient has no derivative, so there is no double backward through it"
        )


def _without_second_derivative(
    updates: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    inputs = [g for g in grads if g is not None and g.requires_grad]
    made = [u for u in updates if u is not None]
    if not inputs or not made:
        return updates
    marked = iter(_NoSecondDerivative.apply(len(made), *made, *inputs))
    return [None if u is None else next(marked) for u in updates]
