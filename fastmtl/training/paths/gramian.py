"""The Gram matrix without the gradients (`fastmtl.gramian`), then one gradient per weight."""

from __future__ import annotations

from functools import partial
from typing import get_args

from torch import Tensor

from fastmtl import gramian
from fastmtl.graph import edge_of, leaves_of
from fastmtl.info import Info
from fastmtl.inputs import describe
from fastmtl.training import passes
from fastmtl.training.commit import own_gradients
from fastmtl.training.parameters import are_plain, check_plain
from fastmtl.training.step import Engine, Options, Outcome, Step, check_reached

__all__ = ["check", "run", "takes"]

_ENGINES = get_args(Engine)


def check(options: Options) -> None:
    """Raises ValueError for an unknown engine, or if this one is asked for but cannot do it."""
    if options.engine not in _ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(map(repr, _ENGINES))}, got {options.engine!r}")
    obstacle = _obstacle(options)
    if options.engine == "gramian" and obstacle is not None:
        raise ValueError(obstacle)


def _obstacle(options: Options) -> str | None:
    for name in (
        "representation",  # its Gram matrix is another one
        "features",
        "groups",  # one backward pass brings one combination
    ):
        value = getattr(options, name)
        if value is not None:
            return f"{name}: expected None with engine='gramian', got {describe(value)}"
    if not options.method.on_gram:
        return f"engine: expected 'full' for a method that needs more than the Gram matrix, got {options.engine!r}"
    return None


def takes(step: Step) -> bool:
    """Steps of several tasks with "gramian", or with "auto" if nothing stands in the way."""
    engine = step.options.engine
    if engine == "full" or step.options.tasks == 1:
        return False
    automatic = engine == "auto"
    # This engine cannot pass straight through a joint, and all processes have to choose the same engine.
    if automatic and (_obstacle(step.options) is not None or step.heads.joined or step.group is not None):
        return False
    if automatic:
        return are_plain(step.parameters)
    check_plain(step.parameters, "engine='gramian'")
    return True


def run(step: Step) -> Outcome | None:
    """See `Path`."""
    options = step.options
    reached = step.reached()
    if step.heads.joined:
        step = step._replace(heads=leaves_of(step.losses, [], joints=False))
    if step.group is None and not any(edge_of(p)[0] in step.heads.owner for p in step.parameters):
        return None  # the next path says what is wrong; where checkpoints hide parameters, autograd does
    with passes.without_tensor_hooks([*step.parameters, *step.heads.all()]):
        found = gramian.update(
            options.method,
            step.losses,
            [(p, step.names.get(id(p), f"shared[{k}]")) for k, p in enumerate(step.parameters)],
            step.heads,
            step.context,
            automatic=options.engine == "auto",
            scale_heads=options.scale_heads,
            retain_graph=options.retain_graph,
            settle=None if step.group is None else partial(_averaged, step),
        )
    if found is None:
        return None
    updates, own, info = found
    del found
    alpha = info.alpha if options.scale_heads else None
    updates += own_gradients(step.heads.without(step.parameters), own, alpha)
    return Outcome(updates, info, reached)


def _averaged(step: Step, trunk: gramian.Trunk) -> tuple[list[tuple[Tensor, Tensor]], Info]:
    from fastmtl import distributed  # here: not every torch is built with it

    updates, info = distributed.averaged_update(trunk, step.parameters, step.options.method, step.context, step.group)
    check_reached([[g for _, g in updates]], "shared")  # only now: all processes have to take part in the above
    return updates, info
