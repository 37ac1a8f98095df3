"""What all scalarizations share: how they are called, a loss scaler's factor, and losses that are not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl._inputs import DTYPES, describe
from fastmtl.info import Info

__all__ = ["Losses", "Scalarization", "check_number", "check_numbers", "divided"]

Losses = Tensor | Sequence[Tensor]


class Scalarization(nn.Module):
    """One differentiable scalar from T task losses, for methods that look at the losses rather than at gradients.

    Calling it gives the scalar, to be used as a loss; `backward(losses)` runs the backward pass too. State lies in
    buffers and parameters, so that `state_dict()` restores a run exactly; it changes in training mode only, not under
    `.eval()`. Nothing waits for a GPU. A loss that is not finite, or outside the method's domain, makes the result and
    its gradient NaN and leaves the state as it was. The state follows the losses it is given: where several processes
    train one model, average the losses over them first.

    Args:
        tasks: number of tasks T that is expected; None for any.

    Attributes:
        weights: the task weights of the last call, [T]: the derivative of the result with respect to each loss,
            detached; None before the first call.

    Raises:
        TypeError: `tasks` is not an int.
        ValueError: `tasks` is less than 1.
    """

    weights: Tensor | None

    def __init__(self, tasks: int | None = None) -> None:
        super().__init__()
        if tasks is not None:
            if not isinstance(tasks, int) or isinstance(tasks, bool):
                raise TypeError(f"tasks: expected an int, got {describe(tasks)}")
            if tasks < 1:
                raise ValueError(f"tasks: expected at least one task (T >= 1), got {tasks}")
        self.tasks = tasks
        self.weights = None

    def forward(self, losses: Losses, *, grad_scale: Tensor | float = 1.0) -> Tensor:
        """The scalarization f(L) of T losses.

        Args:
            losses: T scalar tensors or a tensor [T]; float32, float64, bfloat16 or float16.
            grad_scale: the factor S by which the losses come scaled, a loss scaler's: a positive number or a tensor
                with one element. The result is S · f(L / S), whose gradient is S times the one of unscaled losses, and
                what the method remembers are the unscaled losses.

        Returns:
            A scalar tensor [], float64 for float64 losses, else float32.

        Raises:
            TypeError: a loss is no floating tensor, or `grad_scale` is neither a number nor a tensor.
            ValueError: losses that are not scalars, none, another number than T, or on another device than the state;
                a `grad_scale` of several elements, or a number that is not positive and finite.
        """
        L = divided(self._stacked(losses), grad_scale)
        value, weights = self._scalarize(L)
        self.weights = weights.detach().to(L.dtype)
        valid = L.detach().isfinite().all() & value.detach().isfinite()
        if self.training:
            with torch.no_grad():
                self._remember(L.detach(), valid)
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

    def _scalarize(self, L: Tensor) -> tuple[Tensor, Tensor]:
        """The result [] and its derivative [T] for losses [T]."""
        raise NotImplementedError

    def _remember(self, L: Tensor, valid: Tensor) -> None:
        """Updates the state from detached losses [T], where `valid` (bool []) is true."""

    def _stacked(self, losses: Losses) -> Tensor:
        """The checked losses as one tensor [T] of at least float32."""
        if isinstance(losses, Tensor):
            if losses.dtype not in DTYPES:
                raise TypeError(f"losses: expected float32, float64, bfloat16 or float16, got {describe(losses)}")
            if losses.ndim != 1 or losses.shape[0] == 0:
                raise ValueError(f"losses: expected T scalars or shape [T] with T >= 1, got {describe(losses)}")
            L = losses
        else:
            L = _stack(losses)
        T = L.shape[0]
        if self.tasks is not None and self.tasks != T:
            raise ValueError(f"losses: expected {self.tasks} (the number of tasks), got {T}")
        state = next(chain(self.buffers(), self.parameters()), None)
        if state is not None and state.device != L.device:
            place = f"{state.device}, where this {type(self).__name__} is (.to(device) moves it)"
            raise ValueError(f"losses: expected losses on {place}, got {describe(L)}")
        return L.to(torch.promote_types(L.dtype, torch.float32))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def _stack(losses: Sequence[Tensor]) -> Tensor:
    if not isinstance(losses, (list, tuple)):
        raise TypeError(f"losses: expected a tensor [T] or a sequence of T scalar tensors, got {describe(losses)}")
    if not losses:
        raise ValueError("losses: expected at least one loss (T >= 1), got an empty sequence")
    for t, loss in enumerate(losses):
        if not isinstance(loss, Tensor) or loss.dtype not in DTYPES:
            raise TypeError(f"losses[{t}]: expected a floating scalar tensor, got {describe(loss)}")
        if loss.numel() != 1:
            raise ValueError(f"losses[{t}]: expected a scalar (one element), got {describe(loss)}")
        if loss.device != losses[0].device:
            raise ValueError(f"losses[{t}]: expected a loss on {losses[0].device} as losses[0], got {describe(loss)}")
    return torch.stack([loss.reshape(()) for loss in losses])


def divided(x: Tensor, grad_scale: Tensor | float) -> Tensor:
    """`x` without the factor of a loss scaler, in x's dtype."""
    S = _scalar(grad_scale)
    return x if isinstance(S, float) and S == 1.0 else (x / S).to(x.dtype)


def _scalar(grad_scale: Tensor | float) -> Tensor | float:
    if isinstance(grad_scale, Tensor):
        if grad_scale.numel() != 1:
            raise ValueError(f"grad_scale: expected a number or a tensor with one element, got {describe(grad_scale)}")
        return grad_scale.detach().reshape(())
    return check_number(grad_scale, "grad_scale", positive=True)


def check_number(value: object, name: str, positive: bool = False) -> float:
    """`value` as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite, or negative, or zero although it has to be positive.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name}: expected a finite number {'> 0' if positive else '>= 0'}, got {value!r}")
    return float(value)


def check_numbers(values: object, name: str, tasks: int | None = None, positive: bool = False) -> Tensor:
    """`values` as a float64 tensor [T] of its own.

    Raises:
        TypeError: they are no numbers.
        ValueError: they have another shape than [T] or are not finite, or not positive although they have to be.
    """
    if not isinstance(values, (Tensor, list, tuple)):
        raise TypeError(f"{name}: expected T numbers, got {describe(values)}")
    try:
        x = torch.as_tensor(values, dtype=torch.float64).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected T numbers, got {values!r}") from error
    if x.ndim != 1 or x.shape[0] == 0 or (tasks is not None and x.shape[0] != tasks):
        raise ValueError(f"{name}: expected shape [{'T' if tasks is None else tasks}], got {list(x.shape)}")
    if not bool(x.isfinite().all()) or (positive and not bool((x > 0).all())):
        raise ValueError(f"{name}: expected finite {'positive ' if positive else ''}numbers, got {x.tolist()}")
    return x
