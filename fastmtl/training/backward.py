"""From T losses to `.grad`: backward passes for the task gradients, one aggregation, one commit through autograd."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastmtl import gramian, once
from fastmtl.graph import SEVERAL, Leaves, Trunk, computes, edge_of, leaves_of, nothing_behind, trunk_of
from fastmtl.info import Info
from fastmtl.inputs import DTYPES, check_losses, describe, present_losses
from fastmtl.pipeline import aggregate_groups, aggregate_part, aggregate_rows
from fastmtl.rule import Context, Rule, context_of
from fastmtl.structure import tensors_of

__all__ = ["backward"]

# The gradients of one task: K tensors, None where it has none.
Row: TypeAlias = "list[Tensor | None]"
# Parameters with what is to be added to their `.grad`; one that occurs twice gets both.
Updates: TypeAlias = "list[tuple[Tensor, Tensor]]"
_PLAIN = (Tensor, torch.nn.Parameter)
_ENGINES = ("full", "gramian", "auto")


def backward(
    method: Rule,
    losses: Sequence[Tensor | None],
    shared: torch.nn.Module | Iterable[Tensor] | None,
    *,
    representation: Any,
    features: Any,
    batched: bool,
    groups: Sequence[Iterable[Tensor]] | None,
    scale_heads: bool,
    retain_graph: bool,
    process_group: Any,
    grad_scale: Tensor | float | None,
    engine: str,
) -> Info:
    """What is behind `Method.backward`: see there. Nothing is written before `_commit`."""
    losses = present_losses(check_losses(losses))
    method.check_tasks(len(losses))
    together = process_group is not None and process_group is not False
    unsaid, process_group = process_group is None, process_group if together else None
    _check_options(method, shared, representation, features, batched, groups, scale_heads, process_group)
    engine = _chosen_engine(engine, method, len(losses), representation, features, groups, process_group)
    names: dict[int, str] = {}
    if isinstance(shared, torch.nn.Module):
        names = {id(p): name for name, p in shared.named_parameters()}
        shared = [p for p in shared.parameters() if p.requires_grad]
    group = _distributed().gram_group(process_group) if together else None
    agree = None if group is None else lambda x: _distributed().agree(x, group)
    upper_bound = representation is not None
    cut = _checked_cut(representation, "representation") if upper_bound else _checked_cut(features, "features")
    parts = [] if groups is None else _checked_groups(groups)
    parameters = [p for part in parts for p in part] if shared is None else _checked_parameters(shared, "shared")
    _check_present(losses, together, known=bool(parameters or cut))
    context = context_of(method, losses, len(losses), grad_scale, agree)

    heads, trunk = leaves_of(losses, cut), trunk_of(edge_of(x) for x in cut)
    tied = heads.meet(trunk.leaves)
    if not parameters:
        # Everything behind a representation or features is shared; without them, what several losses reach.
        parameters = trunk.leaves if upper_bound else _own_of_model(trunk.leaves if cut else heads.shared())
        if not parameters and not upper_bound:
            raise ValueError("shared: expected parameters that at least two losses reach, found none: name them")
    if not upper_bound and cut and (tied or {id(p) for p in trunk.leaves} != {id(p) for p in parameters}):
        # The gradients of what lies on both sides, or is shared in part, do not all pass through the features.
        if batched:
            raise ValueError("batched: expected the shared parameters to be those behind the features, no others")
        cut, heads, trunk = [], leaves_of(losses, []), trunk_of([])
    reached = [*trunk.leaves, *heads.all(), *heads.idle]
    if unsaid and all(type(p) in _PLAIN for p in parameters):  # shards are averaged in the passes
        once.warn_alone(None, "process_group", "backward")
    if not upper_bound:
        if heads.joined and engine != "full":
            # The gramian engine knows no ways straight through a joint.
            engine, heads = ("full", heads) if engine == "auto" else (engine, leaves_of(losses, [], joints=False))
        if engine != "full" and _are_plain(parameters, engine):
            _check_owned(parameters, heads)
            with _without_tensor_hooks([*parameters, *heads.all()]):
                found = gramian.update(
                    method,
                    losses,
                    [(p, names.get(id(p), f"shared[{k}]")) for k, p in enumerate(parameters)],
                    heads,
                    context,
                    automatic=engine == "auto",
                    scale_heads=scale_heads,
                    retain_graph=retain_graph,
                )
            if found is not None:
                pairs, own, info = found
                del found
                pairs += _own_gradients(heads.without(parameters), own, info.alpha if scale_heads else None)
                _check_gathered(parameter for parameter, _ in pairs)
                _commit(pairs, reached)
                return info
        if _sharded(parameters, features, groups, scale_heads, process_group):
            if method.needs_losses:
                raise ValueError(
                    f"shared: expected plain parameters for {method!r}, which needs the losses, got shards"
                )
            # The other parameters get their gradients in the same passes.
            updates, info = _distributed().sharded_update(
                losses, parameters, method.solve, context, retain_graph=retain_graph
            )
            pairs = _pairs(parameters, updates)
            del updates
            _commit(pairs)
            return info
        heads = heads.without(parameters)

    with _without_tensor_hooks([*parameters, *heads.all()]):
        rows: Any = []  # or whatever takes a row at a time by `append`
        if upper_bound:
            own = _passes(losses, cut, heads, retain_graph, rows, closed=bool(tied or trunk.nested))
            _check_gathered([*parameters, *heads.all()])  # there may be no way on from the cut
            _warn_around(losses, rows, heads, trunk)
            cotangents, info = _aggregate_at(method, rows, cut, group, context)
            rows.clear()
            updates = _pass(cut, cotangents, parameters, retain_graph=retain_graph)
        else:
            if group is not None:
                rows = _distributed().AveragedRows(parameters, len(losses), group)
            if not cut:
                own = _passes(losses, parameters, heads, retain_graph, rows)
            else:
                at_features: list[Row] = []
                own = _passes(losses, cut, heads, retain_graph, at_features, closed=bool(trunk.nested))
                _check_gathered([*parameters, *heads.all()])
                (_batched_passes if batched else _passes_from)(cut, at_features, parameters, retain_graph, rows)
            updates, info = _aggregate(method, rows, parts, context)
            del rows  # they need not live while the gradients are committed
    pairs = _pairs(parameters, updates)
    del updates  # `_commit` has to be the only owner
    pairs += _own_gradients(heads, own, info.alpha if scale_heads else None)
    _check_gathered(parameter for parameter, _ in pairs)
    _commit(pairs, reached)
    return info


def _own_of_model(leaves: list[Tensor]) -> list[Tensor]:
    """The parameters among leaves: inputs may require grad too. All, where none is an `nn.Parameter`."""
    return [p for p in leaves if isinstance(p, torch.nn.Parameter)] or leaves


def _check_present(losses: Sequence[Tensor | None], together: bool, known: bool) -> None:
    """Raises ValueError where there is nothing to do; with other processes there is, if only to take part."""
    absent = sum(loss is None for loss in losses)
    if absent == len(losses) and not together:
        raise ValueError(f"losses: expected at least one loss that requires grad, got none among {len(losses)}")
    if absent and together and not known:
        raise ValueError(
            "shared: expected the shared parameters to be named where a loss is absent: processes with other losses "
            "would find others"
        )


def _warn_around(losses: Sequence[Tensor | None], rows: list[Row], heads: Leaves, trunk: Trunk) -> None:
    """Warns of losses that do not depend on the representation, and of ways that lead around it into the encoder."""
    if all(g is None for row in rows for g in row):  # an error, where no other process has any
        return
    missing = [t for t, loss in enumerate(losses) if loss is not None and all(g is None for g in rows[t])]
    if missing:
        once.warn(
            "representation not reached",
            once.caller(),
            f"representation: {_names(missing)} not depend on it and counted as absent; where its head reads something "
            "else than this very representation, its gradient is not aggregated",
        )
    around = {heads.owner[node] for node in trunk.nodes & heads.owner.keys() if computes(node)}
    if around:
        who = "several losses reach" if SEVERAL in around else f"losses[{min(around)}] reaches"
        once.warn(
            "representation passed by",
            once.caller(),
            f"representation: {who} what it is made of by a way around it; what comes that way is added plainly, not "
            "aggregated. Make that part of the representation, or use shared= in its place, which is exact",
        )


def _names(tasks: Sequence[int]) -> str:
    """Subject and auxiliary verb for these losses."""
    return ", ".join(f"losses[{t}]" for t in tasks) + (" does" if len(tasks) == 1 else " do")


def _aggregate(
    method: Rule, rows: Any, parts: list[list[Tensor]], context: Context
) -> tuple[Sequence[Tensor | None], Info]:
    """Gradients of the shared parameters from those of the tasks."""
    if not isinstance(rows, list):
        updates, info = rows.combine(method.solve, context)
        _check_reached([updates], "shared")  # not earlier: all processes have to get there
        return updates, info
    _check_reached(rows, "shared")
    return aggregate_groups(method, rows, parts, context) if parts else aggregate_rows(method, rows, None, context)


def _aggregate_at(
    method: Rule, rows: list[Row], representation: list[Tensor], group: Any, context: Context
) -> tuple[Sequence[Tensor | None], Info]:
    """One cotangent of the representation from those of the tasks."""
    if group is None:
        _check_reached(rows, "representation")
        return aggregate_rows(method, rows, None, context)
    flat = [g for row in rows for g in row]
    return aggregate_part(method, flat, representation, lambda M: _distributed().reduce_gram(M, group), context)


def _check_gathered(parameters: Iterable[Tensor]) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _distributed().check_gathered(parameters)


def _distributed() -> Any:
    from fastmtl import distributed  # here: not every torch is built with it

    return distributed


def _pairs(parameters: Sequence[Tensor], updates: Sequence[Tensor | None]) -> Updates:
    return [(p, update) for p, update in zip(parameters, updates, strict=True) if update is not None]


def _passes(
    losses: Sequence[Tensor | None],
    first: list[Tensor],
    heads: Leaves,
    retain_graph: bool,
    rows: Any,
    closed: bool = False,
) -> list[Row]:
    """One pass a loss: appends its gradients of `first` to `rows`; returns those of its own and of common leaves.

    An absent task has none.

    `closed` keeps gradients from passing behind `first`, where leaves lie on both sides or one of `first` behind
    another.
    """
    own: list[Row] = []
    last = max((t for t, loss in enumerate(losses) if loss is not None), default=-1)
    with nothing_behind(first if closed else ()):
        for t, loss in enumerate(losses):
            if loss is None:
                rows.append([None] * len(first))
                own.append([None] * len(heads.common))
                continue
            # Only the last pass may free what losses share; a closed trunk is still to be passed through.
            keep = retain_graph or closed or (heads.overlap and t < last)
            inputs = [*first, *heads.private[t], *heads.common]
            grads: Row = list(torch.autograd.grad(loss, inputs, retain_graph=keep, allow_unused=True))
            rows.append(grads[: len(first)])
            own.append(grads[len(first) :])
            del grads  # `_commit` has to be the only owner of what it hands over
    return own


def _pass(
    tensors: list[Tensor], cotangents: Sequence[Tensor | None], parameters: list[Tensor], **options: bool
) -> Sequence[Tensor | None]:
    """The parameters' gradients from cotangents at the tensors, None where there is none."""
    used = [k for k, g in enumerate(cotangents) if g is not None]
    if not used:
        return [None] * len(parameters)
    return torch.autograd.grad(
        [tensors[k] for k in used], parameters, [cotangents[k] for k in used], allow_unused=True, **options
    )


def _passes_from(
    features: list[Tensor], cotangents: list[Row], parameters: list[Tensor], retain_graph: bool, rows: Any
) -> None:
    """Appends the parameters' gradients from T rows of cotangents at the features: T passes."""
    last = max((t for t, row in enumerate(cotangents) if any(g is not None for g in row)), default=-1)
    for t, row in enumerate(cotangents):
        keep = retain_graph or t < last
        rows.append(list(_pass(features, row, parameters, retain_graph=keep)))


def _batched_passes(
    features: list[Tensor], cotangents: list[Row], parameters: list[Tensor], retain_graph: bool, rows: Any
) -> None:
    """The same in one vectorised pass: every operation behind the features sees a leading dimension of T."""
    stacked: Row = []
    for x, column in zip(features, zip(*cotangents, strict=True), strict=True):
        zero = torch.zeros_like(x)
        stacked.append(
            torch.stack([zero if g is None else g for g in column]) if any(g is not None for g in column) else None
        )
    grads = _pass(features, stacked, parameters, retain_graph=retain_graph, is_grads_batched=True)
    for t in range(len(cotangents)):
        rows.append([None if g is None else g[t] for g in grads])


def _own_gradients(heads: Leaves, own: list[Row], alpha: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Every parameter that is not shared with the gradient of its loss, or of the sum of its losses; empties `own`."""
    sums: dict[int, Tensor] = {}
    for t, parameters in enumerate(heads.private):
        grads = own[t]
        if alpha is not None:
            grads = [None if g is None else g * alpha[t].to(g.dtype) for g in grads]
        own[t] = []
        for k, g in enumerate(grads[len(parameters) :]):
            if g is not None:
                sums[k] = sums[k] + g if k in sums else g
        for k, parameter in enumerate(parameters):
            g, grads[k] = grads[k], None
            if g is not None:
                yield parameter, g
    for k in list(sums):
        yield heads.common[k], sums.pop(k)


@contextmanager
def _without_tensor_hooks(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Hooks of a parameter are for what reaches its `.grad`; `autograd.grad` would run them on every task's too."""
    silenced = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for hooks, _ in silenced:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, entries in silenced:
            hooks.update(entries)


class _Commit(torch.autograd.Function):
    """Identity on nothing: a node whose backward hands each parameter its gradient, so that autograd accumulates it."""

    @staticmethod
    def forward(ctx: Any, updates: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.updates = updates
        # On the parameters' device, or autograd would wait for another one's stream.
        return torch.empty(0, device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        updates, ctx.updates = ctx.updates, None
        result = (None, *updates)
        updates.clear()  # so that autograd finds itself the only owner and takes the buffers instead of copying them
        return result


def _commit(pairs: Updates, reached: Iterable[Tensor] = ()) -> None:
    """Adds the updates to `.grad` through AccumulateGrad: all hooks fire as in any backward.

    As in any backward they also fire for what was `reached` without a gradient: DistributedDataParallel waits for that.
    """
    parameters = [parameter for parameter, _ in pairs]
    updates: list[Tensor | None] = [update for _, update in pairs]
    pairs.clear()
    listed = {id(parameter) for parameter in parameters}
    for parameter in reached:
        if id(parameter) not in listed:
            listed.add(id(parameter))
            parameters.append(parameter)
            updates.append(None)
    if not parameters:
        return
    with torch.enable_grad():
        node = _Commit.apply(updates, *parameters)
    node.backward(torch.empty_like(node))


def _check_options(
    method: Rule,
    shared: Any,
    representation: Any,
    features: Any,
    batched: bool,
    groups: Any,
    scale_heads: bool,
    process_group: Any,
) -> None:
    given = {"shared": shared, "representation": representation, "features": features, "groups": groups}
    for one, other in (
        ("shared", "representation"),
        ("shared", "groups"),
        ("features", "representation"),
        ("groups", "representation"),
    ):
        if given[one] is not None and given[other] is not None:
            raise ValueError(f"{one}: expected None where {other} is given, got {describe(given[one])}")
    if batched and features is None:
        raise ValueError(
            "batched: expected False without features, got True: it is the pass behind them that is batched"
        )
    if groups is not None and scale_heads:
        raise ValueError("scale_heads: expected False with groups, got True: each group has task weights of its own")
    if groups is not None and process_group is not None:
        raise ValueError("process_group: expected None with groups, got a process group")
    if (groups is not None or process_group is not None) and not method.on_gram:
        what = "groups" if groups is not None else "process_group"
        raise ValueError(f"{what}: expected a method that works on the Gram matrix, got {describe(method)}")
    if process_group is not None and method.needs_losses:
        raise ValueError(
            f"process_group: expected a method that needs no losses (each process has others), got {method!r}"
        )


def _chosen_engine(
    engine: str, method: Rule, tasks: int, representation: Any, features: Any, groups: Any, process_group: Any
) -> str:
    """The engine, "full" for "auto" where another is not possible."""
    if engine not in _ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(map(repr, _ENGINES))}, got {engine!r}")
    obstacles = [
        f"{name}: expected None with engine='gramian', got {describe(value)}"
        for name, value in (
            ("representation", representation),  # its Gram matrix is another one
            ("features", features),
            ("groups", groups),  # one backward pass brings one combination
            ("process_group", process_group),  # averaged gradients have products across processes
        )
        if value is not None
    ]
    if not method.on_gram:
        obstacles.append(f"engine: expected 'full' for a method that needs more than the Gram matrix, got {engine!r}")
    if engine == "gramian" and obstacles:
        raise ValueError(obstacles[0])
    return "full" if obstacles or tasks == 1 else engine


def _are_plain(parameters: list[Tensor], engine: str) -> bool:
    if all(type(p) in _PLAIN for p in parameters):
        return True
    if engine == "gramian":
        other = next(p for p in parameters if type(p) not in _PLAIN)
        raise ValueError(f"shared: expected plain parameters with engine='gramian', got a {type(other).__name__}")
    return False


def _sharded(parameters: list[Tensor], features: Any, groups: Any, scale_heads: bool, process_group: Any) -> bool:
    """Whether these are parameters of `fully_shard`, whose gradients only whole backward passes bring."""
    if all(type(p) in _PLAIN for p in parameters) or not _distributed().is_sharded(parameters):
        return False
    options = {
        "features": features,
        "groups": groups,
        "scale_heads": scale_heads or None,
        "process_group": process_group,
    }
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}: expected none with parameters of fully_shard, got {describe(value)}")
    return True


def _check_owned(parameters: list[Tensor], leaves: Leaves) -> None:
    if not any(edge_of(p)[0] in leaves.owner for p in parameters):
        _check_reached([], "shared")


def _check_reached(rows: list[Row], name: str) -> None:
    if all(g is None for row in rows for g in row):
        what = "tensors" if name == "representation" else "parameters"
        raise ValueError(f"{name}: expected {what} that a loss depends on, but no loss reaches any of them")


def _checked_cut(structure: Any, name: str) -> list[Tensor]:
    """The tensors of a representation that gradients pass through, each once."""
    if structure is None:
        return []
    cut: dict[int, Tensor] = {}
    for x in tensors_of(structure):
        if x.requires_grad:
            if x.dtype not in DTYPES:
                raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16 tensors, got {describe(x)}")
            cut[id(x)] = x
    if not cut:
        raise ValueError(
            f"{name}: expected a tensor (or a nested structure) that requires grad, got {describe(structure)}"
        )
    return list(cut.values())


def _checked_groups(groups: Sequence[Iterable[Tensor]]) -> list[list[Tensor]]:
    if isinstance(groups, Tensor) or not isinstance(groups, (list, tuple)):
        raise TypeError(f"groups: expected a sequence of groups of parameters, got {describe(groups)}")
    if not groups:
        raise ValueError("groups: expected at least one group, got none")
    parts = [_checked_parameters(group, f"groups[{n}]") for n, group in enumerate(groups)]
    seen: dict[int, int] = {}
    for n, part in enumerate(parts):
        for p in part:
            if id(p) in seen:
                raise ValueError(
                    f"groups[{n}]: expected parameters of no other group, got one of groups[{seen[id(p)]}]"
                )
            seen[id(p)] = n
    return parts


def _checked_parameters(shared: Iterable[Tensor], name: str) -> list[Tensor]:
    if isinstance(shared, Tensor) or not isinstance(shared, Iterable):
        raise TypeError(f"{name}: expected an iterable of parameters, got {describe(shared)}")
    parameters: list[Tensor] = []
    seen: set[int] = set()
    for i, p in enumerate(shared):
        if not isinstance(p, Tensor):
            raise TypeError(f"{name}[{i}]: expected a parameter (tensor), got {describe(p)}")
        if p.dtype not in DTYPES:
            raise TypeError(f"{name}[{i}]: expected float32, float64, bfloat16 or float16, got {describe(p)}")
        if not p.is_leaf:
            raise ValueError(f"{name}[{i}]: expected a leaf tensor (a parameter), got an intermediate {describe(p)}")
        if not p.requires_grad:
            raise ValueError(f"{name}[{i}]: expected a parameter that requires grad, got a frozen {describe(p)}")
        if id(p) not in seen:  # tied parameters are listed twice by some models
            seen.add(id(p))
            parameters.append(p)
    if not parameters:
        raise ValueError(f"{name}: expected at least one parameter, got none")
    return parameters
