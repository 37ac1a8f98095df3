"""A loss for each example: B gradients from one ordinary backward pass (`fastmtl.gramian.examples`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from fastmtl.gramian import examples
from fastmtl.graph import edge_of, leaves_of
from fastmtl.inputs import DTYPES, describe
from fastmtl.losses import with_history
from fastmtl.training import passes
from fastmtl.training.parameters import are_plain, check_plain
from fastmtl.training.step import Options, Outcome, Step, check_reached

__all__ = ["check", "checked_losses", "run", "takes"]

_PER = get_args(examples.Per)
# Options that per-example losses exclude, with the reason if it is not obvious.
_WITHOUT = {
    "representation": "",
    "features": "",
    "groups": "",
    "process_group": ": products of gradients of examples on several processes are computed on none. With False each "
    "aggregates those of its own batch, and what averages gradients averages that",
}
_MANY = 8  # from this many losses on, two backward passes of all are faster than one pass each


def checked_losses(losses: Any, batch_dim: Any) -> Tensor:
    """The losses as one tensor [T, B].

    Raises:
        TypeError: not a dense floating tensor.
        ValueError: not [B], nor two-dimensional with one dimension for the examples; or it does not require grad.
    """
    if not isinstance(losses, Tensor) or losses.dtype not in DTYPES or not _is_dense(losses):
        raise TypeError(
            f"losses: expected a floating tensor [B], or [T, B], with batch_dim={batch_dim!r}, got {describe(losses)}"
        )
    if not 1 <= losses.ndim <= 2 or not losses.numel():
        raise ValueError(f"losses: expected shape [B] or [T, B], with B >= 1, with batch_dim, got {describe(losses)}")
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or not -losses.ndim <= batch_dim < losses.ndim:
        raise ValueError(f"batch_dim: expected a dimension of losses {list(losses.shape)}, got {batch_dim!r}")
    if not losses.requires_grad:
        raise ValueError(f"losses: expected losses that require grad, got {describe(losses)} that does not")
    with with_history():
        if losses.ndim == 1:
            return losses[None]
        return losses.mT if batch_dim % 2 == 0 else losses


def _is_dense(x: Tensor) -> bool:
    return not x.is_sparse and not x.is_nested


def check(options: Options) -> None:
    """Raises ValueError for options that per-example losses exclude, and for their own options without them."""
    if options.per not in _PER:
        raise ValueError(f"per: expected one of {', '.join(map(repr, _PER))}, got {options.per!r}")
    if options.batch_dim is None:
        if options.per != "all" or options.check is not True:
            name = "per" if options.per != "all" else "check"
            raise ValueError(f"batch_dim: expected a dimension of the losses with {name}, got None")
        return
    for name, why in _WITHOUT.items():
        value = getattr(options, name)
        if value is not None:
            raise ValueError(f"{name}: expected None with batch_dim, got {describe(value)}{why}")
    if options.batched:
        raise ValueError("batched: expected False with batch_dim, got True")
    if not options.method.on_gram:
        raise ValueError(
            f"batch_dim: expected None for a method that needs more than the Gram matrix, got {options.batch_dim!r}"
        )
    if options.per != "all" and options.method.needs_losses:
        raise ValueError(f"per: expected 'all' for {options.method!r}, which needs the losses, got {options.per!r}")


def takes(step: Step) -> bool:
    """Steps with per-example losses; with "auto", also those whose losses are the entries of one vector."""
    if step.options.batch_dim is not None:
        return True
    options = step.options
    others = (options.representation, options.features, options.groups, options.process_group)
    return (
        options.engine == "auto"
        and options.method.on_gram
        and len(step.losses) >= _MANY
        and all(option is None for option in others)
        and are_plain(step.parameters)
        and _of_vector(step.losses)
    )


def _of_vector(losses: Sequence[Tensor | None]) -> bool:
    """Whether they are all entries, in order, of a vector that was not stacked from scalars."""
    node: Any = None if losses[0] is None else losses[0].grad_fn
    if type(node).__name__ != "UnbindBackward0" or len(node._input_metadata) != len(losses):
        return False
    source = node.next_functions[0][0]
    if type(source).__name__ == "StackBackward0" or source is None:
        return False
    return all(x is not None and x.grad_fn is node and x.ndim == 0 and x.output_nr == t for t, x in enumerate(losses))


def run(step: Step) -> Outcome | None:
    """See `Path`. None with "auto" if examples mix."""
    options, heads = step.options, step.heads
    tentative = options.batch_dim is None
    check_plain(step.parameters, "batch_dim")
    if len({p.device for p in step.parameters}) > 1:
        if tentative:
            return None
        devices = ", ".join(sorted({str(p.device) for p in step.parameters}))
        raise ValueError(f"shared: expected parameters on one device with batch_dim, got them on {devices}")
    if not any(edge_of(p)[0] in heads.owner for p in step.parameters):
        check_reached([], "shared")
    present = [loss for loss in step.losses if loss is not None]
    reached = step.reached()
    if tentative:
        with with_history():
            present = [torch.stack(present)[None]]
        heads = leaves_of(present, [], joints=False)
    with passes.without_tensor_hooks([*step.parameters, *heads.all()]):
        found = examples.update(
            options.method,
            present[0],
            [(p, step.names.get(id(p), f"shared[{k}]")) for k, p in enumerate(step.parameters)],
            heads,
            step.context,
            per=options.per,
            check=options.check,
            scale_heads=options.scale_heads,
            retain_graph=options.retain_graph,
            tentative=tentative,
        )
    return None if found is None else Outcome(*found, reached)
