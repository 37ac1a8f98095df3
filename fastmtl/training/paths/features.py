"""Exact gradients by way of features: T passes through the heads, then T, or one batched, through the rest."""

from __future__ import annotations

from fastmtl.graph import Leaves
from fastmtl.inputs import Row
from fastmtl.training import passes
from fastmtl.training.commit import check_gathered
from fastmtl.training.paths.full import rows_for
from fastmtl.training.step import Options, Outcome, Step

__all__ = ["check", "gather", "run", "takes"]


def check(options: Options) -> None:
    """Raises ValueError for `batched` where there is nothing to batch."""
    if options.batched and options.features is None:
        raise ValueError(
            "batched: expected False without features, got True: it is the pass behind them that is batched"
        )


def takes(step: Step) -> bool:
    """Steps with features through which all gradients of the shared parameters pass."""
    if not step.cut:
        return False
    if step.tied or {id(p) for p in step.trunk.leaves} != {id(p) for p in step.parameters}:
        # Gradients of leaves on both sides, or of other shared parameters, do not all pass through the features.
        if step.options.batched:
            raise ValueError("batched: expected the shared parameters to be those behind the features, no others")
        return False
    return True


def run(step: Step) -> Outcome:
    """See `Path`."""
    rows = rows_for(step)
    heads, own = gather(step, rows)
    updates, info = rows.combine(step.options.method, step.context)
    del rows  # free them before the gradients are committed
    return step.outcome(heads, updates, own, info)


def gather(step: Step, rows: passes.Rows) -> tuple[Leaves, list[Row]]:
    """Appends T rows of gradients of the shared parameters; returns the other leaves and their gradients."""
    heads = step.heads.without(step.parameters)
    options = step.options
    with passes.without_tensor_hooks([*step.parameters, *heads.all()]):
        cotangents: list[Row] = []
        own = passes.from_losses(
            step.losses, step.cut, heads, options.retain_graph, cotangents, closed=bool(step.trunk.nested)
        )
        check_gathered([*step.parameters, *heads.all()])  # there may be no path beyond the cut
        through = passes.from_cotangents_at_once if options.batched else passes.from_cotangents
        through(step.cut, cotangents, step.parameters, options.retain_graph, rows)
    return heads, own
