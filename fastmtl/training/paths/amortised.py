"""Between two solutions (`every`): the weights of an earlier step, and one backward pass.

The pass starts at the losses with ones. Where it leaves the part of the graph that belongs to loss t alone for the
shared part, hooks multiply it by α_t: each head gets the gradient of its own loss, and the shared part Σ α_t g_t.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmtl import once
from fastmtl.gramian.examples import one_pass
from fastmtl.graph import SEVERAL, Edge, Leaves, behind_joints, edge_of, is_leaf
from fastmtl.info import Info
from fastmtl.inputs import Row
from fastmtl.options import integer
from fastmtl.rule import Context, Kept
from fastmtl.training import passes
from fastmtl.training.commit import pairs
from fastmtl.training.parameters import are_plain
from fastmtl.training.step import Options, Outcome, Step, check_reached

__all__ = ["check", "keep", "run", "scheduled", "takes"]

# "auto": if the weights' cosine with the previous ones is above the first of these, the period doubles; if below the
# second, it is halved.
_ALIKE, _UNLIKE, _LONGEST = 0.99, 0.9, 64
# Options under which there are no weights for the steps in between.
_WITHOUT = ("representation", "groups")


def check(options: Options) -> None:
    """Raises for an invalid period, and for methods and options without task weights that could be kept."""
    if options.every == "auto":
        pass
    elif integer(1)(options.every, "every") == 1:
        return
    if not options.method.on_gram:
        raise ValueError(f"every: expected 1 for {options.method!r}, which has no task weights to keep")
    for name in _WITHOUT:
        if getattr(options, name) is not None:
            raise ValueError(f"every: expected 1 with {name}, got {options.every!r}")


def takes(step: Step) -> bool:
    """Steps for which recent enough weights of all present tasks are kept."""
    every, kept = step.options.every, step.options.method.kept
    if every == 1:
        return False
    if not are_plain(step.parameters):
        raise ValueError(f"every: expected 1 for shared parameters that are sharded, got {every!r}")
    if kept is None or kept.alpha.shape != _shape(step) or len(kept.present) != len(step.losses):
        return False
    period = kept.period if every == "auto" else every
    # Other processes would not know that a task is new here.
    new = step.group is None and any(now and not then for now, then in zip(_present(step), kept.present, strict=True))
    return kept.age + 1 < period and not new


def scheduled(step: Step) -> Step:
    """The step with its period: the method's own if the call names none and one pass can serve."""
    options = step.options
    every = options.every
    if every == 1 and options.method.holds > 1 and options.method.training and _takes_one_pass(step):
        every = options.method.holds
    if every == 1:
        return step
    return step._replace(options=options._replace(every=every), context=step.context._replace(due=True))


def _takes_one_pass(step: Step) -> bool:
    """Whether one pass could serve the steps in between; if not, a method with a period keeps its weights itself."""
    options = step.options
    if not are_plain(step.parameters) or any(getattr(options, name) is not None for name in _WITHOUT):
        return False
    return options.scale_heads or options.batch_dim is not None or _Border(step.uncut()).clean


def run(step: Step) -> Outcome | None:
    """See `Path`."""
    of_examples = step.options.batch_dim is not None
    step = step if of_examples else step.uncut()
    heads = step.heads.without(step.parameters)
    border = None if of_examples else _Border(step)
    if not (border is None or border.clean or step.options.scale_heads):
        once.warn(
            "every without effect",
            once.caller(),
            "every: several losses reach parameters that are not shared, so one pass cannot bring the gradients of "
            "both: task weights are computed in every step",
        )
        return None
    method = step.options.method
    kept = method.kept
    assert kept is not None  # see `takes`
    kept = kept._replace(alpha=kept.alpha.to(step.parameters[0].device))  # as it was loaded
    with passes.without_tensor_hooks([*step.parameters, *heads.all()]):
        row, own = _passes(step, heads, kept.alpha) if border is None else _pass(step, heads, border, kept.alpha)
    if step.group is not None:
        row = _averaged(step, row)
    check_reached([row], "shared")
    alpha, factor = kept.alpha, method.shortening(partial(_norm, row, step.context))
    if factor is not None:
        alpha, row = alpha * factor, _times(row, factor)
        if step.options.scale_heads:
            own = [_times(grads, factor) for grads in own]
    if method.training:
        method.kept = kept._replace(age=kept.age + 1)
    info = Info.of(alpha)
    info.age = kept.age + 1
    if border is None:
        return Outcome(pairs([*step.parameters, *heads.all()], row + own[0]), info, step.reached())
    return step._replace(options=step.options._replace(scale_heads=False)).outcome(heads, row, own, info)


def _shape(step: Step) -> torch.Size:
    """The shape of the weights."""
    losses = step.losses[0]
    if step.options.batch_dim is None or losses is None:
        return torch.Size([len(step.losses)])
    T, B = losses.shape
    return torch.Size({"example": (B, T), "task": (T, B)}.get(step.options.per, (T * B,)))


def _passes(step: Step, heads: Leaves, alpha: Tensor) -> tuple[Row, list[Row]]:
    """`_pass` for per-example losses, which one graph computes: heads need a pass of their own."""
    (losses,) = step.losses
    assert losses is not None  # see `checked_losses`
    options = step.options
    weights = (alpha.mT if options.per == "example" else alpha).reshape(losses.shape).to(losses.dtype)
    leaves = heads.all()
    apart = bool(leaves) and not options.scale_heads
    own: Row = []
    if apart:
        own = one_pass(losses, leaves, torch.ones_like(losses), retain_graph=True)
    row = one_pass(
        losses, step.parameters if apart else [*step.parameters, *leaves], weights, retain_graph=options.retain_graph
    )
    n = len(step.parameters)
    return row[:n], [own if apart else row[n:]]


def _norm(row: Row, context: Context) -> Tensor:
    """The norm of the gradient without the loss scaler's factor, float64 []."""
    parts = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in row if g is not None]
    return context.scaled(torch.stack([part.to(parts[0].device) for part in parts]).norm())


def _times(row: Row, factor: Tensor) -> Row:
    return [None if g is None else g * factor.to(g) for g in row]


def keep(step: Step, info: Info) -> None:
    """Remembers the weights of a step that computed them.

    If they are not finite, as in a step that overflows, the previous ones stay, or ones if there are none yet.
    """
    method, every = step.options.method, step.options.every
    if every == 1 or info.age is not None:
        return
    info.age = 0
    if not method.training:
        return
    old: Kept | None = method.kept
    alpha, turn = (info.alpha if info.lasting is None else info.lasting).detach(), None
    finite, period = alpha.isfinite().all(), 1 if every == "auto" else every
    if old is None or old.alpha.shape != alpha.shape:
        alpha = torch.where(finite, alpha, 1.0)
    else:
        before = old.alpha.to(alpha.device)
        alpha = torch.where(finite, alpha, before)
        turn = torch.nn.functional.cosine_similarity(alpha.flatten(), before.flatten(), dim=0)
        if every == "auto":
            period = _adapted(old)
    method.kept = Kept(alpha, _present(step), 0, period, turn)


def _adapted(old: Kept) -> int:
    """The next period. The cosine is from the solution before this one, so the host does not wait for it."""
    cosine = 0.0 if old.turn is None else float(old.turn)
    if cosine > _ALIKE:
        return min(2 * old.period, _LONGEST)
    return max(old.period // 2, 1) if cosine < _UNLIKE else old.period


def _present(step: Step) -> tuple[bool, ...]:
    return tuple(loss is not None for loss in step.losses)


def _pass(step: Step, heads: Leaves, border: _Border, alpha: Tensor) -> tuple[Row, list[Row]]:
    """Gradients of the shared parameters, weighted, and of each loss's own."""
    there = [(t, loss) for t, loss in enumerate(step.losses) if loss is not None]
    private = [leaf for leaves in heads.private for leaf in leaves]
    inputs = [*step.parameters, *private, *heads.common]
    grads: Row = [None] * len(inputs)
    if there:
        scale_heads = step.options.scale_heads
        starts = [
            alpha[t].to(loss).expand_as(loss) if scale_heads or border.begins(loss) else None  # ones
            for t, loss in there
        ]
        with border.scaled(None if scale_heads else alpha):
            grads = list(
                torch.autograd.grad(
                    [loss for _, loss in there],
                    inputs,
                    starts,
                    retain_graph=step.options.retain_graph,
                    allow_unused=True,
                )
            )
    rest = iter(grads[len(step.parameters) :])
    own: list[Row] = [[next(rest) for _ in leaves] + [None] * len(heads.common) for leaves in heads.private]
    if heads.common:
        own[0][len(heads.private[0]) :] = rest
    return grads[: len(step.parameters)], own


def _averaged(step: Step, row: Row) -> Row:
    """The mean over processes of their rows."""
    from fastmtl import distributed  # here: not every torch is built with it

    rows = distributed.AveragedRows(step.parameters, 1, step.group)
    rows.append(row)
    return rows.combine(lambda M, *_: Info.of(torch.ones_like(M[..., 0]), M), step.context)[0]


class _Border:
    """The border between the losses' own parts of the graph and the shared part.

    Attributes:
        clean: whether only shared parameters lie beyond it.
    """

    def __init__(self, step: Step) -> None:
        shared = {id(p) for p in step.parameters}
        self._owner = owner = step.heads.owner
        self._leaves = leaves = {node: id(node.variable) in shared for node in owner if is_leaf(node)}
        self._hooked: list[tuple[Any, int, list[int]]] = []
        self.clean = True
        for node, t in owner.items():
            if node in leaves:
                continue
            if t != SEVERAL:
                beyond = [i for i, edge in enumerate(node.next_functions) if self._beyond(edge)]
                if beyond:
                    self._hooked.append((node, t, beyond))
            elif not all(leaves.get(behind_joints(edge)[0], True) for edge in node.next_functions):
                self.clean = False
        for loss in step.losses:
            if loss is None or edge_of(loss)[0] in self._owner:
                continue
            # An entry of a stack, where the pass cannot tell the losses apart.
            stack = edge_of(loss)[0].next_functions[0][0]
            self.clean &= not any(map(self._beyond, getattr(stack, "next_functions", ())))

    def begins(self, loss: Tensor) -> bool:
        """Whether a loss itself lies beyond the border: others depend on it, or it is a shared parameter."""
        return self._beyond(edge_of(loss))

    def _beyond(self, edge: Edge) -> bool:
        node = edge[0]
        owner = self._owner.get(node)
        if owner is None:  # a joint has none
            node = behind_joints(edge)[0]
            owner = self._owner.get(node)
        shared = self._leaves.get(node)
        return owner == SEVERAL if shared is None else shared

    @contextmanager
    def scaled(self, alpha: Tensor | None) -> Iterator[None]:
        """Within this context, gradients that cross the border are multiplied by the weights."""
        factors: dict[Any, Sequence[Tensor]] = {}
        handles = [] if alpha is None else [self._hook(*entry, alpha, factors) for entry in self._hooked]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _hook(node: Any, t: int, beyond: list[int], alpha: Tensor, factors: dict[Any, Sequence[Tensor]]) -> Any:
        def scale(grads: Sequence[Tensor | None], _: Any) -> tuple[Tensor | None, ...]:
            scaled = list(grads)
            for i in beyond:
                g = grads[i]
                if g is not None:
                    kind = g.dtype, g.device
                    if kind not in factors:  # once a pass, not once a task
                        factors[kind] = alpha.to(g).unbind()
                    scaled[i] = g * factors[kind][t]
            return tuple(scaled)

        return node.register_hook(scale)
