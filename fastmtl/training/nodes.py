"""The autograd nodes of a fan-out: K tensors become T·K aliases, whose gradients come back to a `Capture`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.info import Info
from fastmtl.pipeline import aggregate_flat
from fastmtl.rule import Context, Rule
from fastmtl.structure import map_tensors
from fastmtl.training.capture import FAN_OUT, Capture

__all__ = ["aliases_of", "with_hooks"]

_MANY = 16  # from this many tasks on, one `unbind` is faster than separate views


def _speaking(function: Any) -> Any:
    """Names a function's nodes "fan_out": torch's error about an alias modified in place then contains the name."""
    function._backward_cls.__name__ = FAN_OUT
    return function


@_speaking
class _Node(torch.autograd.Function):
    """K tensors -> T·K views of them (entry t·K + k); backward aggregates."""

    @staticmethod
    def forward(ctx: Any, capture: Capture, probe: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.capture = capture
        return _views(tensors, capture.tasks, anchored=capture.reduce is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        capture = ctx.capture
        return None, None, *capture.pass_on(ctx, grads[: capture.tasks * capture.tensors])


@_speaking
class _Join(torch.autograd.Function):
    """K tensors -> K views of them; backward aggregates what hooks have captured."""

    @staticmethod
    def forward(ctx: Any, capture: Capture, captured: _Captured, probe: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.capture, ctx.captured = capture, captured
        return _views(tensors, 1, anchored=capture.reduce is not None)

    @staticmethod
    def backward(ctx: Any, *sums: Tensor | None) -> tuple[Tensor | None, ...]:
        capture = ctx.capture
        grads = ctx.captured.take(capture.tasks * capture.tensors)
        return None, None, None, *capture.pass_on(ctx, grads, sums[: capture.tensors])


@_speaking
class _Alias(torch.autograd.Function):
    """A view whose gradient arrives after the user's hooks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Captured:
    """What hooks on aliases have seen in the running backward."""

    def __init__(self) -> None:
        self._grads: dict[int, Tensor] = {}
        self._running = -1  # the backward they belong to: one that failed half-way leaves some behind

    def hook(self, i: int) -> Callable[[Tensor | None], None]:
        def capture(gradient: Tensor | None) -> None:
            self._begin()
            if gradient is not None:
                self._grads[i] = gradient

        return capture

    def take(self, count: int) -> list[Tensor | None]:
        self._begin()
        return [self._grads.pop(i, None) for i in range(count)]

    def _begin(self) -> None:
        current = torch._C._current_graph_task_id()
        if current != self._running:
            self._grads.clear()
            self._running = current


def with_hooks(capture: Capture, probe: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The same as `_Node.apply`, with a hook on each alias."""
    captured, K = _Captured(), capture.tensors
    joined = _Join.apply(capture, captured, probe, *tensors)
    aliases: list[Tensor] = []
    for i in range(capture.tasks * K):
        inner = joined[i % K].view_as(joined[i % K])
        inner.register_hook(captured.hook(i))
        aliases.append(_Alias.apply(inner))
    return (*aliases, *joined[K:])


class _Total(torch.autograd.Function):
    """The sum of the losses, whose backward marks itself as one from `total`."""

    @staticmethod
    def forward(ctx: Any, capture: Capture, present: Sequence[bool], *losses: Tensor) -> Tensor:
        ctx.capture, ctx.present, ctx.count = capture, present, len(losses)
        return sum(losses)  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.capture.expect(ctx.present)
        return None, None, *[gradient] * ctx.count


class _TracedNode(torch.autograd.Function):
    """`_Node` for `torch.compile`: without Python state; `info` is written as tensors.

    A method that needs the losses gets them as the gradient of one more output, from `_TracedTotal`.
    """

    @staticmethod
    def forward(
        ctx: Any, method: Rule, tasks: int, info: Info | None, grad_scale: Tensor | float | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.method, ctx.tasks, ctx.info, ctx.grad_scale, ctx.tensors = method, tasks, info, grad_scale, len(tensors)
        views = _views(tensors, tasks, anchored=False)
        return (*views, tensors[0].new_zeros(tasks + 1, dtype=torch.float64)) if method.needs_losses else views

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        losses = None
        if ctx.method.needs_losses:
            *grads, told = grads  # type: ignore[assignment]
            if told is None:
                raise RuntimeError(f"fan_out: {ctx.method!r} needs the losses: sum them by the fan-out's total(losses)")
            losses = torch.where(told[-1] == 1, told[:-1], torch.nan)  # a compiler may have replaced None by zeros
        updates, info = aggregate_flat(ctx.method, grads, ctx.tensors, None, Context(losses, ctx.grad_scale))
        if ctx.info is not None:
            ctx.info.copy_(info)
        return None, None, None, None, *updates


class _TracedTotal(torch.autograd.Function):
    """The sum of the losses; the gradient of `told` is the losses [T] and a 1."""

    @staticmethod
    def forward(ctx: Any, told: Tensor, values: Tensor, *losses: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        ctx.count = len(losses)
        return sum(losses)  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (values,) = ctx.saved_tensors
        return torch.cat([values, values.new_ones(1)]), None, *[gradient] * ctx.count


def _views(tensors: Sequence[Tensor], tasks: int, anchored: bool) -> tuple[Tensor, ...]:
    """T·K views; if anchored, followed by a zero that depends on all tensors."""
    if len(tensors) == 1 and tasks >= _MANY:
        views = tensors[0].expand(tasks, *tensors[0].shape).unbind()
    else:
        views = tuple(x.view_as(x) for _ in range(tasks) for x in tensors)
    return (*views, tensors[0].new_zeros(())) if anchored else views


def aliases_of(h: Any, sources: Sequence[Tensor], outputs: Sequence[Tensor], tasks: int) -> list[Any]:
    """T structures like `h`, with its sources replaced by their outputs (entry t·K + k)."""
    if isinstance(h, Tensor):
        return list(outputs[:tasks])

    def alias_of(t: int) -> Callable[[Tensor], Tensor]:
        row = outputs[t * len(sources) : (t + 1) * len(sources)]
        return lambda x: next((output for source, output in zip(sources, row, strict=True) if source is x), x)

    return [map_tensors(alias_of(t), h) for t in range(tasks)]
