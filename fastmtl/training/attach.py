"""`fan_out` for a model whose code cannot be edited: by module hooks on its encoder and its heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl import once
from fastmtl.info import Info
from fastmtl.inputs import describe
from fastmtl.losses import Losses
from fastmtl.rule import Rule, checked_scale
from fastmtl.structure import map_tensors, tensors_of
from fastmtl.training.fan_out import FanOut, Via, check_arguments, place
from fastmtl.training.watch import watch_for_heads

__all__ = ["Attached", "attach"]


def attach(
    encoder: nn.Module,
    heads: Iterable[nn.Module] | Mapping[str, nn.Module] | nn.ModuleDict,
    method: Rule,
    *,
    via: Via = "node",
    info: Info | None = None,
    process_group: Any = None,
    grad_scale: Tensor | float | None = None,
) -> Attached:
    """Puts a `fan_out` between an encoder and its heads without touching their code.

    When `heads[t]` is called with the output of `encoder` (or with a part of it, in any argument), it gets alias t in
    its place. The training loop calls backward once on the sum of its losses, as before, or on `handle.total(losses)`.

        with fastmtl.attach(model.encoder, model.heads, method) as handle:
            for batch in loader: ...

    A forward pass without gradients is unaffected. Copies of the modules (`copy.deepcopy`, averaged models), including
    those that are saved or sent to another process, are ordinary modules; training one without an attachment of its own
    warns once.

    Args:
        encoder: the module whose output is the shared representation.
        heads: T modules, one per task, that are called with tensors of that output. The keys of a dict or an
            `nn.ModuleDict` are the tasks' names: `handle.total({"seg": ..., "depth": ...})`.
        method: any method of this package.
        via: as in `fan_out`.
        info: as in `fan_out`.
        process_group: as in `fan_out`.
        grad_scale: as in `fan_out`, for all steps.

    Returns:
        A handle with `info`, `gradients`, `total` and `remove()`. As a context manager it removes itself at the end.

    Raises:
        TypeError: `encoder` or a head is not a module, or `method` is not a method.
        ValueError: no head, a module that occurs twice among heads and encoder, one that already has an attachment,
            weights of another length than T, and as `fan_out`.
        RuntimeError: (in the forward) a head is called with no tensor of the encoder's last output.
    """
    if isinstance(heads, (Mapping, nn.ModuleDict)):
        names = tuple(heads) if all(isinstance(key, str) for key in heads) else None
        named = [(f"heads[{key!r}]", head) for key, head in heads.items()]
    elif isinstance(heads, Iterable):
        named = [(f"heads[{t}]", head) for t, head in enumerate(heads)]
        names = None
    else:
        raise TypeError(f"heads: expected T modules, one a task, got {describe(heads)}")
    for name, module in [("encoder", encoder), *named]:
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name}: expected an nn.Module, got {describe(module)}")
        hooks = module._forward_hooks if module is encoder else module._forward_pre_hooks
        if any(isinstance(hook, _Hook) for hook in hooks.values()):
            raise ValueError(
                f"{name}: expected a module with nothing attached; call remove() on the other handle first"
            )
    if not named:
        raise ValueError("heads: expected at least one module, got none")
    modules = [head for _, head in named]
    if len({id(module) for module in (encoder, *modules)}) <= len(modules):
        raise ValueError("heads: expected one module a task and none of them the encoder, got one of them twice")
    check_arguments(names or len(modules), method, via, info)
    options = {"via": via, "info": info, "process_group": process_group, "grad_scale": checked_scale(grad_scale)}
    return Attached(encoder, named, names, method, options)


class _Output:
    """What one forward of the encoder returned, and its fan-out once a head is called with it."""

    def __init__(self, structure: Any) -> None:
        self.structure = structure
        self.tensors = list(tensors_of(structure))  # kept alive so that their ids stay valid
        self.number = {id(x): i for i, x in enumerate(self.tensors)}
        self.fan: FanOut | None = None
        self.called = [False]  # whether a head was called with it, for a hook that must not hold this object

    def holds(self, x: Tensor) -> bool:
        return id(x) in self.number


class Attached:
    """What `attach` returns; it keeps its hooks until `remove()`, and the last fan-out until the next one.

    Attributes:
        names: the tasks' names, which are the keys of the heads; None if there are none.
    """

    def __init__(
        self,
        encoder: nn.Module,
        heads: list[tuple[str, nn.Module]],
        names: tuple[str, ...] | None,
        method: Rule,
        options: dict[str, Any],
    ) -> None:
        self.names = names
        self._heads = [name for name, _ in heads]
        self._method = method
        self._options = options
        self._site = once.caller()
        self._last: _Output | None = None  # of the last forward that recorded a graph
        # Of a forward that did not: an evaluation, or a reentrant checkpoint, outside of which there is a graph. Or of
        # one within a backward, where a checkpoint repeats a forward.
        self._beside: _Output | None = None
        self._hooks = [encoder.register_forward_hook(_Hook(self._keep))]
        for t, (_, head) in enumerate(heads):
            self._hooks.append(head.register_forward_pre_hook(_Hook(self._swap, t), with_kwargs=True))

    @property
    def info(self) -> Info | None:
        """What the last backward saw and did; None before the first."""
        fan = self._fan
        return None if fan is None else fan.info

    @property
    def gradients(self) -> list[Any] | None:
        """The task gradients that the last backward captured, as `FanOut.gradients` gives them."""
        fan = self._fan
        return None if fan is None else fan.gradients

    def total(self, losses: Losses) -> Tensor:
        """`FanOut.total` of the last forward's fan-out."""
        output = self._last or self._beside
        if output is None:
            raise RuntimeError("attach: the encoder has not been called yet")
        return self._fanned(output).total(losses)

    def remove(self) -> None:
        """Removes all hooks from the modules and releases the tensors of the last forward pass."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._last = self._beside = None

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        # A copy is attached to nothing, as the modules' copies have no hooks.
        return {"names": self.names, "_heads": self._heads, "_last": None, "_beside": None, "_hooks": []}

    @property
    def _fan(self) -> FanOut | None:
        return None if self._last is None else self._last.fan

    def _fanned(self, output: _Output) -> FanOut:
        if output.fan is None:
            tasks = self.names or len(self._heads)
            output.fan = place(output.structure, tasks, self._method, self._site, **self._options)
            output.called[0] = True
            if output is self._beside and output.fan.aggregates and self._may_follow():
                self._last, self._beside = output, None
        return output.fan

    def _may_follow(self) -> bool:
        """Whether a fan-out made now belongs to a later step than the last one.

        Within a backward it does if the last one's backward is over: then a reentrant checkpoint around the whole model
        is running its forward. Otherwise a checkpoint is repeating the last one.
        """
        running = torch._C._current_graph_task_id()
        return running == -1 or self._fan is None or self._fan.over(running)

    def _keep(self, module: nn.Module, arguments: Any, structure: Any) -> None:
        output = _Output(structure)
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            self._beside = output
            return
        self._last, self._beside = output, None
        if once.due("attach", self._site):
            x = next((x for x in output.tensors if x.requires_grad and not x.is_leaf), None)
            if x is not None:
                x.register_hook(watch_for_heads(output.called, self._site, self._heads))

    def _swap(self, t: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return None
        if self._last is None and self._beside is None:
            raise RuntimeError(f"attach: {self._heads[t]} was called before the encoder")
        given = [*tensors_of(args), *tensors_of(kwargs)]
        output = next((o for o in (self._beside, self._last) if o is not None and any(map(o.holds, given))), None)
        if output is None:
            raise RuntimeError(
                f"attach: {self._heads[t]} was called with no tensor of the encoder's last output; anything between "
                "them has to be part of the encoder, and a checkpoint around the head needs use_reentrant=False"
            )
        alias = list(tensors_of(self._fanned(output)[t]))

        def swapped(x: Tensor) -> Tensor:
            i = output.number.get(id(x))
            return x if i is None else alias[i]

        return map_tensors(swapped, args), map_tensors(swapped, kwargs)


class _Hook:
    """A module hook of one handle. Its copies, also when saved, do nothing but warn."""

    def __init__(self, call: Any, *first: Any) -> None:
        self._call = call
        self._between = torch.compiler.disable(call)  # runs between graphs: ids of tensors cannot be compiled
        self._first = first

    def __call__(self, *arguments: Any) -> Any:
        call = self._between if torch.compiler.is_compiling() else self._call
        return call(*self._first, *arguments)

    def __deepcopy__(self, memo: Any) -> Any:
        return _nothing if self._first else _look_at_copy

    def __reduce__(self) -> Any:
        return _again, (not self._first,)


def _again(of_encoder: bool) -> Any:
    return _look_at_copy if of_encoder else _nothing


def _nothing(*_: Any) -> None:
    pass


def _look_at_copy(module: nn.Module, *_: Any) -> None:
    """The hook of an encoder's copy: warns if the copy is trained without an attachment."""
    trains = module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if trains and not any(isinstance(hook, _Hook) for hook in module._forward_hooks.values()):
        once.warn(
            "copy",
            once.caller(),
            f"attach: this {type(module).__name__} is a copy of an encoder that heads were attached to, by copying or "
            "from a file or another process; nothing is attached to the copy, so its gradients are not aggregated",
        )
