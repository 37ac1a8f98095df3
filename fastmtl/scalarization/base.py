"""What all scalarizations share: the call, absent tasks, a loss scaler's factor, losses outside the domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fastmtl.info import Info
from fastmtl.inputs import describe, has_numbers, transforming
from fastmtl.losses import Losses, check_losses, is_whole, names_of, stack_losses
from fastmtl.options import integer, option
from fastmtl.rule import MethodModule, checked_scale

__all__ = ["Derivative", "Scalarization", "chosen", "divided", "masked", "number_of", "present"]

_WIDE = (torch.float32, torch.float64)

# Of a scalarization with respect to losses [T], as a function of them that is differentiable itself: [T].
Derivative: TypeAlias = Callable[[Tensor], Tensor]


class Scalarization(MethodModule):
    """One differentiable scalar from T task losses, for methods that use the losses rather than gradients.

    Calling the method returns the scalar, to be used as a loss. `backward(losses)` also runs the backward pass, and can
    replace another method's `backward`; with `fan_out(h, T, method)` the scalar is `total(losses)`. State is kept
    in buffers and parameters, so `state_dict()` restores a run exactly. It changes only in training mode, not
    under `.eval()`. Nothing waits for a GPU. The state depends on the losses passed: if several processes train
    one model, average the losses over them first.

    A task is absent if its loss is None, or requires no gradient while others do. The scalar is then that of the
    others, its task weight is 0, default weights stay 1/T, and the method's state for this task stays as it was.

    A loss that is not finite makes the result and its gradient NaN and leaves the state as it was, so a loss
    scaler skips the step. On a GPU, so does a loss outside the method's domain; on the CPU that is a
    ValueError.

    Args:
        tasks: expected number of tasks T; None for any.

    Attributes:
        last_weights: the task weights of the last call, [T]: the derivative of the result with respect to each loss,
            detached; None before the first call.
        names: the tasks' names, once losses have been passed by name; later losses are sorted into this order.

    Raises:
        TypeError: `tasks` is not an int.
        ValueError: `tasks` is less than 1.
    """

    on_losses: bool = True
    on_gram: bool = False
    needs_losses: bool = True
    remembers: bool = True

    tasks: int | None = option(integer(1, optional=True), fixed=True)
    names: tuple[str, ...] | None
    _positive: ClassVar[bool | None] = None  # whether losses have to be > 0; or >= 0 (False), or may be any (None)
    _one_node: ClassVar[bool] = False  # whether the graph has the result's derivative in place of its operations
    _weights: Tensor | Callable[[], Tensor] | None

    def __init__(self, tasks: int | None = None) -> None:
        super().__init__()
        self.tasks = tasks
        self.last_weights = None

    @property
    def last_weights(self) -> Tensor | None:
        """See the attributes."""
        weights = self._weights
        if weights is not None and not isinstance(weights, Tensor):
            weights = self._weights = weights().detach()
        return weights

    @last_weights.setter
    def last_weights(self, value: Tensor | None) -> None:
        self._weights = value

    def forward(self, losses: Losses, *, grad_scale: Tensor | float | None = None) -> Tensor:
        """The scalarization f(L) of T losses.

        Args:
            losses: T scalar tensors (a list, a tuple, or a dict by task), None for absent tasks, or a tensor
                [T]; float32, float64, bfloat16 or float16.
            grad_scale: the factor S by which a loss scaler has multiplied the losses: a positive number or a tensor
                with one element. The result is S · f(L / S), whose gradient is S times that of unscaled losses; the
                method remembers unscaled losses.

        Returns:
            A scalar tensor [], float64 for float64 losses, else float32.

        Raises:
            TypeError: a loss is not a floating tensor, or `grad_scale` is neither a number nor a floating tensor.
            ValueError: losses that are not scalars, are not T (or none at all), are on another device than the state,
                or (on the CPU) outside the method's domain; a `grad_scale` of several elements, or a number that is
                not positive and finite.
        """
        S = checked_scale(grad_scale)
        L, here = self._stacked(losses)
        L = divided(L, S)
        fixed = L.detach()
        numbers: list[float] | None = fixed.tolist() if has_numbers(fixed) else None
        known = numbers is not None and self._inside(numbers)
        within = True if known else self._within(fixed, here)
        value, weights = self._valued(L, here)
        if isinstance(weights, Tensor):
            self._weights = weights.detach().to(L.dtype)
        elif torch.compiler.is_compiling():
            self._weights = weights(fixed)
        else:
            self._weights = partial(weights, fixed)
        valid = here
        # Sums that leave the range of numbers count as not finite.
        if not known or numbers is None or not math.isfinite(sum(numbers) + value.item()):
            good = fixed.isfinite().all() & within & value.detach().isfinite()
            valid = good if here is None else good & here
            # A factor, not a choice: it makes the gradient NaN as well, so that a loss scaler skips the step.
            value = value * torch.where(good, 1.0, math.nan)
        if self.training:
            with torch.no_grad():
                self._remember(fixed, valid)
        value = value if S is None else value * S
        return value if value.dtype is L.dtype else value.to(L.dtype)

    def backward(
        self,
        losses: Losses,
        shared: nn.Module | Iterable[Tensor] | None = None,
        *,
        representation: Any = None,
        features: Any = None,
        batched: bool = False,
        groups: Sequence[Iterable[Tensor]] | None = None,
        scale_heads: bool = False,
        retain_graph: bool = False,
        process_group: Any = None,
        grad_scale: Tensor | float | None = None,
        engine: Literal["full", "gramian", "auto"] = "full",
        every: int | Literal["auto"] = 1,
        batch_dim: int | None = None,
        per: Literal["all", "example", "task"] = "all",
        check: bool = True,
    ) -> Info:
        """The single backward pass of `self(losses)`, with the signature of other methods' `backward`.

        All parameters that a loss reaches get the gradient of the scalar. Those of head t do too: α_t times the
        gradient of its loss, with or without `scale_heads`.

        Args:
            losses: as in `forward`.
            shared: the shared parameters, a module or parameters. Only GradNorm needs them, for its layer; the pass
                finds parameters by itself.
            representation: accepted but not needed: the single pass goes through it.
            features: accepted but not needed, like `representation`.
            batched: has to be False: one pass has nothing to batch.
            groups: has to be None: the losses have one set of weights.
            scale_heads: has no effect: heads are always scaled.
            retain_graph: keep the graph for another backward.
            process_group: has to be None or False: average the losses over processes yourself, and gradients with
                DistributedDataParallel.
            grad_scale: as in `forward`.
            engine: "full" or "auto".
            every: has to be 1: the weights cost no pass that could be saved.
            batch_dim: has to be None, as `per` "all" and `check` True: one weight a task, not one an example.
            per: see `batch_dim`.
            check: see `batch_dim`.

        Returns:
            An info with `alpha`, the task weights.

        Raises:
            TypeError: as `forward`, or `shared` of another kind.
            ValueError: as `forward`, or an option that has no meaning here.
        """
        refused = {
            "batched": batched,
            "groups": groups is not None,
            "process_group": process_group is not None and process_group is not False,
            "engine": engine not in ("full", "auto"),
            "every": every != 1,
            "batch_dim": batch_dim is not None,
            "per": per != "all",
            "check": check is not True,
        }
        for name, given in refused.items():
            if given:
                raise ValueError(f"{name}: expected none for {self!r}, which makes one backward pass of the losses")
        if shared is not None and (isinstance(shared, Tensor) or not isinstance(shared, (nn.Module, Iterable))):
            raise TypeError(f"shared: expected a module or an iterable of parameters, got {describe(shared)}")
        self._value(losses, shared, grad_scale).backward(retain_graph=retain_graph)
        assert self.info is not None  # after a call
        return self.info

    def scalar(self, L: Tensor) -> Tensor:
        """f(L) alone, for float32 or float64 losses [T] that are all present; checks and remembers nothing."""
        return self._valued(L, None)[0]

    def _valued(self, L: Tensor, here: Tensor | None) -> tuple[Tensor, Tensor | Derivative]:
        """The result [], with its graph, and its derivative; see `_scalarize` for the arguments and the derivative."""
        one = self._one_node and type(L) is Tensor and not torch.compiler.is_compiling() and not transforming()
        value, weights = self._scalarize(L.detach() if one else L, here)
        if value is None:
            assert isinstance(weights, Tensor)
            value = weights @ L
        elif one and L.requires_grad and torch.is_grad_enabled():
            value = _Known.apply(L, (value,), weights)  # one node, which takes half the time of many
        return value, weights

    @property
    def called(self) -> bool:
        """Whether there was a call, so that its weights are known."""
        return self._weights is not None

    @property
    def info(self) -> Info | None:
        """What the last call did: `alpha`, float64 [T], and the tasks' names; None before one."""
        if self.last_weights is None:
            return None
        info = Info.of(alpha=self.last_weights.to(torch.float64))
        info.names = self.names
        return info

    def check_tasks(self, T: int) -> None:
        """Raises ValueError where the options do not fit T tasks."""
        if self.tasks not in (None, T):
            raise ValueError(
                f"losses: expected {self.tasks} (the number of tasks), got {T}; "
                "pass None for a task that is absent, so that the others keep their places"
            )

    def after_step(self, losses: Callable[[], Losses]) -> None:
        """To call after the optimizer's step, for methods that learn from its effect; most ignore it.

        Args:
            losses: computes the T losses of the same batch again; only methods that need them call it.
        """

    def end_epoch(self) -> None:
        """To call at the end of an epoch, for methods that count epochs; most ignore it."""

    def reset(self) -> None:
        """Returns to the state of a new instance."""
        super().reset()
        self.last_weights = None

    def _value(
        self, losses: Losses, shared: nn.Module | Iterable[Tensor] | None, grad_scale: Tensor | float | None
    ) -> Tensor:
        """`self(losses)`, with the shared parameters if they are known."""
        result: Tensor = self(losses, grad_scale=grad_scale)
        return result

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[Tensor | None, Tensor | Derivative]:
        """The result [] and its derivative, for losses [T], which are detached with `_one_node`.

        * (None, w): Σ w_t L_t, with w [T] in L's dtype, 0 for absent tasks, that no later step changes.
        * (value, w [T]), or (value, derivative), a function of losses [T] that is called only if needed. The values
          it uses from this step are constant.

        `here` [T], bool, says which tasks are present; None for all. An absent task's loss is the constant 1.
        """
        raise NotImplementedError

    def _remember(self, L: Tensor, valid: Tensor | None) -> None:
        """Updates the state from detached losses [T], where `valid` (bool, [] or [T]; None for all) is true."""

    def _inside(self, numbers: list[float]) -> bool:
        """Whether finite losses are known to be in the method's domain."""
        if self._positive is None:
            return True
        return min(numbers) > 0 if self._positive else min(numbers) >= 0

    def _outside(self, L: Tensor) -> Tensor | None:
        """Which losses [T] are outside the method's domain, bool; None if there are no limits."""
        if self._positive is None:
            return None
        return L <= 0 if self._positive else L < 0

    def _needs(self, t: int) -> str:
        """The domain for task t, for error messages."""
        raise NotImplementedError

    def _within(self, L: Tensor, here: Tensor | None = None) -> Tensor | bool:
        """Whether all finite entries of the detached losses [T] are in the domain.

        Raises:
            ValueError: one is not, and checking that needs no wait for a device.
        """
        outside = self._outside(L)
        if outside is None:
            return True
        outside = masked(outside, here, False)
        if has_numbers(L) and not bool(outside.any()):
            return True
        outside = outside & L.isfinite()
        if has_numbers(L) and bool(outside.any()):
            t = outside.tolist().index(True)
            raise ValueError(f"losses[{t}]: expected {self._needs(t)}, got {L[t].item():.6g}")
        return ~outside.any()

    def _parts(self, losses: Losses) -> list[Tensor | None]:
        """The checked losses one by one."""
        if isinstance(losses, Mapping):
            self.names = self.names or names_of(losses)
        parts = check_losses(losses, None, self.names)
        self.check_tasks(len(parts))
        return parts

    def _stacked(self, losses: Losses) -> tuple[Tensor, Tensor | None]:
        """The checked losses as one tensor [T] of at least float32, and which tasks are present (see `_scalarize`)."""
        here = None
        if is_whole(losses):
            L = losses
            self.check_tasks(len(L))
        else:
            parts = self._parts(losses)
            there = present(parts)
            if not any(there):
                raise ValueError(f"losses: expected at least one task that is present, got None for all {len(parts)}")
            L = stack_losses([loss if known else None for loss, known in zip(parts, there, strict=True)], absent=1.0)
            if not all(there):
                none = L.new_zeros((), dtype=torch.bool)  # made on the device, not copied there
                here = torch.stack([~none if known else none for known in there])
        state = next((x for x in self._buffers.values() if x is not None), None)
        state = next(self.parameters(), None) if state is None else state
        if state is not None and state.device != L.device:
            place = f"{state.device}, where this {type(self).__name__} is (.to(device) moves it)"
            raise ValueError(f"losses: expected losses on {place}, got {describe(L)}")
        return L if L.dtype in _WIDE else L.to(torch.float32), here

    def __getstate__(self) -> dict[str, Any]:
        self.last_weights = self.last_weights  # numbers, in place of what computes them
        return self.__dict__.copy()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class _Known(torch.autograd.Function):
    """A result whose derivative is known."""

    @staticmethod
    def forward(ctx: Any, L: Tensor, value: tuple[Tensor], derivative: Derivative) -> Tensor:
        ctx.save_for_backward(L)
        ctx.derivative = derivative
        return value[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (L,) = ctx.saved_tensors
        return grad * ctx.derivative(L), None, None


def chosen(valid: Tensor | None, new: Tensor, old: Tensor | float) -> Tensor:
    """`new` where `valid` (None for everywhere), else `old`."""
    return new if valid is None else torch.where(valid, new, old)


def masked(x: Tensor, here: Tensor | None, other: float = 0.0) -> Tensor:
    """`x` [T], with `other` for absent tasks."""
    return x if here is None else torch.where(here, x, other)


def number_of(L: Tensor, here: Tensor | None) -> Tensor | int:
    """How many of T tasks are present."""
    return L.shape[0] if here is None else here.sum()


def present(losses: Sequence[Tensor | None]) -> list[bool]:
    """Which tasks are present: all whose loss requires grad; if none does, as in evaluation, all that have a loss."""
    learning = [loss is not None and loss.requires_grad for loss in losses]
    return learning if any(learning) else [loss is not None for loss in losses]


def divided(x: Tensor, scale: Tensor | float | None) -> Tensor:
    """`x` without the factor of a loss scaler, in x's dtype."""
    return x if scale is None else (x / scale).to(x.dtype)
