"""The upper bound (paper, section 5.2): T passes to a representation, aggregation there, and one pass beyond."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmtl import once
from fastmtl.graph import SEVERAL, computes, vjp
from fastmtl.info import Info
from fastmtl.inputs import Row, describe
from fastmtl.pipeline import aggregate_part, aggregate_rows
from fastmtl.training import passes
from fastmtl.training.commit import check_gathered
from fastmtl.training.step import Options, Outcome, Step, check_reached

__all__ = ["aggregate", "check", "gather", "run", "takes"]


def check(options: Options) -> None:
    """Raises ValueError for options that would have gradients aggregated elsewhere."""
    if options.representation is None:
        return
    for name in ("shared", "features", "groups"):
        value = getattr(options, name)
        if value is not None:
            raise ValueError(f"{name}: expected None where representation is given, got {describe(value)}")


def takes(step: Step) -> bool:
    """Steps with a representation."""
    return step.options.representation is not None


def run(step: Step) -> Outcome:
    """See `Path`."""
    rows, own = gather(step)
    cotangents, info = aggregate(step, rows)
    rows.clear()
    with passes.without_tensor_hooks(step.parameters):
        updates = vjp(step.cut, cotangents, step.parameters, retain_graph=step.options.retain_graph)
    return step.outcome(step.heads, updates, own, info)


def gather(step: Step) -> tuple[list[Row], list[Row]]:
    """T rows of gradients of the representation, and the gradients of the leaves that losses reach before it."""
    heads, trunk, rows = step.heads, step.trunk, list[Row]()
    with passes.without_tensor_hooks([*step.parameters, *heads.all()]):
        closed = bool(step.tied or trunk.nested)
        own = passes.from_losses(step.losses, step.cut, heads, step.options.retain_graph, rows, closed=closed)
        check_gathered([*step.parameters, *heads.all()])  # there may be no path beyond the cut
    _warn_around(step, rows)
    return rows, own


def aggregate(step: Step, rows: list[Row]) -> tuple[Sequence[Tensor | None], Info]:
    """One cotangent of the representation, from the tasks' cotangents."""
    method = step.options.method
    if step.group is None:
        check_reached(rows, "representation")
        return aggregate_rows(method, rows, None, step.context)
    from fastmtl import distributed  # here: not every torch is built with it

    flat = [g for row in rows for g in row]
    return aggregate_part(method, flat, step.cut, lambda M: distributed.reduce_gram(M, step.group), step.context)


def _warn_around(step: Step, rows: list[Row]) -> None:
    """Warns of losses that do not depend on the representation, and of paths around it into the encoder."""
    if all(g is None for row in rows for g in row):  # an error unless another process has some
        return
    missing = [t for t, loss in enumerate(step.losses) if loss is not None and all(g is None for g in rows[t])]
    if missing:
        once.warn(
            "representation not reached",
            once.caller(),
            f"representation: {_names(missing)} not depend on it and counts as absent; if its head reads anything but "
            "this very representation, its gradient is not aggregated",
        )
    owner = step.heads.owner
    around = {owner[node] for node in step.trunk.nodes & owner.keys() if computes(node)}
    if around:
        who = "several losses reach" if SEVERAL in around else f"losses[{min(around)}] reaches"
        once.warn(
            "representation passed by",
            once.caller(),
            f"representation: {who} the encoder along a path around it; gradients that take it are added plainly, not "
            "aggregated. Make that path part of the representation, or use shared= instead, which is exact",
        )


def _names(tasks: Sequence[int]) -> str:
    """Subject and auxiliary verb of a sentence about these losses."""
    return ", ".join(f"losses[{t}]" for t in tasks) + (" does" if len(tasks) == 1 else " do")
