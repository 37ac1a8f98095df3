"""One call of `backward`: what was asked for, and what is known before any pass runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastmtl import once
from fastmtl.gramian.examples import Per
from fastmtl.graph import Leaves, Trunk, edge_of, leaves_of, trunk_of
from fastmtl.info import Info
from fastmtl.inputs import Row, describe
from fastmtl.rule import Context, Rule, context_of
from fastmtl.training.commit import Updates, own_gradients, pairs
from fastmtl.training.parameters import are_plain, checked_cut, checked_groups, checked_parameters, names_in

__all__ = ["Engine", "Options", "Outcome", "Step", "check_reached", "check_together", "prepare"]


Engine: TypeAlias = Literal["full", "gramian", "auto"]


class Options(NamedTuple):
    """The arguments of `Method.backward` as given, except that `process_group` is None instead of False.

    `tasks` is the number of losses that are aggregated together; `heads` are those given as `scale_heads`.
    """

    method: Rule
    tasks: int
    shared: Any
    representation: Any = None
    features: Any = None
    batched: bool = False
    groups: Any = None
    scale_heads: bool = False
    retain_graph: bool = False
    process_group: Any = None
    engine: Engine = "full"
    every: int | Literal["auto"] = 1
    batch_dim: int | None = None
    per: Per = "all"
    check: bool = True
    heads: list[list[Tensor]] | None = None


class Outcome(NamedTuple):
    """The result of a path.

    Attributes:
        updates: what to add to `.grad`.
        info: what the method saw and did.
        reached: leaves whose hooks have to run even without a gradient.
    """

    updates: Updates
    info: Info
    reached: Sequence[Tensor]


class Step(NamedTuple):
    """What is known before the passes.

    Attributes:
        options: what was asked for.
        losses: T losses, None for an absent task; with `batch_dim`, a single tensor [T, B] of losses.
        parameters: the shared parameters, each once.
        names: their names by id, if they came as a module.
        groups: their groups; empty if they are aggregated together.
        cut: the tensors of the representation, or of the features.
        heads: the leaves that losses reach before the cut.
        trunk: what lies behind the cut.
        context: what the step gives the method besides gradients.
        group: the processes that aggregate together; None for one process.
    """

    options: Options
    losses: list[Tensor | None]
    parameters: list[Tensor]
    names: dict[int, str]
    groups: list[list[Tensor]]
    cut: list[Tensor]
    heads: Leaves
    trunk: Trunk
    context: Context
    group: Any

    @property
    def tied(self) -> bool:
        """Whether a leaf lies on both sides of the cut."""
        return self.heads.meet(self.trunk.leaves)

    def uncut(self) -> Step:
        """The same without a cut."""
        if not self.cut:
            return self
        return self._replace(cut=[], heads=leaves_of(self.losses, []), trunk=trunk_of([]))

    def outcome(self, heads: Leaves, updates: list[Tensor | None], own: list[Row], info: Info) -> Outcome:
        """The outcome for gradients of the shared parameters and of the losses' other leaves; empties both lists."""
        found = pairs(self.parameters, updates)
        found += own_gradients(heads, own, info.alpha if self.options.scale_heads else None)
        return Outcome(found, info, self.reached())

    def reached(self) -> list[Tensor]:
        """The leaves that any loss reaches."""
        return [*self.trunk.leaves, *self.heads.all(), *self.heads.idle]


def prepare(options: Options, losses: list[Tensor | None], grad_scale: Tensor | float | None, unsaid: bool) -> Step:
    """Checks what was asked for, and finds the shared parameters.

    Args:
        options: what was asked for.
        losses: T losses, None for an absent task; with `batch_dim`, a single tensor of losses.
        grad_scale: the factor of a loss scaler.
        unsaid: whether the caller left open if processes aggregate together.

    Raises:
        TypeError: as `Method.backward`.
        ValueError: as `Method.backward`.
    """
    together, upper_bound = options.process_group is not None, options.representation is not None
    group = agree = None
    if together:
        from fastmtl import distributed  # here: not every torch is built with it

        group = distributed.gram_group(options.process_group)
        agree = partial(distributed.agree, group=group)
    cut: list[Tensor] = []
    if upper_bound:
        cut = checked_cut(options.representation, "representation")
    elif options.features is not None:
        cut = checked_cut(options.features, "features")
    groups = [] if options.groups is None else checked_groups(options.groups)
    parameters = [p for part in groups for p in part] if options.shared is None else checked_parameters(options.shared)
    _check_present(losses, together, known=bool(parameters or cut))
    of_examples = losses[0] if options.batch_dim is not None else None
    each = losses if of_examples is None else of_examples.flatten()
    context = context_of(options.method, each, len(each), grad_scale, agree)

    heads, trunk = leaves_of(losses, cut, joints=of_examples is None), trunk_of(edge_of(x) for x in cut)
    if not parameters:
        # Everything behind a representation or features is shared; without these, whatever several losses reach.
        reached = trunk.leaves if cut else heads.all() if of_examples is not None else heads.shared()
        parameters = trunk.leaves if upper_bound else _of_model(reached)
        if not parameters and not upper_bound:
            raise ValueError("shared: expected parameters that at least two losses reach, found none: name them")
    if unsaid and are_plain(parameters):  # shards are averaged in the passes
        once.warn_alone(None, "process_group", "backward")
    return Step(options, losses, parameters, names_in(options.shared), groups, cut, heads, trunk, context, group)


def check_reached(rows: Sequence[Sequence[Tensor | None]], name: str) -> None:
    """Raises ValueError if no loss has a gradient in any of these rows."""
    if all(g is None for row in rows for g in row):
        what = "tensors" if name == "representation" else "parameters"
        raise ValueError(f"{name}: expected {what} that a loss depends on, but no loss reaches any of them")


def check_together(method: Rule) -> None:
    """Raises ValueError where processes cannot aggregate together by this method."""
    if not method.on_gram:
        raise ValueError(f"process_group: expected a method that works on the Gram matrix, got {describe(method)}")
    if method.needs_losses:
        raise ValueError(
            f"process_group: expected a method that needs no losses (each process has others), got {method!r}"
        )


def _of_model(leaves: list[Tensor]) -> list[Tensor]:
    """The parameters among leaves, since inputs may require grad too; all leaves if none is an `nn.Parameter`."""
    return [p for p in leaves if isinstance(p, torch.nn.Parameter)] or leaves


def _check_present(losses: Sequence[Tensor | None], together: bool, known: bool) -> None:
    """Raises ValueError if there is nothing to do; with other processes, this one has to take part regardless."""
    absent = sum(loss is None for loss in losses)
    if absent == len(losses) and not together:
        raise ValueError(f"losses: expected at least one loss that requires grad, got none among {len(losses)}")
    if absent and together and not known:
        raise ValueError(
            "shared: expected the shared parameters to be named where a loss is absent: processes with other losses "
            "would find others"
        )
