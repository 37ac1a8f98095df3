"""Accumulate, then aggregate: the T gradients of micro-batches are summed and aggregated once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.graph import Leaves, leaves_of, trunk_of, vjp
from fastmtl.info import Info
from fastmtl.inputs import Row, wrong_kind
from fastmtl.losses import Losses, check_losses, names_of, present_losses, stack_losses
from fastmtl.rule import Rule, context_of, names_in_order
from fastmtl.training import passes, paths
from fastmtl.training.commit import Updates, commit, pairs
from fastmtl.training.parameters import Parameters, check_plain, checked_groups, checked_parameters
from fastmtl.training.paths import features as by_features
from fastmtl.training.paths import full, upper_bound
from fastmtl.training.step import Options, Step, prepare

__all__ = ["Accumulator"]


class Accumulator:
    """Micro-batches of one step: `method.accumulate` makes it.

        accumulator = method.accumulate(shared=encoder)
        for micro_batch in batch:
            accumulator.add(losses_of(micro_batch))  # sums: divide means by the number of micro-batches
        info = accumulator.backward()  # one aggregation, one commit
        optimizer.step()

    `backward` commits what one call of `method.backward` on the sums of the micro-batches' losses would: by linearity,
    each task's gradient is the sum over micro-batches. Until then no parameter's `.grad` is touched, and the method's
    state stays as it was. What has been added is in no `state_dict()`: save between steps, not within one.

    With `shared` or `groups`, `add` frees the graph of its micro-batch and keeps T gradients: T · P numbers in one flat
    buffer for each dtype, however many micro-batches there are. With a `representation` in each `add` (the upper
    bound), the T gradients of h and the graph of the *encoder* are kept for each micro-batch, since the encoder's one
    pass comes after the aggregation.

    Attributes:
        count: how many micro-batches have been added since the last `backward`.
    """

    count: int

    def __init__(
        self,
        method: Rule,
        shared: Parameters | None = None,
        groups: Sequence[Parameters] | None = None,
        scale_heads: bool = False,
        process_group: Any = None,
    ) -> None:
        if shared is not None:
            parameters = checked_parameters(shared)
            shared = shared if isinstance(shared, torch.nn.Module) else parameters
        if groups is not None:
            groups = checked_groups(groups)
        together = None if process_group is False else process_group
        self._options = Options(method, 0, shared, groups=groups, scale_heads=scale_heads, process_group=together)
        paths.check(self._options)
        self._unsaid = process_group is None
        self._sums: _Sums | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets what has been added since the last `backward`."""
        self.count = 0
        self._step: Step | None = None
        self._names: tuple[str, ...] | None = None
        self._losses: Tensor | None = None
        self._own: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (task, or 0; parameter's id) -> parameter, sum
        self._reached: dict[int, Tensor] = {}
        self._parts: list[_Part] = []
        self._halfway = False
        if self._sums is not None:
            self._sums.clear()

    def add(
        self,
        losses: Losses,
        *,
        representation: Any = None,
        features: Any = None,
        batched: bool = False,
        retain_graph: bool = False,
    ) -> None:
        """Adds the gradients of a micro-batch's losses to those of the others.

        Args:
            losses: as in `Method.backward`, None for a task that the micro-batch lacks. All may be None if the shared
                parameters are named. (If not, they are those that the first micro-batch's losses have in common, and
                all of these losses have to be there.) Divide a loss that is a mean by the number of micro-batches.
            representation: as in `Method.backward`, in every call or in none, and without `shared` and `groups`.
            features: as in `Method.backward`.
            batched: as in `Method.backward`.
            retain_graph: as in `Method.backward`.

        Raises:
            TypeError: as `Method.backward`.
            ValueError: as `Method.backward`; or another number of tasks, other shared parameters, or a representation
                where there was none. Then nothing has been added, and earlier micro-batches are kept.
            RuntimeError: an earlier call failed in the middle of its passes, which spoiled the sums: call `reset()`.
        """
        self._check_whole()
        method = self._options.method
        names = names_in_order(method, names_of(losses))
        given = check_losses(losses, self._tasks(), names=names)
        tasks = present_losses(given)
        method.check_tasks(len(tasks))
        options = self._options._replace(
            tasks=len(tasks),
            representation=representation,
            features=features,
            batched=batched,
            retain_graph=retain_graph,
        )
        paths.check(options)
        if self._step is not None and (representation is None) == bool(self._parts):
            expected, got = ("one", "none") if self._parts else ("none", "one")
            raise ValueError(f"representation: expected {expected}, as in the micro-batches before, got {got}")
        if not _is_named(options):
            if self._step is not None:
                options = options._replace(shared=self._step.parameters)
            elif any(loss is None for loss in tasks):
                raise ValueError(
                    "shared: expected the shared parameters to be named where the first micro-batch lacks a loss: the "
                    "others would find others"
                )
        self._names = names
        if all(loss is None for loss in tasks) and options.process_group is None and _is_named(options):
            self.count += 1
            return
        step = prepare(options, tasks, None, self._unsaid)
        self._check_like_others(step)
        if representation is None:
            self._add_rows(step)
        else:
            rows, own = upper_bound.gather(step)
            self._add_own(step.heads, own)
            self._parts.append(_Part(step.cut, rows, step.parameters, retain_graph))
        self._reached |= {id(leaf): leaf for leaf in step.reached()}
        # Without anything that would keep the graph alive.
        options = self._options._replace(tasks=len(tasks))
        self._step = step._replace(options=options, losses=[], cut=[], heads=leaves_of([], []), trunk=trunk_of([]))
        if method.needs_losses:
            stacked = stack_losses(given, names=names).detach().to(torch.float64)
            self._losses = stacked if self._losses is None else self._losses + stacked
        self.count += 1

    def backward(self, *, grad_scale: Tensor | float | None = None) -> Info:
        """Aggregates what has been added, adds the result to `.grad`, and starts over.

        A failure before gradients are committed leaves every `.grad` as it was, and keeps what has been added.

        Args:
            grad_scale: as in `Method.backward`: one factor for all micro-batches, as if the scaler is updated once per
                step.

        Returns:
            What the method saw and did.

        Raises:
            ValueError: nothing has been added, or no loss has a gradient of the shared parameters.
            RuntimeError: as `add`.
        """
        self._check_whole()
        step = self._step
        if step is None:
            raise ValueError(
                f"losses: expected at least one loss that requires grad, got none in {self.count} micro-batches"
            )
        options = step.options
        context = context_of(options.method, self._losses, options.tasks, grad_scale, step.context.agree)
        update = self._upper_bound if self._parts else self._exact
        updates, info = update(step._replace(context=context))
        info.names = self._names
        own, self._own = self._own, {}
        reached = list(self._reached.values())
        updates += _taken(own, info.alpha if options.scale_heads else None)
        self.reset()
        commit(updates, reached)
        return info

    def _exact(self, step: Step) -> tuple[Updates, Info]:
        assert self._sums is not None
        rows = full.rows_for(step)
        for row in self._sums.rows():
            rows.append(row)
        updates, info = rows.combine(step.options.method, step.context)
        return pairs(step.parameters, updates), info

    def _upper_bound(self, step: Step) -> tuple[Updates, Info]:
        """The representation of all micro-batches is that of the whole batch, in pieces."""
        cut = [x for part in self._parts for x in part.cut]
        rows = [[g for part in self._parts for g in part.rows[t]] for t in range(step.options.tasks)]
        parameters = list({id(p): p for part in self._parts for p in part.parameters}.values())
        cotangents, info = upper_bound.aggregate(step._replace(cut=cut), rows)
        with passes.without_tensor_hooks(parameters):
            retain_graph = any(part.retain_graph for part in self._parts)
            return pairs(parameters, vjp(cut, cotangents, parameters, retain_graph=retain_graph)), info

    def _add_rows(self, step: Step) -> None:
        path = by_features if by_features.takes(step) else full
        if self._sums is None or not self._sums.fits(step):
            self._sums = _Sums(step)
        sums = self._sums
        sums.begin()
        try:
            heads, own = path.gather(step, sums)
            self._add_own(heads, own)
        except BaseException:
            if self._step is None:
                sums.clear()
            else:
                self._halfway = sums.begun
            raise

    def _add_own(self, heads: Leaves, own: list[Row]) -> None:
        """Adds gradients of parameters that are not shared, per task if they are to be scaled; all of them or none."""
        found = dict(self._own)
        for t, leaves in enumerate(heads.private):
            for leaf, g in zip([*leaves, *heads.common], own[t], strict=True):
                if g is None:
                    continue
                key = t if self._options.scale_heads else 0, id(leaf)
                found[key] = leaf, found[key][1] + g if key in found else g
        self._own = found

    def _tasks(self) -> int | None:
        return None if self._step is None else self._step.options.tasks

    def _check_whole(self) -> None:
        if self._halfway:
            raise RuntimeError(
                "accumulate: a micro-batch failed in the middle of its passes, and the sums contain a part of it: "
                "reset() discards this step's micro-batches"
            )

    def _check_like_others(self, step: Step) -> None:
        check_plain(step.parameters, "accumulate")
        before = self._step
        if before is None or step.options.representation is not None:
            return
        if [*map(id, step.parameters)] != [*map(id, before.parameters)]:
            raise ValueError(
                f"shared: expected the {len(before.parameters)} parameters of the micro-batches before, got "
                f"{len(step.parameters)}, of which some are others: name them"
            )


class _Part(NamedTuple):
    """A micro-batch of the upper bound: its representation, T gradients of it, and the parameters behind it."""

    cut: list[Tensor]
    rows: list[Row]
    parameters: list[Tensor]
    retain_graph: bool


class _Sums:
    """T rows of K gradients, each a view of one flat buffer [T, P] for each dtype and device."""

    def __init__(self, step: Step) -> None:
        T, self._parameters = step.options.tasks, step.parameters
        kinds: dict[Any, list[int]] = {}
        for k, p in enumerate(step.parameters):
            kinds.setdefault((p.dtype, p.device), []).append(k)
        self._rows = [list(step.parameters) for _ in range(T)]
        for members in kinds.values():
            sizes = [step.parameters[k].numel() for k in members]
            flat = step.parameters[members[0]].new_empty(T, sum(sizes), requires_grad=False)
            for row, whole in zip(self._rows, flat, strict=True):
                for k, part in zip(members, whole.split(sizes), strict=True):
                    dense = torch.empty_like(step.parameters[k], device="meta")  # with the layout of `.grad`
                    row[k] = part.as_strided(dense.shape, dense.stride())
        self.clear()

    def fits(self, step: Step) -> bool:
        """Whether these are the step's tasks and parameters."""
        same = [*map(id, step.parameters)] == [*map(id, self._parameters)]
        return same and len(self._rows) == step.options.tasks

    def clear(self) -> None:
        """Forgets the sums but keeps the memory."""
        self._filled = [[False] * len(self._parameters) for _ in self._rows]
        self._t = 0

    def begin(self) -> None:
        """To call before the T rows of a micro-batch."""
        self._t = 0

    @property
    def begun(self) -> bool:
        """Whether a row of this micro-batch has been added."""
        return self._t > 0

    @torch.no_grad()
    def append(self, row: Row) -> None:
        """Adds the next task's gradients."""
        sums, filled = self._rows[self._t], self._filled[self._t]
        for k, g in enumerate(row):
            if g is not None and (wrong := wrong_kind(g)) is not None:
                raise TypeError(f"rows[{self._t}][{k}]: {wrong}")
        self._t += 1
        both = [(sums[k], g, filled[k]) for k, g in enumerate(row) if g is not None]
        if old := [(x, g) for x, g, begun in both if begun]:
            torch._foreach_add_([x for x, _ in old], [g for _, g in old])
        if new := [(x, g) for x, g, begun in both if not begun]:
            torch._foreach_copy_([x for x, _ in new], [g for _, g in new])
        self._filled[self._t - 1] = [was or g is not None for was, g in zip(filled, row, strict=True)]

    def rows(self) -> Iterator[Row]:
        """The T rows, with None where no micro-batch had a gradient."""
        for sums, filled in zip(self._rows, self._filled, strict=True):
            yield [x if there else None for x, there in zip(sums, filled, strict=True)]


def _is_named(options: Options) -> bool:
    """Whether the options tell what is shared, even for a micro-batch without losses."""
    return any(x is not None for x in (options.shared, options.groups, options.representation, options.features))


def _taken(own: dict[tuple[int, int], tuple[Tensor, Tensor]], alpha: Tensor | None) -> Iterable[tuple[Tensor, Tensor]]:
    """Each parameter with its sum, multiplied by the task's weight if there are weights; empties `own`."""
    for t, key in list(own):
        parameter, g = own.pop((t, key))
        yield parameter, g if alpha is None else g * alpha[t].to(g.dtype)
