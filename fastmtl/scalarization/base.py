"""What all scalarizations share: their call, absent tasks, a loss scaler's factor, losses out of the domain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.info import Info
from fastmtl.inputs import DTYPES, describe, has_numbers
from fastmtl.options import check_number, integer, option

__all__ = ["Losses", "Scalarization", "divided", "masked", "number_of", "present"]

Losses = Tensor | Sequence[Tensor | None]


class Scalarization(nn.Module):
    """One differentiable scalar from T task losses, for methods that look at the losses rather than at gradients.

    Calling it gives the scalar, to be used as a loss; `backward(losses)` runs the backward pass too. State lies in
    buffers and parameters, so that `state_dict()` restores a run exactly; it changes in training mode only, not under
    `.eval()`. Nothing waits for a GPU. The state follows the losses it is given: where several processes train one
    model, average the losses over them first.

    A task is absent if its loss is None, or needs no gradient beside others that do. The scalar is then that of the
    others, its task weight is 0, default weights stay 1/T, and what the method remembers of it stays as it was.

    A loss that is not finite makes the result and its gradient NaN and leaves the state as it was, so that a loss
    scaler skips the step. So does one outside of the method's domain, where losses lie on a GPU; on the CPU that is a
    ValueError.

    Args:
        tasks: number of tasks T that is expected; None for any.

    Attributes:
        weights: the task weights of the last call, [T]: the derivative of the result with respect to each loss,
            detached; None before the first call.

    Raises:
        TypeError: `tasks` is not an int.
        ValueError: `tasks` is less than 1.
    """

    tasks: int | None = option(integer(1, optional=True), fixed=True)
    weights: Tensor | None

    def __init__(self, tasks: int | None = None) -> None:
        super().__init__()
        self.tasks = tasks
        self.weights = None

    def forward(self, losses: Losses, *, grad_scale: Tensor | float = 1.0) -> Tensor:
        """The scalarization f(L) of T losses.

        Args:
            losses: T scalar tensors, None for those of absent tasks, or a tensor [T]; float32, float64, bfloat16 or
                float16.
            grad_scale: the factor S by which the losses come scaled, a loss scaler's: a positive number or a tensor
                with one element. The result is S · f(L / S), whose gradient is S times the one of unscaled losses, and
                what the method remembers are the unscaled losses.

        Returns:
            A scalar tensor [], float64 for float64 losses, else float32.

        Raises:
            TypeError: a loss is no floating tensor, or `grad_scale` is neither a number nor a tensor.
            ValueError: losses that are not scalars, none, another number than T, on another device than the state, or
                (on the CPU) outside of the method's domain; a `grad_scale` of several elements, or a number that is not
                positive and finite.
        """
        L, here = self._stacked(losses)
        L = divided(L, grad_scale)
        valid = L.detach().isfinite().all() & self._within(L.detach())
        value, weights = self._scalarize(L, here)
        self.weights = weights.detach().to(L.dtype)
        valid = valid & value.detach().isfinite()
        if self.training:
            with torch.no_grad():
                self._remember(L.detach(), valid if here is None else valid & here)
        # A factor, not a choice: it makes the gradient NaN as well, so that a loss scaler skips the step.
        return (value * torch.where(valid, 1.0, math.nan) * _scalar(grad_scale)).to(L.dtype)

    def backward(self, losses: Losses, *args: Any, retain_graph: bool = False, **options: Any) -> Info:
        """The backward pass of `self(losses, ...)`, to stand where another method's `backward` stands.

        Args:
            losses: as in `forward`.
            *args: further arguments of `forward`.
            retain_graph: keep the graph for another backward.
            **options: keyword arguments of `forward`.

        Returns:
            An info with `alpha`, the task weights.

        Raises:
            TypeError: as `forward`.
            ValueError: as `forward`.
        """
        result: Tensor = self(losses, *args, **options)
        result.backward(retain_graph=retain_graph)
        assert self.weights is not None  # set by forward
        return Info.of(alpha=self.weights.to(torch.float64))

    def reset(self) -> None:
        """Back to the state of a new instance."""

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[Tensor, Tensor]:
        """The result [] and its derivative [T] for losses [T].

        `here` [T], bool, says which tasks are there; None for all. The loss of another is 1, a constant.
        """
        raise NotImplementedError

    def _remember(self, L: Tensor, valid: Tensor) -> None:
        """Updates the state from detached losses [T], where `valid` (bool, [] or [T]) is true."""

    def _outside(self, L: Tensor) -> Tensor | None:
        """Which losses [T] are outside of the method's domain, bool; None where any are good."""
        return None

    def _needs(self, t: int) -> str:
        """What the domain is for task t, for messages."""
        raise NotImplementedError

    def _within(self, L: Tensor) -> Tensor | bool:
        """Whether all finite ones of detached losses [T] are in the domain.

        Raises:
            ValueError: one is not, where that can be seen without waiting for a device.
        """
        outside = self._outside(L)
        if outside is None:
            return True
        outside = outside & L.isfinite()
        if has_numbers(L) and bool(outside.any()):
            t = outside.tolist().index(True)
            raise ValueError(f"losses[{t}]: expected {self._needs(t)}, got {L[t].item():.6g}")
        return ~outside.any()

    def _stacked(self, losses: Losses) -> tuple[Tensor, Tensor | None]:
        """The checked losses as one tensor [T] of at least float32, and which tasks are there (see `_scalarize`)."""
        here = None
        if isinstance(losses, Tensor):
            if losses.dtype not in DTYPES:
                raise TypeError(f"losses: expected float32, float64, bfloat16 or float16, got {describe(losses)}")
            if losses.ndim != 1 or losses.shape[0] == 0:
                raise ValueError(f"losses: expected T scalars or shape [T] with T >= 1, got {describe(losses)}")
            L = losses
        else:
            L, here = _stack(losses)
        T = L.shape[0]
        if self.tasks is not None and self.tasks != T:
            raise ValueError(
                f"losses: expected {self.tasks} (the number of tasks), got {T}; "
                "pass None for a task that is absent, so that the others keep their places"
            )
        state = next(chain(self.buffers(), self.parameters()), None)
        if state is not None and state.device != L.device:
            place = f"{state.device}, where this {type(self).__name__} is (.to(device) moves it)"
            raise ValueError(f"losses: expected losses on {place}, got {describe(L)}")
        return L.to(torch.promote_types(L.dtype, torch.float32)), here

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def masked(x: Tensor, here: Tensor | None, other: float = 0.0) -> Tensor:
    """`x` [T], with `other` for absent tasks."""
    return x if here is None else torch.where(here, x, other)


def number_of(L: Tensor, here: Tensor | None) -> Tensor | int:
    """How many of T tasks are there."""
    return L.shape[0] if here is None else here.sum()


def present(losses: Sequence[Tensor | None]) -> list[bool]:
    """Which tasks are there: all whose loss needs a gradient; where none does, as in an evaluation, all with a loss."""
    learning = [loss is not None and loss.requires_grad for loss in losses]
    return learning if any(learning) else [loss is not None for loss in losses]


def _stack(losses: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    if not isinstance(losses, (list, tuple)):
        raise TypeError(f"losses: expected a tensor [T] or a sequence of T scalar tensors, got {describe(losses)}")
    if not losses:
        raise ValueError("losses: expected at least one loss (T >= 1), got an empty sequence")
    first = None
    for t, loss in enumerate(losses):
        if loss is None:
            continue
        if not isinstance(loss, Tensor) or loss.dtype not in DTYPES:
            raise TypeError(f"losses[{t}]: expected a floating scalar tensor or None, got {describe(loss)}")
        if loss.numel() != 1:
            raise ValueError(f"losses[{t}]: expected a scalar (one element), got {describe(loss)}")
        if first is None:
            first = t, loss
        elif loss.device != first[1].device:
            raise ValueError(
                f"losses[{t}]: expected a loss on {first[1].device} as losses[{first[0]}], got {describe(loss)}"
            )
    if first is None:
        raise ValueError(f"losses: expected at least one task that is there, got None for all {len(losses)}")
    there = present(losses)
    one, none = first[1].new_ones(()), first[1].new_zeros((), dtype=torch.bool)
    L = torch.stack([loss.reshape(()) if here else one for loss, here in zip(losses, there, strict=True)])
    # Made on the device, not copied there, for which the host would wait.
    return L, None if all(there) else torch.stack([~none if here else none for here in there])


def divided(x: Tensor, grad_scale: Tensor | float) -> Tensor:
    """`x` without the factor of a loss scaler, in x's dtype."""
    S = _scalar(grad_scale)
    return x if isinstance(S, float) and S == 1.0 else (x / S).to(x.dtype)


def _scalar(grad_scale: Tensor | float) -> Tensor | float:
    if isinstance(grad_scale, Tensor):
        if grad_scale.numel() != 1:
            raise ValueError(f"grad_scale: expected a number or a tensor with one element, got {describe(grad_scale)}")
        return grad_scale.detach().reshape(())
    S = check_number(grad_scale, "grad_scale", above=0)
    assert S is not None
    return S
