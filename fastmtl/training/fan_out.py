"""The shared representation inside one ordinary backward: each task gets an alias of it, the encoder one gradient.

Aliases 1..T of a representation h carry the task gradients Z_t = ∂L_t/∂h to where they are aggregated; the result goes
on into the encoder in place of their sum (paper, section 5.2, Aligned-MTL-UB). Two implementations are equivalent: one
autograd node with T outputs, which receives all gradients at once, and tensor hooks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from fastmtl import once
from fastmtl.graph import Edge, edge_of, reached_by, trunk_of
from fastmtl.info import Info
from fastmtl.inputs import DTYPES, describe, requires_grad_outside, transforming
from fastmtl.losses import Losses, check_losses, check_names, present_losses, stack_losses
from fastmtl.rule import Context, Rule, checked_scale, names_in_order
from fastmtl.structure import map_tensors, tensors_of
from fastmtl.training.capture import Capture
from fastmtl.training.nodes import _Node, _Total, _TracedNode, _TracedTotal, aliases_of, with_hooks
from fastmtl.training.running import probe_like
from fastmtl.training.step import check_together
from fastmtl.training.watch import Watch

__all__ = ["FanOut", "Via", "check_arguments", "fan_out", "place"]

Via: TypeAlias = Literal["node", "hooks"]
_VIAS = get_args(Via)
_OfTensor: TypeAlias = "Callable[[Tensor], Tensor] | None"


def fan_out(
    h: Any,
    tasks: int | Sequence[str],
    method: Rule,
    *,
    via: Via = "node",
    info: Info | None = None,
    process_group: Any = None,
    grad_scale: Tensor | float | None = None,
) -> FanOut:
    """T aliases of a shared representation, one for each task's head: aggregation in one ordinary backward.

        hs = fan_out(h, tasks=T, method=method)
        hs.total([loss(head(h_t)) for head, h_t in zip(heads, hs)]).backward()

    The gradients that the aliases receive are captured in place and aggregated by `method`, and the encoder gets the
    single result instead of their sum: the upper bound of the paper, section 5.2. Task weights come from `method`, so
    `total` sums the losses plainly: a mean over them would apply 1/T twice.

    A task whose loss does not reach its alias is absent: a zero row. An alias that is used several times gets the sum.
    A second backward over a retained graph must bring gradients of the same tasks as the first. If no gradient is
    recorded (`torch.no_grad()`, or an `h` that does not require grad), the aliases are `h` itself.

    Gradients are aggregated in training: in a `backward()`, in anything that starts at `total`, and in a
    `torch.autograd.grad` of all tasks' losses with respect to parameters. Any other `torch.autograd.grad`, for example
    of one task's output with respect to the inputs, is the plain derivative, as if there were no fan-out. So it is with
    `create_graph=True`, but losses made from such derivatives are refused, since their gradient reaches the encoder
    without passing through the aliases.

    Uses that bypass the aliases cause a warning, once for each call in the source, as far as they can be detected: an
    alias without a gradient, `h` itself or something before it used beside them, losses that are averaged.

    Args:
        h: the representation: a tensor (float32, float64, bfloat16 or float16), or a nested list, tuple, dict or
            dataclass of tensors, whose gradients together form one row of G. Tensors that do not require grad, and
            anything else, are passed on as they are.
        tasks: number of tasks T, or their names: with `tasks=("seg", "depth")`, `hs["seg"]` is an alias,
            `hs.total({"seg": ..., "depth": ...})` takes the losses by name, and `info.names` has the names.
        method: any method of this package.
        via: "node", one autograd node (faster), or "hooks", `register_hook` on each alias and a node at their source;
            the results are the same.
        info: buffers to write into, from `Info(T)`: needed inside `torch.compile`, where only tensors can leave a
            backward.
        process_group: True (all processes) or a process group, for data parallelism: the weights come from the Gram of
            the whole batch, so that averaging the encoder's gradients over processes gives what one process would get.
            Each process's losses have to be means over its part of the batch, and summed by `hs.total(losses)`. None
            means False, with a warning if there are several processes.
        grad_scale: the factor S by which a loss scaler multiplies the losses (`scaler.get_scale()`), for methods that
            are not homogeneous: see `Method.__call__`.

    Methods that need the losses take them from `hs.total(losses)`. With a method on losses (`fastmtl.scalarization`),
    the total is that method's scalar, the encoder gets the plain sum of what the aliases bring, and a backward of any
    other sum is a RuntimeError.

    Returns:
        A sequence of T aliases, each of the structure of `h`, with `info`, `gradients` and `total`.

    Raises:
        TypeError: a tensor of `h` is of another dtype or sparse, `method` is not a method, or `info` is not an `Info`.
        ValueError: `tasks` < 1 or a name that occurs twice, `h` without tensors, an unknown `via`, weights of another
            length than T, `process_group` with a method that does not work on the Gram or needs the losses, `info` for
            another number of tasks; inside `torch.compile`: `process_group`, a method on losses or one with state.
        NotImplementedError: `h` requires grad outside a transform of `torch.func`, but not within it; (in the
            backward) a loss contains a derivative that was taken through the aliases.
        RuntimeError: (in the backward) the tasks that bring a gradient are not those of the first backward, or the
            method needs losses and `total` was not called. (In the head) torch's own error, about "fan_out", if an
            alias is modified in place: the others share its memory.
    """
    site = None if torch.compiler.is_compiling() else once.site_of(sys._getframe(1))
    return place(h, tasks, method, site, via=via, info=info, process_group=process_group, grad_scale=grad_scale)


def place(
    h: Any,
    tasks: int | Sequence[str],
    method: Rule,
    site: once.Site | None,
    *,
    via: Via = "node",
    info: Info | None = None,
    process_group: Any = None,
    grad_scale: Tensor | float | None = None,
) -> FanOut:
    """`fan_out`, with warnings attributed to `site`, which is None only within `torch.compile`."""
    tasks, names = check_arguments(tasks, method, via, info)
    if grad_scale is not None:
        grad_scale = checked_scale(grad_scale)
    sources = _sources(h)
    if not sources:
        return FanOut([h] * tasks, names, None, info, None, method if method.on_losses else None)

    reduce, agree = _reduction(method, process_group)
    if site is None:
        if reduce is not None or method.on_losses or method.remembers:
            raise ValueError(
                "fan_out: process_group, methods on losses and methods with state are not available inside "
                "torch.compile; call fan_out outside"
            )
        outputs = _TracedNode.apply(method, tasks, info, grad_scale, *sources)
        told = outputs[-1] if method.needs_losses else None
        return FanOut(aliases_of(h, sources, outputs, tasks), names, None, info, None, told=told)
    if process_group is None:
        once.warn_alone(site, "process_group", "fan_out")
    watch = Watch(site, tasks, once.due("fan_out", site))
    capture = Capture(method, tasks, names, sources, info, reduce, Context(None, grad_scale, agree), watch)
    outputs = (_Node.apply if via == "node" else with_hooks)(capture, probe_like(sources[0]), *sources)
    if watch.looks:
        for k, x in enumerate(sources):
            watch.over(x, k)
    anchor = outputs[-1] if reduce is not None else None
    return FanOut(aliases_of(h, sources, outputs, tasks), names, capture, info, anchor)


def _checked_tasks(tasks: Any) -> tuple[int, tuple[str, ...] | None]:
    """The number of tasks, and their names if they have any."""
    if isinstance(tasks, (list, tuple)) and tasks and all(isinstance(name, str) for name in tasks):
        return len(tasks), check_names(tasks, "tasks")
    if not isinstance(tasks, Integral) or isinstance(tasks, bool) or tasks < 1:
        raise ValueError(f"tasks: expected an integer >= 1 or T names, got {tasks!r}")
    return int(tasks), None


def _sources(h: Any) -> list[Tensor]:
    """The tensors of h that gradients pass through. One that occurs twice is one column of G and one alias."""
    tensors = [h] if isinstance(h, Tensor) else list(tensors_of(h))
    if not tensors:
        raise ValueError(f"h: expected a tensor or a nested structure of tensors, got {describe(h)} without any")
    if not torch.is_grad_enabled():
        return []
    if transforming() and any(requires_grad_outside(x) for x in tensors):
        raise NotImplementedError(
            "h: requires grad, but not within this transform of torch.func, so that its tasks' gradients would be "
            "plainly summed; call fan_out on the whole batch, outside"
        )
    sources: list[Tensor] = []
    for x in tensors:
        if not x.requires_grad or any(x is y for y in sources):
            continue
        if x.dtype not in DTYPES or x.layout is not torch.strided:
            raise TypeError(f"h: expected dense float32, float64, bfloat16 or float16 tensors, got {describe(x)}")
        sources.append(x)
    return sources


def check_arguments(tasks: Any, method: Rule, via: str, info: Info | None) -> tuple[int, tuple[str, ...] | None]:
    """The number of tasks, and their names if they have any. Raises as `fan_out` for arguments that do not fit."""
    names = None
    if type(tasks) is not int or tasks < 1:
        tasks, names = _checked_tasks(tasks)
    if isinstance(method, type) or not hasattr(method, "check_tasks"):
        raise TypeError(f"method: expected a method such as fastmtl.AlignedMTL(), got {describe(method)}")
    method.check_tasks(tasks)
    if names is not None and method.remembers and (known := names_in_order(method, names)) != names:
        raise ValueError(f"tasks: expected the names in the order that {method!r} remembers, {known}, got {names}")
    if via not in _VIAS:
        raise ValueError(f"via: expected one of {_VIAS}, got {via!r}")
    if info is not None:
        _check_info(info, tasks)
    return tasks, names


def _check_info(info: Any, tasks: int) -> None:
    if not isinstance(info, Info):
        raise TypeError(f"info: expected None or fastmtl.Info({tasks}), got {describe(info)}")
    if info.alpha.shape != (tasks,):
        raise ValueError(f"info: expected fastmtl.Info({tasks}), got one with alpha of shape {list(info.alpha.shape)}")


class FanOut(Sequence[Any]):
    """The T aliases that `fan_out` returns and, after a backward, what happened in it.

    Attributes:
        names: of the tasks, for `hs["seg"]`; None where they have none.
    """

    def __init__(
        self,
        aliases: list[Any],
        names: tuple[str, ...] | None,
        capture: Capture | None,
        info: Info | None,
        anchor: Tensor | None,
        plain: Rule | None = None,
        told: Tensor | None = None,
    ) -> None:
        self._aliases = aliases
        self.names = names
        self._capture = capture
        self._info = info
        self._anchor = anchor
        self._plain = plain  # a method on losses, if there is nothing to capture
        self._told = told  # the output through which a traced node is told the losses

    def __len__(self) -> int:
        return len(self._aliases)

    def __getitem__(self, t: Any) -> Any:
        return self._aliases[self._number_of(t) if isinstance(t, str) else t]

    def _number_of(self, name: str) -> int:
        if self.names is None or name not in self.names:
            expected = "a number: the tasks have no names" if self.names is None else f"one of {self.names}"
            raise KeyError(f"hs[{name!r}]: expected {expected}")
        return self.names.index(name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._aliases)

    @property
    def info(self) -> Info | None:
        """What the last backward saw and did; None before the first, unless buffers were given."""
        return self._info if self._capture is None else self._capture.info

    @property
    def gradients(self) -> list[Any] | None:
        """The task gradients that the last backward captured: T structures like `h`; None before the first.

        In them, None stands for a tensor that a task's loss does not reach, or that does not require grad. They are the
        very tensors that autograd passes on: do not modify them.
        """
        if self._capture is None or self._capture.gradients is None:
            return None
        gradients = iter(self._capture.gradients)
        of = {
            alias: next(gradients)
            for h in self._aliases
            for alias in dict.fromkeys(id(x) for x in tensors_of(h) if x.requires_grad)
        }
        return [map_tensors(lambda x: of.get(id(x)), h) for h in self._aliases]

    def total(self, losses: Losses) -> Tensor:
        """The sum of the T losses, or a method-on-losses' scalar of them, for the one backward of a step.

        Calling it makes sure that all losses are there and are summed, not averaged, and tells which tasks are absent.
        With `process_group` the total is tied to the aliases even if no loss uses one: every process has to take part
        in the backward of the representation, also one without examples of any task, or the others would wait for it.
        Methods that need the losses take them from here.

        Args:
            losses: T scalars, a list, a tuple or a tensor [T], in the order of the tasks, or a dict by their names;
                None for a task that is absent in this step; so is one whose loss requires no grad.

        Returns:
            A scalar tensor [].

        Raises:
            TypeError: `losses` is of another kind, or one of them is not a floating tensor.
            ValueError: not T losses, names that are missing or unknown, one that is not a scalar, or none that requires
                grad.
        """
        parts = check_losses(losses, len(self), self.names)
        capture = self._capture
        here = present_losses(parts)
        summands = [x if x.ndim == 0 else x.reshape(()) for x in parts if x is not None]
        if len({x.device for x in summands}) > 1:  # heads of a model on several devices
            summands = [x.to(summands[0].device) for x in summands]
        if self._anchor is not None:
            summands.append(self._anchor)
        elif not summands or (capture is not None and all(loss is None for loss in here)):
            raise ValueError(f"losses: expected at least one loss that requires grad, got none among {len(self)}")
        if self._plain is not None and any(loss is not None for loss in here):
            return self._scalarized(parts)
        if self._told is not None:
            values = stack_losses(parts).detach().to(self._told)
            return _TracedTotal.apply(self._told, values, *summands)  # type: ignore[no-any-return]
        if capture is None or torch.compiler.is_compiling():
            return sum(summands)  # type: ignore[return-value]
        if capture.method.on_losses:
            summands = [capture.scalarize(parts)]
        elif capture.method.needs_losses:
            capture.take(here)
        if once.first("losses", capture.watch.site):
            self._examine(here)
        total: Tensor = _Total.apply(capture, [loss is not None for loss in here], *summands)
        return total

    def _scalarized(self, losses: Sequence[Tensor | None]) -> Tensor:
        """A method-on-losses' scalar where h requires no grad, as behind a frozen encoder, and only heads train."""
        method: Any = self._plain
        value: Tensor = method(losses)
        self._info = method.info if self._info is None else self._info.copy_(method.info)
        self._info.names = self.names
        return value

    def _examine(self, losses: Sequence[Tensor | None]) -> None:
        """Warns of losses that do not depend on their alias, and of paths around the aliases."""
        assert self._capture is not None
        ends: dict[Edge, int] = {}
        for t, alias in enumerate(self._aliases):
            ends.update((edge_of(x), t) for x in tensors_of(alias) if x.requires_grad)
        node = next(iter(ends))[0]
        while not hasattr(node, "capture"):  # from an alias to the node that made all of them
            node = node.next_functions[0][0]
        trunk = trunk_of(node.next_functions[1:]).nodes
        watch = self._capture.watch
        found = {t: reached_by([loss], ends, trunk) for t, loss in enumerate(losses) if loss is not None}
        unread = [t for t, (reached, _) in found.items() if not reached]
        if unread:
            watch.warn_missing(unread if len(unread) < len(found) else range(len(self)), True)
        for t, (reached, _) in found.items():
            if reached and t not in reached:
                watch.warn_missing([t], True, sorted(reached))
        beside = [f"losses[{t}]" for t, (_, around) in found.items() if around]
        if beside:
            verb = "depends" if len(beside) == 1 else "depend"
            watch.warn_beside(f"{', '.join(beside)} {verb} on h, or on what h is made of,")

    @property
    def aggregates(self) -> bool:
        """Whether gradients are recorded; if not, the aliases are h itself."""
        return self._capture is not None

    def over(self, running: int) -> bool:
        """Whether a backward other than the running one has passed here."""
        return self._capture is not None and self._capture.watch.passed not in (-1, running)

    def __getstate__(self) -> dict[str, Any]:
        # For copies: a graph cannot be copied, so a copy is empty.
        nothing = dict.fromkeys(("_capture", "_info", "_anchor", "_plain", "_told"))
        return {"_aliases": [None] * len(self), "names": self.names, **nothing}

    def __repr__(self) -> str:
        return f"FanOut({len(self)} x {describe(self._aliases[0])})"


def _reduction(method: Rule, group: Any) -> tuple[_OfTensor, _OfTensor]:
    """Functions that reduce a process's Gram to the whole batch's, and agree on a tensor; None for one process."""
    if group is False or group is None:
        return None, None
    check_together(method)
    from fastmtl import distributed  # here: not every torch is built with it

    own = distributed.gram_group(group)
    return lambda M: distributed.reduce_gram(M, own), lambda x: distributed.agree(x, own)
