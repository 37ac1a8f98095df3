"""A method's steps inside a trainer that owns the loop: what the Lightning and transformers integrations share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fastmtl.info import Info
from fastmtl.inputs import describe
from fastmtl.losses import Losses, check_losses, names_of, present_losses
from fastmtl.methods.base import Method
from fastmtl.observe import diagnostics
from fastmtl.scalarization.base import Scalarization
from fastmtl.training.accumulate import Accumulator
from fastmtl.training.parameters import are_plain, checked_parameters

__all__ = ["Groups", "Shared", "Steps"]

# What is shared: names of one or several submodules, a function of the model, or what `Method.backward` takes.
Shared: TypeAlias = "str | Sequence[str] | nn.Module | Iterable[Tensor] | Callable[[Any], Any] | None"
Groups: TypeAlias = "Sequence[Shared] | Callable[[Any], Sequence[Any]] | None"

# What may accompany the losses, for another kind of backward.
_WAYS = ("representation", "features")


class Steps:
    """From the losses of a trainer's step to `.grad`.

    The trainer gets the sum of the losses, multiplies it by whatever it likes (a loss scaler's factor, one over the
    number of micro-batches) and runs its backward; instead, the backward here multiplies each loss by the same factor.

    Args:
        method: any method, on gradients or on losses.
        shared: the shared parameters.
        groups: parts of them that are aggregated separately, each given like `shared`, or a function of the model that
            returns them; None for none.
        options: `every`, `engine` and `scale_heads` of `Method.backward`.
        process_group: as there; None means True if there are several processes.
        accumulate: whether the micro-batches of a step are summed before aggregation.

    Attributes:
        info: what the method saw and did in the last step.
    """

    def __init__(
        self,
        method: Method | Scalarization,
        shared: Shared,
        groups: Groups,
        options: Mapping[str, Any],
        process_group: Any,
        accumulate: bool,
    ) -> None:
        if not isinstance(method, (Method, Scalarization)):
            raise TypeError(f"method: expected a method of fastmtl, got {describe(method)}")
        if isinstance(method, Scalarization) and options["every"] != 1:
            raise ValueError(f"every: expected 1 for {method!r}, whose step is one pass, got {options['every']!r}")
        self.method = method
        self.info: Info | None = None
        # A generator's parameters are needed in every step.
        self._shared: Any = list(shared) if isinstance(shared, Iterator) else shared
        self._groups: Any = groups
        self._options = dict(options)
        self._process_group = process_group
        self._accumulate = accumulate
        self.reset()

    def reset(self) -> None:
        """Forgets an unfinished step."""
        self._pending: _Pending | None = None
        self._accumulator: Accumulator | None = None

    def total(self, output: Any, where: str) -> Tensor:
        """The sum of the losses that the user's function returned, which are kept until its backward.

        Args:
            output: `{"losses": ...}`, with or without "representation" or "features".
            where: the name of the function, for messages.

        Raises:
            ValueError: `output` is something else.
        """
        if not isinstance(output, Mapping) or "losses" not in output:
            got = f"a dict with {', '.join(map(repr, output))}" if isinstance(output, Mapping) else describe(output)
            raise ValueError(f"{where}: expected a dict with 'losses', got {got}")
        losses = output["losses"]
        given = check_losses(losses, names=names_of(losses))
        if torch.is_grad_enabled():
            given = present_losses(given)
        there = [loss.reshape(()) for loss in given if loss is not None]
        # Without losses here, another process may have some.
        total = (
            torch.stack([loss.to(there[0].device) for loss in there]).sum()
            if there
            else torch.zeros((), requires_grad=torch.is_grad_enabled())
        )
        if total.requires_grad:
            self._pending = _Pending(losses, total, {way: output[way] for way in _WAYS if way in output})
        return total

    @property
    def pending(self) -> bool:
        """Whether there is a sum whose backward is still to come."""
        return self._pending is not None

    def backward(
        self, scaled: Tensor, model: nn.Module, *, grad_scale: Tensor | None, within: bool, pieces: int, several: bool
    ) -> None:
        """Runs the backward of the losses, each multiplied by the factor from their sum to `scaled`.

        Args:
            scaled: the sum times a factor.
            model: the module that `shared` refers to.
            grad_scale: the loss scaler's part of the factor, [].
            within: whether this step has more micro-batches to come.
            pieces: how many micro-batches a step has.
            several: whether there are several processes.
        """
        assert self._pending is not None
        (losses, total, where), self._pending = self._pending, None
        (factor,) = torch.autograd.grad(scaled, total)
        losses = _times(losses, factor)
        if self._groups is not None:
            groups = self._groups
            if callable(groups) and not isinstance(groups, nn.Module):
                groups = groups(model)
            where["groups"] = [self._named(model, part) for part in groups]
        elif self._shared is not None and "representation" not in where:
            where["shared"] = self._named(model, self._shared)
        if isinstance(self.method, Scalarization):
            self.info = self.method.backward(losses, grad_scale=grad_scale, **where)
            return
        group = self._group(model, where, several)
        if pieces == 1 or not self._accumulate:
            where |= self._options
            self.info = self.method.backward(losses, process_group=group, grad_scale=grad_scale, **where)
            return
        named = where.pop("shared", None), where.pop("groups", None)
        if self._accumulator is None:
            self._accumulator = self._accumulating(self.method, *named, group)
        self._accumulator.add(losses, **where)
        if not within:
            self.info = self._accumulator.backward(grad_scale=grad_scale)

    def numbers(self, prefix: str) -> dict[str, float]:
        """The last step's `Info.as_dict()` and `conflicts`, for a log; the host waits for the device."""
        info = self.info
        if info is None:
            return {}
        numbers = info.as_dict()
        if info.gram is not None and info.gram.shape[-1] > 1:
            numbers["conflicts"] = float(diagnostics.conflicts(info).mean())
        return {prefix + name: x for name, x in numbers.items()}

    def _accumulating(self, method: Method, shared: Any, groups: Any, group: Any) -> Accumulator:
        options = dict(self._options)
        scale_heads = bool(options.pop("scale_heads", False))
        for name, value in options.items():
            if value not in (1, "full"):
                raise ValueError(
                    f"{name}: expected its default where micro-batches are accumulated, got {value!r}; "
                    "accumulate=False aggregates each by itself"
                )
        return method.accumulate(shared, groups=groups, scale_heads=scale_heads, process_group=group)

    @staticmethod
    def _named(model: nn.Module, shared: Any) -> Any:
        if isinstance(shared, str):
            return model.get_submodule(shared)
        if isinstance(shared, nn.Module):
            return shared
        if callable(shared):
            return shared(model)
        parts = list(shared)
        names = [part for part in parts if isinstance(part, str)]
        if names and len(names) == len(parts):
            return nn.ModuleList(model.get_submodule(name) for name in names)
        return parts

    def _group(self, model: nn.Module, where: Mapping[str, Any], several: bool) -> Any:
        if self._process_group is not None or not several:
            return self._process_group
        # For shards, the passes themselves average.
        return True if are_plain(checked_parameters(where.get("shared") or model)) else None


class _Pending(NamedTuple):
    """Losses whose backward is still to come, their sum, and what else `backward` takes."""

    losses: Any
    total: Tensor
    where: dict[str, Any]


def _times(losses: Losses, factor: Tensor) -> Any:
    """The losses times a factor, in the same form."""
    if isinstance(losses, Tensor):
        return losses * factor.to(losses.dtype)
    if isinstance(losses, Mapping):
        return dict(zip(losses, _times(list(losses.values()), factor), strict=True))
    return [None if loss is None else loss * factor.to(loss.dtype) for loss in losses]
