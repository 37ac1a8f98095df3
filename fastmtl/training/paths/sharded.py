"""Parameters of `fully_shard` (FSDP2), which get gradients only from complete backward calls."""

from __future__ import annotations

from fastmtl.inputs import describe
from fastmtl.training.commit import pairs
from fastmtl.training.parameters import are_plain
from fastmtl.training.step import Outcome, Step

__all__ = ["run", "takes"]


def takes(step: Step) -> bool:
    """Steps whose shared parameters are sharded."""
    if are_plain(step.parameters):
        return False
    from fastmtl import distributed  # here: not every torch is built with it

    if not distributed.is_sharded(step.parameters):
        return False
    options = step.options
    for name in ("features", "process_group"):
        value = getattr(options, name)
        if value is not None and value is not False:
            raise ValueError(f"{name}: expected none with parameters of fully_shard, got {describe(value)}")
    if options.scale_heads and options.heads is None:
        raise ValueError(
            "scale_heads: expected the heads, one for each task, with parameters of fully_shard (of which the graph "
            "shows only temporary copies): scale_heads=[head_0, head_1, ...], got True"
        )
    if options.method.needs_losses:
        raise ValueError(
            f"shared: expected plain parameters for {options.method!r}, which needs the losses, got shards"
        )
    return True


def run(step: Step) -> Outcome:
    """See `Path`. The other parameters get their gradients in the same passes."""
    from fastmtl import distributed

    options = step.options
    updates, heads, info = distributed.sharded_update(
        step.losses,
        step.parameters,  # type: ignore[arg-type]  # DTensors: see `takes`
        options.method.solve,
        step.context,
        retain_graph=options.retain_graph,
        sizes=[len(group) for group in step.groups] or None,
        heads=options.heads or (),
    )
    return Outcome(pairs(step.parameters, updates) + heads, info, ())
