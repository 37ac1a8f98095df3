"""What the pipeline and training know about a method, and what a step gives it besides gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastmtl.info import Info
from fastmtl.inputs import describe
from fastmtl.losses import Losses, stack_losses
from fastmtl.options import check_number, plain

__all__ = [
    "NOTHING",
    "Context",
    "Kept",
    "MethodModule",
    "Rule",
    "checked_losses",
    "checked_scale",
    "context_of",
    "draw_seed",
    "names_in_order",
    "solved",
]


class Context(NamedTuple):
    """What a step gives a method besides gradients.

    Attributes:
        losses: the T task losses [T], detached and unscaled, for the methods that need them.
        grad_scale: the factor S by which a loss scaler has multiplied losses and gradients, a float or a tensor [].
        agree: makes a tensor the same on all processes that aggregate together; None for one process.
        due: compute weights even if the method has a period of its own, since the caller counts the steps.
    """

    losses: Tensor | None = None
    grad_scale: Tensor | float | None = None
    agree: Callable[[Tensor], Tensor] | None = None
    due: bool = False

    def on(self, device: torch.device) -> Context:
        """The same on the gradients' device: a model on several devices has its losses on the last."""
        if all(not isinstance(x, Tensor) or x.device == device for x in (self.losses, self.grad_scale)):
            return self
        losses = None if self.losses is None else self.losses.to(device)
        scale = self.grad_scale.to(device) if isinstance(self.grad_scale, Tensor) else self.grad_scale
        return self._replace(losses=losses, grad_scale=scale)

    def unscaled(self, M: Tensor) -> Tensor:
        """The Gram matrix of the gradients without the loss scaler's factor, float64: M / S²."""
        M = M.to(torch.float64)
        if self.grad_scale is None:
            return M
        # Divided twice: the square of a float32 scale could overflow.
        return M / self.grad_scale / self.grad_scale

    def scaled(self, losses: Tensor) -> Tensor:
        """The losses without the loss scaler's factor."""
        return losses if self.grad_scale is None else losses / self.grad_scale


NOTHING = Context()


class Kept(NamedTuple):
    """Task weights that later steps reuse: see `every` of `Method.backward`.

    Attributes:
        alpha: float64 [T], before `Rule.shortening`.
        present: which tasks were present.
        age: how many steps ago they were computed.
        period: after how many steps new ones are due, with `every="auto"`.
        turn: their cosine with the previous weights, float64 []; None for the first.
    """

    alpha: Tensor
    present: tuple[bool, ...]
    age: int
    period: int
    turn: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors, for a `state_dict()`."""
        present = torch.tensor(self.present, device="cpu")
        numbers = {"present": present, "steps": torch.tensor([self.age, self.period], device="cpu")}
        return {"alpha": self.alpha, **numbers} | ({} if self.turn is None else {"turn": self.turn})

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Kept:
        """The inverse of `tensors`."""
        age, period = tensors["steps"].tolist()
        return cls(tensors["alpha"], tuple(tensors["present"].tolist()), age, period, tensors.get("turn"))


class Rule(Protocol):
    """One direction from T task gradients: all that the rest of the package needs to know about a method.

    Attributes:
        on_gram: whether it needs only the Gram matrix of the gradients, and so has a `solve`.
        needs_losses: whether it needs the T losses, in `context`.
        remembers: whether a step depends on earlier ones.
        on_losses: whether it combines the losses instead of their gradients: it is then called with the losses, and
            there are no gradients to aggregate.
        names: the tasks' names in the order of its weights and state, once known; see `names_in_order`.
        kept: weights of an earlier step, if it was told to keep them.
        holds: for how many steps its weights hold by default.
        training: whether it may change its state.
    """

    names: tuple[str, ...] | None
    kept: Kept | None
    training: bool

    @property
    def holds(self) -> int: ...

    @property
    def on_gram(self) -> bool: ...
    @property
    def needs_losses(self) -> bool: ...
    @property
    def remembers(self) -> bool: ...
    @property
    def on_losses(self) -> bool: ...

    def check_tasks(self, T: int) -> None:
        """Raises ValueError if the options do not fit T tasks."""

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        """Task weights from M [T, T] or [B, T, T], the Gram matrix of gradients of this dtype."""
        ...

    def aggregate_matrix(self, G: Tensor, out: Tensor, context: Context) -> None:
        """Writes the aggregation of G [T, P] or [B, T, P] into `out` [P] or [B, P]; both are checked."""

    def aggregate_list(
        self, grads: Sequence[Tensor | None], T: int, dtype: torch.dtype, out: list[Tensor], context: Context
    ) -> Info:
        """Writes the aggregation of a ragged list (entry t·K + k) into K tensors, empty where no task has a gradient.

        `dtype` is the coarsest among the gradients.
        """
        ...

    def shortening(self, norm: Callable[[], Tensor]) -> Tensor | None:
        """The factor for kept weights, float64 [], given a function that returns the norm of αᵀ G; None for 1."""
        ...


def context_of(
    rule: Rule,
    losses: Losses | None,
    T: int,
    grad_scale: Tensor | float | None = None,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> Context:
    """What the step gives the method besides gradients; losses only if it needs them."""
    grad_scale = checked_scale(grad_scale)
    if not rule.needs_losses:
        return NOTHING if grad_scale is None and agree is None else Context(None, grad_scale, agree)
    if losses is None:
        raise ValueError(f"losses: expected the {T} task losses, which {rule!r} needs, got none")
    context = Context(None, grad_scale, agree)
    return context._replace(losses=context.scaled(checked_losses(losses, T)))


def solved(rule: Rule, M: Tensor, dtype: torch.dtype, context: Context) -> Info:
    """`rule.solve` for M [T, T] or [B, T, T], with losses on any device.

    Raises:
        ValueError: the weights it returns are not float64 of shape M.shape[:-1] on M's device.
    """
    info = rule.solve(M, dtype, context.on(M.device))
    alpha = info.alpha
    if alpha.shape != M.shape[:-1] or alpha.dtype is not torch.float64 or alpha.device != M.device:
        expected = f"expected float64 task weights of shape {list(M.shape[:-1])} on {M.device}"
        raise ValueError(f"{rule!r}.solve: {expected} for M of shape {list(M.shape)}, got {describe(alpha)}")
    return info


class MethodModule(nn.Module):
    """What every method is as a module: it keeps the tasks' names along with what it learns and remembers.

    If there is state, its `state_dict()` contains the names too, which give the order. When the model it is part of is
    cast to 16 bits, it keeps its own precision and only moves.
    """

    names: tuple[str, ...] | None = None
    kept: Kept | None = None
    holds: int = 1

    def shortening(self, norm: Callable[[], Tensor]) -> Tensor | None:
        """See `Rule.shortening`."""
        return None

    def reset(self) -> None:
        """Back to the state of a new instance."""
        self.names = self.kept = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def no_coarser(x: Tensor) -> Tensor:
            moved = fn(x)
            if not x.is_floating_point() or torch.finfo(moved.dtype).eps <= torch.finfo(x.dtype).eps:
                return moved
            return x.to(moved.device)

        return super()._apply(no_coarser, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kept is not None:
            destination.update({f"{prefix}_kept.{name}": x for name, x in self.kept.tensors().items()})
        if self.names is not None and any(key.startswith(prefix) for key in destination):
            destination[f"{prefix}_names"] = self.names

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = state_dict.pop(f"{prefix}_names", None)  # from a copy, where it would be an unexpected key
        self.names = None if names is None else tuple(names)
        start = f"{prefix}_kept."
        kept = {key[len(start) :]: state_dict.pop(key) for key in list(state_dict) if key.startswith(start)}
        self.kept = Kept.of(kept) if kept else None
        super()._load_from_state_dict(state_dict, prefix, *args)


def names_in_order(rule: Rule, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The names in the method's own order, whatever this step's order; the method keeps new ones.

    Raises:
        ValueError: the method remembers other tasks.
    """
    known = rule.names
    if names is None or names == known:
        return names
    if known is not None:
        if set(names) == set(known):
            return known
        if rule.remembers:
            raise ValueError(
                f"losses: expected one for each of {', '.join(map(repr, known))} (None for one that is absent), which "
                f"{rule!r} remembers, got those of {', '.join(map(repr, names))}; reset() begins anew"
            )
    rule.names = names
    return names


def checked_scale(grad_scale: Any) -> Tensor | float | None:
    """The factor of a loss scaler: None (for 1), a float, or a detached tensor, which the host does not wait for.

    Raises:
        TypeError: it is neither a number nor a floating tensor.
        ValueError: a number that is not positive and finite, or a tensor of several elements.
    """
    if grad_scale is None:
        return None
    grad_scale = plain(grad_scale)
    if not isinstance(grad_scale, Tensor):
        return check_number(grad_scale, "grad_scale", above=0)
    if not grad_scale.is_floating_point():
        raise TypeError(f"grad_scale: expected a number or a floating tensor [], got {describe(grad_scale)}")
    if grad_scale.numel() != 1:
        raise ValueError(f"grad_scale: expected a number or a tensor with one element, got {describe(grad_scale)}")
    return grad_scale.detach().reshape(()) if grad_scale.requires_grad or grad_scale.ndim else grad_scale


def checked_losses(losses: Losses, T: int, names: tuple[str, ...] | None = None) -> Tensor:
    """The losses as one detached float64 tensor [T], 0 for None.

    Raises:
        TypeError: as `check_losses`.
        ValueError: as `check_losses`.
    """
    return stack_losses(losses, T, names).detach().to(torch.float64)


def draw_seed(like: Tensor, generator: torch.Generator | None, context: Context) -> Tensor:
    """A seed for the random ops, int64 [] on the device of `like`, drawn from torch's generator to be reproducible.

    The host does not wait for it, and each replay of a CUDA graph draws a new one.
    """
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=like.device, generator=generator)
    return seed if context.agree is None else context.agree(seed)
