"""The shared representation inside one ordinary backward: each task gets an alias of it, the encoder one gradient.

Aliases 1..T of a representation h carry the task gradients Z_t = ∂L_t/∂h to where they are aggregated; what comes out
goes on into the encoder in place of their sum (paper, section 5.2, Aligned-MTL-UB). Two implementations, equal to each
other: one autograd node with T outputs, which is told all gradients at once, or tensor hooks alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastmtl._inputs import DTYPES, describe, requires_grad_outside, transforming
from fastmtl._structure import map_tensors, tensors_of
from fastmtl.info import Info
from fastmtl.weighting._context import Context, check_scale
from fastmtl.weighting._method import Method

__all__ = ["FanOut", "check_method", "fan_out"]

_VIAS = ("node", "hooks")
_MANY = 16  # tasks from which on one `unbind` is faster than so many views


def fan_out(
    h: Any,
    tasks: int,
    method: Method,
    *,
    via: str = "node",
    info: Info | None = None,
    global_gram: Any = False,
    grad_scale: Tensor | float | None = None,
) -> FanOut:
    """T aliases of a shared representation, one for each task's head, for aggregation in one ordinary backward.

        hs = fan_out(h, tasks=T, method=method)
        sum(loss(head(h_t)) for head, h_t in zip(heads, hs)).backward()

    The gradients that the aliases receive are captured where they lie and aggregated by `method`, and the encoder gets
    the single result instead of their sum: the upper bound of paper, section 5.2. Task weights come from `method`, so
    the losses are summed plainly; a mean over them would apply 1/T twice.

    A task whose loss does not reach its alias counts as a zero row, and an alias that is used several times gets the
    sum. A second backward over a retained graph must bring gradients of the same tasks as the first. Where no gradient
    is recorded (`torch.no_grad()`, or an `h` that does not require grad) the aliases are `h` itself.

    Args:
        h: the representation: a tensor (float32, float64, bfloat16 or float16), or a nested list, tuple, dict or
            dataclass of tensors; their gradients are one row of G together. Tensors that do not require grad, and
            whatever is no tensor, are passed on as they are.
        tasks: number of tasks T.
        method: any method of this package.
        via: "node", one autograd node (faster), or "hooks", `register_hook` on each alias and on what they come from;
            the results are the same.
        info: buffers to write into, from `Info(T)`: needed inside `torch.compile`, where nothing but tensors can leave
            a backward.
        global_gram: True (all processes) or a process group, for data parallelism: the weights come from the Gram of
            the whole batch, so that averaging the encoder's gradients over processes gives what one process would get.
            Each process's losses have to be means over its part of the batch, and summed by `hs.total(losses)`.
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
        NotImplementedError: `h` requires grad outside of a transform of `torch.func`, but not within it.
        RuntimeError: (in the backward) the tasks that bring a gradient are not those of the first backward, or the
            method needs losses and `total` was not called.
    """
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
    if torch.compiler.is_compiling():
        if reduce is not None or grad_scale is not None or method._needs_losses or method._remembers:
            raise ValueError(
                "fan_out: global_gram, grad_scale, methods that need the losses and methods with state are not "
                "available inside torch.compile; call fan_out outside"
            )
        outputs = _TracedNode.apply(method, tasks, info, *sources)
        return FanOut(_aliases(h, sources, outputs, tasks), None, info, None)
    capture = _Capture(method, tasks, sources, info, reduce, Context(None, grad_scale, agree))
    outputs = (_Node.apply if via == "node" else _with_hooks)(capture, *sources)
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
    method._check_tasks(tasks)


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

    def total(self, losses: Iterable[Tensor]) -> Tensor:
        """The plain sum of the losses, tied to the aliases even where no loss uses one.

        With `global_gram` every process has to take part in the backward of the representation, also one that has no
        example for any task: the others would wait for it. Methods that need the losses take them from here.

        Args:
            losses: scalars: one for each task where the method needs them, else any number of them.

        Raises:
            ValueError: no loss, or not T of them where the method needs them.
        """
        parts = list(losses)
        if self._capture is not None and self._capture.method._needs_losses:
            self._capture.take(parts)
        if self._anchor is not None:
            parts.append(self._anchor)
        if not parts:
            raise ValueError("losses: expected at least one loss, got none")
        return sum(parts[1:], parts[0])

    def __repr__(self) -> str:
        return f"FanOut({len(self)} x {describe(self._aliases[0])})"


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
    ) -> None:
        self.method = method
        self.context = context
        self.tasks = tasks
        self.tensors = len(sources)
        self.buffers = info
        self.reduce = reduce
        self.info = info
        self.gradients: Sequence[Tensor | None] | None = None
        self._sources = [x.detach() for x in sources] if reduce is not None else []

    def take(self, losses: Sequence[Tensor]) -> None:
        """Keeps the losses for the method. They are not scaled yet: that is done to their sum."""
        self.context = self.context._replace(losses=self.method._context(losses, self.tasks).losses)

    def aggregate(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """K gradients for the encoder from the T·K that were captured (entry t·K + k)."""
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
            updates, info = self.method._aggregate_part(grads, self._sources, self.reduce, self.context)
        elif any(g is not None for g in grads):
            if self.method._needs_losses and self.context.losses is None:
                raise RuntimeError(
                    f"fan_out: {self.method!r} needs the losses: sum them by the fan-out's total(losses)"
                )
            updates, info = self.method._aggregate_flat(grads, self.tensors, None, self.context)
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


class _Node(torch.autograd.Function):
    """K tensors -> T·K views of them (entry t·K + k); backward aggregates."""

    @staticmethod
    def forward(ctx: Any, capture: _Capture, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.capture = capture
        return _views(tensors, capture.tasks, anchored=capture.reduce is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        capture = ctx.capture
        return None, *capture.aggregate(grads[: capture.tasks * capture.tensors])


class _Join(torch.autograd.Function):
    """K tensors -> K views of them, of one node: hooks of these run when the gradients of all K have arrived."""

    @staticmethod
    def forward(ctx: Any, anchored: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        # Zeros where no task here brings a gradient: other processes wait for what this one's encoder gets.
        ctx.set_materialize_grads(anchored)
        ctx.tensors = len(tensors)
        return _views(tensors, 1, anchored)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *grads[: ctx.tensors]


def _with_hooks(capture: _Capture, *tensors: Tensor) -> tuple[Tensor, ...]:
    """What `_Node.apply` does, by `register_hook` alone: a hook on each alias captures, one on h replaces their sum."""
    joined = _Join.apply(capture.reduce is not None, *tensors)
    K, count = capture.tensors, capture.tasks * capture.tensors
    captured: dict[int, Tensor | None] = {}
    updates: list[Tensor | None] = []
    running = replaced = -1  # the backwards that these are of: one that failed half-way has left something behind

    def capture_as(i: int) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            nonlocal running
            current = torch._C._current_graph_task_id()
            if current != running:
                captured.clear()
                running = current
            captured[i] = gradient

        return hook

    def replace_by(k: int) -> Callable[[Tensor | None], Tensor | None]:
        def hook(total: Tensor | None) -> Tensor | None:
            nonlocal replaced
            current = torch._C._current_graph_task_id()
            if current != replaced:  # the first of these hooks, and all gradients are there
                if current != running:
                    captured.clear()
                updates[:] = capture.aggregate([captured.pop(i, None) for i in range(count)])
                replaced = current
            # What did not come cannot be replaced; nor is the anchor.
            if total is None or k == K:
                return None
            update, updates[k] = updates[k], None
            return update

        return hook

    aliases: list[Tensor] = []
    for i in range(count):
        inner = joined[i % K].view_as(joined[i % K])
        inner.register_hook(capture_as(i))
        aliases.append(inner.view_as(inner))  # hooks of the user, on this one, come before ours, as with the node
    for k, x in enumerate(joined):
        x.register_hook(replace_by(k))
    return (*aliases, *joined[K:])


class _TracedNode(torch.autograd.Function):
    """`_Node` for `torch.compile`: no Python state, `info` is written as tensors."""

    @staticmethod
    def forward(ctx: Any, method: Method, tasks: int, info: Info | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.method, ctx.tasks, ctx.info, ctx.tensors = method, tasks, info, len(tensors)
        return _views(tensors, tasks, anchored=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        updates, info = ctx.method._aggregate_flat(grads, ctx.tensors)
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
    if not method._on_gram:
        raise ValueError(f"global_gram: expected a method that works on the Gram matrix, got {describe(method)}")
    if method._needs_losses:
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
