"""The shared representation inside one ordinary backward: each task gets an alias of it, the encoder one gradient.

Aliases 1..T of a representation h carry the task gradients Z_t = ∂L_t/∂h to where they are aggregated; what comes out
goes on into the encoder in place of their sum (paper, section 5.2, Aligned-MTL-UB). Two implementations, equal to each
other: one autograd node with T outputs, which is told all gradients at once, or tensor hooks alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastmtl import once
from fastmtl.graph import Edge, edge_of, is_leaf, reached_by, trunk_of
from fastmtl.info import Info
from fastmtl.inputs import DTYPES, check_losses, describe, present_losses, requires_grad_outside, transforming
from fastmtl.methods.base import Method
from fastmtl.pipeline import aggregate_flat, aggregate_part
from fastmtl.rule import Context, check_scale, context_of
from fastmtl.structure import map_tensors, tensors_of

__all__ = ["FanOut", "check_method", "fan_out", "place", "watch_for_heads"]

_VIAS = ("node", "hooks")
# What calls that run a backward name the tensors that it starts from.
_ROOTS = {torch.autograd.backward.__code__: "tensors", torch.autograd.grad.__code__: "outputs"}
_FAN_OUTS = frozenset({"fan_outBackward", "_JoinBackward"})  # types of the graph nodes
_MANY = 16  # tasks from which on one `unbind` is faster than so many views


def fan_out(
    h: Any,
    tasks: int,
    method: Method,
    *,
    via: str = "node",
    info: Info | None = None,
    global_gram: Any = None,
    grad_scale: Tensor | float | None = None,
) -> FanOut:
    """T aliases of a shared representation, one for each task's head, for aggregation in one ordinary backward.

        hs = fan_out(h, tasks=T, method=method)
        hs.total([loss(head(h_t)) for head, h_t in zip(heads, hs)]).backward()

    The gradients that the aliases receive are captured where they lie and aggregated by `method`, and the encoder gets
    the single result instead of their sum: the upper bound of paper, section 5.2. Task weights come from `method`, so
    the losses are summed plainly, by `total`: a mean over them would apply 1/T twice.

    A task whose loss does not reach its alias is absent: a zero row. An alias that is used several times gets the sum.
    A second backward over a retained graph must bring gradients of the same tasks as the first. Where no gradient is
    recorded (`torch.no_grad()`, or an `h` that does not require grad) the aliases are `h` itself.

    Gradients are aggregated in what trains: a `backward()`, whatever starts at `total`, and a `torch.autograd.grad` of
    all tasks' losses with respect to parameters. Any other `torch.autograd.grad`, of one task's output with respect to
    the inputs for example, is the derivative, as if there were no fan-out; with `create_graph=True` too, but losses
    made from such derivatives are refused, since what they bring the encoder does not pass through the aliases.

    Use that goes by the aliases is warned of, once for each call in the source: an alias without a gradient, `h` itself
    or something before it used beside them, losses that are averaged, as far as that can be seen.

    Args:
        h: the representation: a tensor (float32, float64, bfloat16 or float16), or a nested list, tuple, dict or
            dataclass of tensors; their gradients are one row of G together. Tensors that do not require grad, and
            whatever is no tensor, are passed on as they are.
        tasks: number of tasks T.
        method: any method of this package.
        via: "node", one autograd node (faster), or "hooks", `register_hook` on each alias, and a node where they come
            from; the results are the same.
        info: buffers to write into, from `Info(T)`: needed inside `torch.compile`, where nothing but tensors can leave
            a backward.
        global_gram: True (all processes) or a process group, for data parallelism: the weights come from the Gram of
            the whole batch, so that averaging the encoder's gradients over processes gives what one process would get.
            Each process's losses have to be means over its part of the batch, and summed by `hs.total(losses)`. None
            is False, with a warning where there are several processes.
        grad_scale: the factor S by which a loss scaler multiplies the losses (`scaler.get_scale()`), for methods that
            are not homogeneous: see `Method.__call__`.

    Methods that need the losses take them from `hs.total(losses)`.

    Returns:
        A sequence of T aliases, each of the structure of `h`, with `info`, `gradients` and `total`.

    Raises:
        TypeError: a tensor of `h` is of another dtype or sparse, `method` is no method, or `info` no `Info`.
        ValueError: `tasks` < 1, `h` without tensors, an unknown `via`, weights of another length than T, `global_gram`
            with a method that does not work on the Gram or needs the losses, `info` for another number of tasks;
            inside `torch.compile`: `global_gram`, `grad_scale`, a method that needs the losses or has state.
        NotImplementedError: `h` requires grad outside of a transform of `torch.func`, but not within it; (in the
            backward) a loss contains a derivative that was taken through the aliases.
        RuntimeError: (in the backward) the tasks that bring a gradient are not those of the first backward, or the
            method needs losses and `total` was not called. (In the head) torch's own, about "fan_out", where an alias
            is written in place: the others share its memory.
    """
    site = None if torch.compiler.is_compiling() else once.site_of(sys._getframe(1))
    return place(h, tasks, method, site, via=via, info=info, global_gram=global_gram, grad_scale=grad_scale)


def place(
    h: Any,
    tasks: int,
    method: Method,
    site: once.Site | None,
    *,
    via: str = "node",
    info: Info | None = None,
    global_gram: Any = None,
    grad_scale: Tensor | float | None = None,
) -> FanOut:
    """`fan_out`, with warnings that name `site`, which is there except within `torch.compile`."""
    if not isinstance(tasks, int) or tasks < 1:
        raise ValueError(f"tasks: expected an integer >= 1, got {tasks!r}")
    check_method(method, tasks)
    if via not in _VIAS:
        raise ValueError(f"via: expected one of {_VIAS}, got {via!r}")
    if info is not None:
        _check_info(info, tasks)
    if grad_scale is not None:
        check_scale(grad_scale)
    sources = _sources(h)
    if not sources:
        return FanOut([h] * tasks, None, info, None)

    reduce, agree = _reduction(method, global_gram)
    if site is None:
        if reduce is not None or grad_scale is not None or method.needs_losses or method.remembers:
            raise ValueError(
                "fan_out: global_gram, grad_scale, methods that need the losses and methods with state are not "
                "available inside torch.compile; call fan_out outside"
            )
        outputs = _TracedNode.apply(method, tasks, info, *sources)
        return FanOut(_aliases(h, sources, outputs, tasks), None, info, None)
    if global_gram is None:
        once.warn_alone(site, "global_gram", "fan_out")
    watch = _Watch(site, tasks, once.due("fan_out", site))
    capture = _Capture(method, tasks, sources, info, reduce, Context(None, grad_scale, agree), watch)
    outputs = (_Node.apply if via == "node" else _with_hooks)(capture, _probe(sources[0]), *sources)
    if watch.looks:
        for k, x in enumerate(sources):
            watch.over(x, k)
    return FanOut(_aliases(h, sources, outputs, tasks), capture, info, outputs[-1] if reduce is not None else None)


def _sources(h: Any) -> list[Tensor]:
    """The tensors of h that gradients pass through. One that occurs twice is one column of G, and one alias."""
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


def _check_info(info: Any, tasks: int) -> None:
    if not isinstance(info, Info):
        raise TypeError(f"info: expected None or fastmtl.Info({tasks}), got {describe(info)}")
    if info.alpha.shape != (tasks,):
        raise ValueError(f"info: expected fastmtl.Info({tasks}), got one with alpha of shape {list(info.alpha.shape)}")


def check_method(method: Method, tasks: int) -> None:
    """Raises TypeError for what is no method, ValueError for a method of another number of tasks."""
    if not isinstance(method, Method):
        raise TypeError(f"method: expected a method such as fastmtl.AlignedMTL(), got {describe(method)}")
    method.check_tasks(tasks)


class FanOut(Sequence[Any]):
    """The T aliases that `fan_out` returns; after a backward also what was seen and done in it."""

    def __init__(self, aliases: list[Any], capture: _Capture | None, info: Info | None, anchor: Tensor | None) -> None:
        self._aliases = aliases
        self._capture = capture
        self._info = info
        self._anchor = anchor

    def __len__(self) -> int:
        return len(self._aliases)

    def __getitem__(self, t: Any) -> Any:
        return self._aliases[t]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._aliases)

    @property
    def info(self) -> Info | None:
        """What the method saw and did in the last backward; None before one, unless buffers were given."""
        return self._info if self._capture is None else self._capture.info

    @property
    def gradients(self) -> list[Any] | None:
        """The task gradients that the last backward captured: T structures like `h`; None before a backward.

        None stands in them for a tensor that a task's loss does not reach (and for one that does not require grad).
        They are those very tensors that autograd passed on: do not write into them.
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

    def total(self, losses: Sequence[Tensor | None] | Tensor) -> Tensor:
        """The sum of the T losses, for the one backward of a step.

        It says which tasks there are: that all losses are there, that they are summed and not averaged, and which are
        absent. With `global_gram` it is tied to the aliases even where no loss uses one: every process has to take part
        in the backward of the representation, also one that has no example for any task, for which the others would
        wait. Methods that need the losses take them from here.

        Args:
            losses: T scalars, a list, a tuple or a tensor [T], in the order of the tasks; None for a task that is
                absent in this step, as is one whose loss needs no gradient.

        Returns:
            A scalar tensor [].

        Raises:
            TypeError: `losses` is of another kind, or one of them no floating tensor.
            ValueError: not T losses, one that is no scalar, or none that requires grad.
        """
        if isinstance(losses, Tensor) and losses.ndim == 1:
            losses = losses.unbind()
        parts = check_losses(losses, len(self))
        capture = self._capture
        here = present_losses(parts)
        summands = [x if x.ndim == 0 else x.reshape(()) for x in parts if x is not None]
        if self._anchor is not None:
            summands.append(self._anchor)
        elif not summands or (capture is not None and all(loss is None for loss in here)):
            raise ValueError(f"losses: expected at least one loss that requires grad, got none among {len(self)}")
        if capture is None or torch.compiler.is_compiling():
            return sum(summands)  # type: ignore[return-value]
        if capture.method.needs_losses:
            capture.take(here)
        if once.first("losses", capture.watch.site):
            self._examine(here)
        return _Total.apply(capture, [loss is not None for loss in here], *summands)

    def _examine(self, losses: Sequence[Tensor | None]) -> None:
        """Warns of losses that do not depend on their alias, and of ways around the aliases."""
        assert self._capture is not None
        ends: dict[Edge, int] = {}
        for t, alias in enumerate(self._aliases):
            ends.update((edge_of(x), t) for x in tensors_of(alias) if x.requires_grad)
        node = next(iter(ends))[0]
        while not hasattr(node, "capture"):  # from an alias to where all come from
            node = node.next_functions[0][0]
        trunk = trunk_of(node.next_functions[1:]).nodes
        beside = []
        for t, loss in enumerate(losses):
            if loss is not None:
                reached, around = reached_by([loss], ends, trunk)
                if around:
                    beside.append(f"losses[{t}]")
                if t not in reached:
                    self._capture.watch.warn_missing([t], True, sorted(reached))
        if beside:
            verb = "depends" if len(beside) == 1 else "depend"
            self._capture.watch.warn_beside(f"{', '.join(beside)} {verb} on h, or on what h is made of,")

    @property
    def aggregates(self) -> bool:
        """Whether gradients are recorded: else the aliases are h itself."""
        return self._capture is not None

    def over(self, running: int) -> bool:
        """Whether a backward has come by here, other than the one that is running."""
        return self._capture is not None and self._capture.watch.passed not in (-1, running)

    def __getstate__(self) -> dict[str, Any]:
        # For copies: of a graph there is none, so a copy holds nothing.
        return {"_aliases": [None] * len(self), "_capture": None, "_info": None, "_anchor": None}

    def __repr__(self) -> str:
        return f"FanOut({len(self)} x {describe(self._aliases[0])})"


class _Watch:
    """Sees in a backward what else than its aliases brings h a gradient, and says so.

    Part of the graph of h, and so it holds nothing of what is made from h.
    """

    def __init__(self, site: once.Site, tasks: int, looks: bool) -> None:
        self.site = site
        self.tasks = tasks
        self.looks = looks  # in this step: not in each, since it costs
        self.watched: set[int] = set()  # tensors of h
        self.passed = -1  # the backward in which the aliases' gradients last came by
        self.updates: list[Tensor | None] | None = None  # what they became, until h gets it
        self.nested: frozenset[int] = frozenset()  # tensors of h from which others of h are made

    def over(self, x: Tensor, k: int) -> None:
        """Looks at what tensor k of h gets."""
        if x.is_leaf:  # a parameter, which may be used elsewhere; and hooks would stay on it
            return
        self.watched.add(k)
        others = dict(x._backward_hooks or {})
        x.register_hook(self._looking_at(k))
        if others:  # which may change the gradient: ours goes first
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
                # Held until now, ours cannot have been added to in place: another tensor has more to it.
                ours, self.updates[k] = self.updates[k], None
                more = gradient is not ours and k not in self.nested
                if more and once.first("compared", self.site) and not _same(gradient, ours):
                    self.warn_beside("h has got a gradient")

        return look

    def _without_aliases(self) -> None:
        if not _takes_derivative():
            self.warn_missing(range(self.tasks), False)

    def warn_missing(self, tasks: Sequence[int], given: bool, others: Sequence[int] = ()) -> None:
        """Warns of aliases that bring nothing; `given`: although `total` was given their losses."""
        names = ", ".join(f"hs[{t}]" for t in tasks)
        if len(tasks) == self.tasks:
            what = f"none of the {self.tasks} aliases has got a gradient"
        elif others:
            what = f"losses[{tasks[0]}] depends on {', '.join(f'hs[{u}]' for u in others)} and not on its alias {names}"
        else:
            what = f"{names} of {self.tasks} aliases {'has' if len(tasks) == 1 else 'have'} got no gradient"
        absent = (
            "For a task whose loss does not depend on h in this step, give total None and add the loss to the total"
            if given
            else "Where a task is absent in this step, say so by hs.total(losses), with None for it"
        )
        once.warn(
            "alias without gradient",
            self.site,
            f"fan_out: {what}. Head t has to read hs[t]: what it brings h in another way is not aggregated as the "
            f"gradient of its task. {absent}",
        )

    def warn_beside(self, what: str) -> None:
        """Warns of a use of h beside its aliases."""
        once.warn(
            "h beside its aliases",
            self.site,
            f"fan_out: {what} beside the aliases hs[0] ... hs[{self.tasks - 1}]. What comes by there is added plainly, "
            "not aggregated: head t has to read hs[t], and h has to have all that heads read",
            most=1,
        )


def watch_for_heads(called: list[bool], site: once.Site, names: Sequence[str]) -> Callable[[Tensor], None]:
    """A hook for what an encoder returned: warns where it gets a gradient although no head was called with it."""

    def look(_: Tensor) -> None:
        if not called[0] and not _takes_derivative():
            once.warn(
                "no head called",
                site,
                f"attach: the encoder has got a gradient, but none of {', '.join(names)} was called with what it "
                "returned, so nothing was aggregated",
            )

    return look


class _Capture:
    """The gradients of one fan-out, T·K of them (entry t·K + k), and what becomes of them.

    Holds no alias, so that the graph and its fan-out do not keep each other alive.
    """

    def __init__(
        self,
        method: Method,
        tasks: int,
        sources: Sequence[Tensor],
        info: Info | None,
        reduce: Callable[[Tensor], Tensor] | None,
        context: Context,
        watch: _Watch,
    ) -> None:
        self.method = method
        self.context = context
        self.tasks = tasks
        self.tensors = len(sources)
        self.buffers = info
        self.reduce = reduce
        self.watch = watch
        self.info = info
        self.gradients: Sequence[Tensor | None] | None = None
        self.derived = -1  # the backward that has come by a derivative through the aliases
        self._marked = -1  # the backward that started at a total, and the tasks it said were there
        self._expected: Sequence[bool] = ()
        self._sources = [x.detach() for x in sources] if reduce is not None else []

    def take(self, losses: Sequence[Tensor | None]) -> None:
        """Keeps the losses for the method. They are not scaled yet: that is done to their sum."""
        self.context = self.context._replace(losses=context_of(self.method, losses, self.tasks).losses)

    def expect(self, tasks: Sequence[bool]) -> None:
        """Says that the running backward is to aggregate, and that it brings gradients of these tasks."""
        self._marked, self._expected = torch._C._current_graph_task_id(), tasks

    def pass_on(
        self, node: Any, grads: Sequence[Tensor | None], sums: Sequence[Tensor | None] | None = None
    ) -> Sequence[Tensor | None]:
        """K gradients for the encoder from the T·K that were captured (entry t·K + k).

        Args:
            node: the graph node of which this is the backward; its first input is the probe.
            grads: what was captured.
            sums: the K sums over tasks, where they are there.
        """
        watch, current = self.watch, torch._C._current_graph_task_id()
        watch.passed, watch.updates = current, None
        probe, *behind = node.next_functions
        given = self._marked == current
        if not _executes(probe[0]):  # `autograd.grad`, or `backward(inputs=...)`
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
        """Whether the running backward comes from `total`, or accumulates gradients of all that it reaches."""
        return self._marked == current or _executes(node.next_functions[0][0])

    def _asks_for_parameters(self, behind: Sequence[Edge], grads: Sequence[Tensor | None]) -> bool:
        """Whether a call of `autograd.grad` or `backward(inputs=)` is for training: see `fan_out`."""
        accumulates, parameters = _asked_behind(behind)
        if accumulates:
            return True
        if self._missing(grads):
            return False
        if not parameters and self.tasks > 1:
            once.warn(
                "derivative of all tasks",
                self.watch.site,
                "fan_out: a torch.autograd.grad of what all aliases lead to, with respect to no nn.Parameter, is the "
                "derivative, without aggregation. For an aggregated gradient start at hs.total(losses)",
            )
        return parameters

    def _check_asked(self, behind: Sequence[Edge]) -> None:
        """Warns where a total is taken for a function of the inputs."""
        if once.first("asked", self.watch.site) and not any(_asked_behind(behind)):
            once.warn(
                "derivative of the total",
                self.watch.site,
                "fan_out: torch.autograd.grad of total(losses) with respect to no nn.Parameter gives what a training "
                "backward would bring there, from the aggregated gradient, and is not the derivative. For that start "
                "at the losses",
            )

    def _missing(self, grads: Sequence[Tensor | None]) -> list[int]:
        """The tasks of which there is no gradient."""
        K = self.tensors
        if K == 1:
            return [t for t, g in enumerate(grads) if g is None]
        return [t for t in range(self.tasks) if all(g is None for g in grads[t * K : (t + 1) * K])]

    def _warn_missing(self, tasks: list[int], given: bool) -> None:
        if given:
            tasks = [t for t in tasks if self._expected[t]]
        if tasks:
            self.watch.warn_missing(tasks, given)

    def _look_around(self, node: Any, behind: Sequence[Edge], given: bool) -> None:
        """Warns of what a training backward shows to be wrong where it starts. At a total there is nothing to see."""
        watch = self.watch
        if self.tensors > 1:
            watch.nested = _nested(watch.site, behind)
        call = None if given else _running_call()
        if call is None:
            return
        if any(_is_mean(root, self.tasks) for root in call[1]):
            once.warn(
                "mean of the losses",
                watch.site,
                f"fan_out: the {self.tasks} losses are averaged, not summed. The weights 1/T are the method's: with a "
                "mean over the losses, all gradients are T times too small. hs.total(losses) sums them",
            )
        if once.first("roots", watch.site):  # this takes a walk through the graph
            ends = {(node, i): 0 for i in range(self.tasks * self.tensors + 1)}
            if reached_by(call[1], ends, trunk_of(behind).nodes, _FAN_OUTS)[1]:
                watch.warn_beside("a loss depends on h, or on what h is made of,")

    def _derivative(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The plain sums over tasks."""
        sums: list[Tensor | None] = []
        for k in range(self.tensors):
            parts = [g for g in grads[k :: self.tensors] if g is not None]
            sums.append(sum(parts[1:], parts[0]) if parts else None)
        if not torch.is_grad_enabled():
            return sums
        here = [g for g in sums if g is not None]
        marked = iter(_Derivative.apply(self, _probe(here[0]), *here) if here else ())
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
        if self.reduce is not None:
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


# ------------------------------------------------------------------------------------------------ the running backward


_probes: dict[torch.device, Tensor] = {}


def _probe(like: Tensor) -> Tensor:
    """A leaf beside h, one for all. A backward executes its node just where it accumulates gradients of all leaves."""
    probe = _probes.get(like.device)
    if probe is None:
        probe = torch.empty((), device=like.device, requires_grad=True)
        if type(probe) is Tensor:  # no fake
            _probes[like.device] = probe
    return probe


def _executes(node: Any) -> bool:
    return torch._C._will_engine_execute_node(node)


def _asked_behind(edges: Sequence[Edge]) -> tuple[bool, bool]:
    """Whether the running backward accumulates gradients behind edges, and whether it returns those of parameters."""
    parameters = False
    for leaf in trunk_of(edges).nodes:
        if not is_leaf(leaf):
            continue
        try:
            if _executes(leaf):
                return True, parameters
        except RuntimeError:  # which is how torch answers for a leaf whose gradient `autograd.grad` returns
            parameters |= isinstance(leaf.variable, torch.nn.Parameter)
    return False, parameters


def _running_call() -> tuple[str, list[Tensor]] | None:
    """Which of `torch.autograd.backward` and `grad` is running, and from which tensors; None where that is not clear.

    For what lies on a GPU autograd has a thread of its own, and the call waits in another.
    """
    here = _call_in(sys._getframe(1))
    if here is not None:
        return here
    others = [call for frame in sys._current_frames().values() if (call := _call_in(frame)) is not None]
    return others[0] if len(others) == 1 else None


def _call_in(frame: FrameType | None) -> tuple[str, list[Tensor]] | None:
    while frame is not None:
        name = _ROOTS.get(frame.f_code)
        if name is not None:
            roots = frame.f_locals[name]
            roots = roots if isinstance(roots, (list, tuple)) else [roots]
            return frame.f_code.co_name, [x for x in roots if isinstance(x, Tensor)]
        frame = frame.f_back
    return None


def _same(x: Tensor, y: Tensor | None) -> bool:
    """Whether all that was added to y was zero. This waits for the device."""
    return y is not None and torch.equal(x, y)


def _takes_derivative() -> bool:
    call = _running_call()
    return call is not None and call[0] == "grad"


def _is_mean(root: Tensor, tasks: int) -> bool:
    """Whether a tensor is a mean over a stack of as many others, times constants."""
    node: Any = root.grad_fn
    while node is not None:
        following = [edge[0] for edge in node.next_functions if edge[0] is not None]
        if len(following) != 1:
            return False
        if type(node).__name__ in ("MeanBackward0", "MeanBackward1"):
            inner = following[0]
            return type(inner).__name__ in ("StackBackward0", "CatBackward0") and len(inner.next_functions) == tasks
        if type(node).__name__ not in ("MulBackward0", "DivBackward0", "ToCopyBackward0", "ViewBackward0"):
            return False
        node = following[0]
    return False


_nested_at: dict[Any, frozenset[int]] = {}


def _nested(site: once.Site, edges: Sequence[Edge]) -> frozenset[int]:
    """Which tensors of h lie behind others of h: looked up once for each site."""
    key = site.key("nested")
    if key not in _nested_at:
        inside = trunk_of(edges).nested
        _nested_at[key] = frozenset(k for k, edge in enumerate(edges) if edge in inside)
    return _nested_at[key]


# ------------------------------------------------------------------------------------------------ nodes


def _speaking(function: Any) -> Any:
    """Names a function's nodes "fan_out": what torch says of an alias that is written in place names the node."""
    function._backward_cls.__name__ = "fan_outBackward"
    return function


@_speaking
class _Node(torch.autograd.Function):
    """K tensors -> T·K views of them (entry t·K + k); backward aggregates."""

    @staticmethod
    def forward(ctx: Any, capture: _Capture, probe: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.capture = capture
        return _views(tensors, capture.tasks, anchored=capture.reduce is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        capture = ctx.capture
        return None, None, *capture.pass_on(ctx, grads[: capture.tasks * capture.tensors])


class _Join(torch.autograd.Function):
    """K tensors -> K views of them; backward aggregates what hooks have captured."""

    @staticmethod
    def forward(
        ctx: Any, capture: _Capture, captured: _Captured, probe: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
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
    """A view, whose gradient arrives after the hooks of the user."""

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
        self._running = -1  # the backward that these are of: one that failed half-way has left something behind

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


def _with_hooks(capture: _Capture, probe: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """What `_Node.apply` does, with a hook on each alias."""
    captured, K = _Captured(), capture.tensors
    joined = _Join.apply(capture, captured, probe, *tensors)
    aliases: list[Tensor] = []
    for i in range(capture.tasks * K):
        inner = joined[i % K].view_as(joined[i % K])
        inner.register_hook(captured.hook(i))
        aliases.append(_Alias.apply(inner))
    return (*aliases, *joined[K:])


class _Total(torch.autograd.Function):
    """The sum of the losses, and what `total` has been told of them."""

    @staticmethod
    def forward(ctx: Any, capture: _Capture, present: Sequence[bool], *losses: Tensor) -> Tensor:
        ctx.capture, ctx.present, ctx.count = capture, present, len(losses)
        return sum(losses)  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.capture.expect(ctx.present)
        return None, None, *[gradient] * ctx.count


class _Derivative(torch.autograd.Function):
    """Identity on a derivative that is part of a graph: a training backward through it trains on derivatives."""

    @staticmethod
    def forward(ctx: Any, capture: _Capture, probe: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
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
    "create_graph=True). What it brings the encoder does not pass through the aliases and cannot be aggregated. Let "
    "heads read h itself, and call method.backward(losses, shared=encoder), which is exact"
)


class _TracedNode(torch.autograd.Function):
    """`_Node` for `torch.compile`: no Python state, `info` is written as tensors."""

    @staticmethod
    def forward(ctx: Any, method: Method, tasks: int, info: Info | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.method, ctx.tasks, ctx.info, ctx.tensors = method, tasks, info, len(tensors)
        return _views(tensors, tasks, anchored=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        updates, info = aggregate_flat(ctx.method, grads, ctx.tensors)
        if ctx.info is not None:
            ctx.info.copy_(info)
        return None, None, None, *updates


def _views(tensors: Sequence[Tensor], tasks: int, anchored: bool) -> tuple[Tensor, ...]:
    """T·K views; with an anchor, a zero that depends on all of them, at the end."""
    if len(tensors) == 1 and tasks >= _MANY:
        views = tensors[0].expand(tasks, *tensors[0].shape).unbind()
    else:
        views = tuple(x.view_as(x) for _ in range(tasks) for x in tensors)
    return (*views, tensors[0].new_zeros(())) if anchored else views


def _aliases(h: Any, sources: Sequence[Tensor], outputs: Sequence[Tensor], tasks: int) -> list[Any]:
    """T structures like `h`, the sources in it replaced by their outputs (entry t·K + k)."""
    if isinstance(h, Tensor):
        return list(outputs[:tasks])

    def alias_of(t: int) -> Callable[[Tensor], Tensor]:
        row = outputs[t * len(sources) : (t + 1) * len(sources)]
        return lambda x: next((output for source, output in zip(sources, row, strict=True) if source is x), x)

    return [map_tensors(alias_of(t), h) for t in range(tasks)]


_OfTensor: TypeAlias = "Callable[[Tensor], Tensor] | None"


def _reduction(method: Method, group: Any) -> tuple[_OfTensor, _OfTensor]:
    """What turns this process's Gram into the whole batch's, and what makes a tensor the same; None for one process."""
    if group is False or group is None:
        return None, None
    if not method.on_gram:
        raise ValueError(f"global_gram: expected a method that works on the Gram matrix, got {describe(method)}")
    if method.needs_losses:
        raise ValueError(
            f"global_gram: expected a method that needs no losses (each process has others), got {method!r}"
        )
    from fastmtl import distributed  # here: not every torch is built with it

    own = distributed.gram_group(group)
    return lambda M: distributed.reduce_gram(M, own), lambda x: distributed.agree(x, own)


class _NoSecondDerivative(torch.autograd.Function):
    """Identity on the first `count` tensors, which depend on the others in a way that has no derivative."""

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
