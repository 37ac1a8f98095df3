"""`fan_out` for a model whose code cannot be edited: by module hooks on its encoder and its heads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fastmtl._inputs import describe
from fastmtl._structure import map_tensors, tensors_of
from fastmtl.hooks import FanOut, check_method, fan_out
from fastmtl.info import Info
from fastmtl.weighting._method import Method

__all__ = ["Attached", "attach"]


def attach(encoder: nn.Module, heads: Iterable[nn.Module], method: Method, **options: Any) -> Attached:
    """Puts a `fan_out` between an encoder and its heads without touching their code.

    After each forward of `encoder` its output is fanned out; when `heads[t]` is then called with it (or with a part of
    it, in any argument), it gets alias t in its place. The training loop sums its losses and calls backward as before.

    Args:
        encoder: the module whose output is the shared representation.
        heads: T modules, one a task, that are called with tensors of that output.
        method: any method of this package.
        options: passed on to `fan_out`.

    Returns:
        A handle with `info`, `gradients` and `remove()`.

    Raises:
        TypeError: `encoder` or a head is no module, or `method` is no method.
        ValueError: no head, a module twice among the heads and the encoder, weights of another length than T.
        RuntimeError: (in the forward) a head is called with no tensor of the encoder's last output.
    """
    modules = list(heads)
    for name, module in [("encoder", encoder), *((f"heads[{t}]", head) for t, head in enumerate(modules))]:
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name}: expected an nn.Module, got {describe(module)}")
    if not modules:
        raise ValueError("heads: expected at least one module, got none")
    if len({id(module) for module in (encoder, *modules)}) <= len(modules):
        raise ValueError("heads: expected one module a task and none of them the encoder, got one of them twice")
    check_method(method, len(modules))
    return Attached(encoder, modules, method, options)


class Attached:
    """What `attach` returns; holds the last fan-out until the next forward, and hooks until `remove()`."""

    def __init__(self, encoder: nn.Module, heads: list[nn.Module], method: Method, options: dict[str, Any]) -> None:
        self._tasks = len(heads)
        self._method = method
        self._options = options
        self._output: dict[int, int] = {}  # id of a tensor of the encoder's output -> which of them it is
        self._tensors: list[Tensor] = []  # those tensors, kept so that their ids stay theirs
        self._last: FanOut | None = None
        self._hooks = [encoder.register_forward_hook(self._fan_out)]
        for t, head in enumerate(heads):
            self._hooks.append(head.register_forward_pre_hook(self._swap_for(t), with_kwargs=True))

    @property
    def info(self) -> Info | None:
        """`alpha`, `gram`, `eigenvalues` and `rank` of the last backward; None before one."""
        return None if self._last is None else self._last.info

    @property
    def gradients(self) -> list[Any] | None:
        """The task gradients that the last backward captured, as `FanOut.gradients` gives them."""
        return None if self._last is None else self._last.gradients

    def total(self, losses: Iterable[Tensor]) -> Tensor:
        """`FanOut.total` of the last forward's fan-out."""
        if self._last is None:
            raise RuntimeError("attach: the encoder has not been called yet")
        return self._last.total(losses)

    def remove(self) -> None:
        """Takes all hooks off the modules and lets go of the last forward's tensors."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._forget()

    def _forget(self) -> None:
        self._last = None
        self._tensors = []
        self._output = {}

    def _fan_out(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._forget()
        self._last = fan_out(output, self._tasks, self._method, **self._options)
        self._tensors = list(tensors_of(output))
        self._output = {id(x): i for i, x in enumerate(self._tensors)}

    def _swap_for(self, t: int) -> Any:
        def swap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if self._last is None:
                raise RuntimeError(f"attach: heads[{t}] was called before the encoder")
            alias = list(tensors_of(self._last[t]))
            found = False

            def swapped(x: Tensor) -> Tensor:
                nonlocal found
                i = self._output.get(id(x))
                found |= i is not None
                return x if i is None else alias[i]

            args, kwargs = map_tensors(swapped, args), map_tensors(swapped, kwargs)
            if not found:
                raise RuntimeError(
                    f"attach: heads[{t}] was called with no tensor of the encoder's last output; what lies between "
                    "them has to be part of the encoder"
                )
            return args, kwargs

        return swap
