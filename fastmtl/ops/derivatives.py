"""Which ops have a derivative: `gram`. Others that could be asked for one refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, library

from fastmtl.inputs import transforming
from fastmtl.ops.reference.rounding import rounded

__all__ = ["detached", "register"]

Result = TypeVar("Result")


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _gram_backward(ctx: Any, grad: Tensor) -> Tensor:
    """d(G Gᵀ): (Ṁ + Ṁᵀ) G."""
    (G,) = ctx.saved_tensors
    return rounded((grad + grad.mT) @ G.to(grad.dtype), G.dtype)


def _refuse(name: str) -> Callable[..., NoReturn]:
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(f"fastmtl::{name} has no derivative: detach its inputs")

    return backward


def detached(op: Callable[..., Result], *args: Any) -> Result:
    """Calls an op below autograd: its inputs are known to be detached, and it writes nothing.

    Autograd's formulas are in Python, which would unpack and repack every tensor of a list.
    """
    if torch.compiler.is_compiling() or transforming():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def register() -> None:
    """Registers the formulas; the ops have to be defined."""
    library.register_autograd("fastmtl::gram", _gram_backward, setup_context=_setup)
    # Without a formula, results would silently claim to require grad. A formula costs five microseconds of Python per
    # call, so the ops on a Gram matrix have none, and `GramMethod.weighting` checks instead.
    for name in ("gram_rows", "balance", "eigh"):
        library.register_autograd(f"fastmtl::{name}", _refuse(name))
