"""Averaged gradients that are never formed: the gramian engine under data parallelism.

The gradient of a weight on rank r is B_rᵀ A_r, from cotangents and activations. The average over ranks is aggregated;
its inner products are those of all ranks' concatenated factors, divided by W². For each weight the smaller of two goes
over the wire: its factors, to the one rank that multiplies them, or the T gradients, of which each rank gets its
share of the columns (`AveragedRows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastmtl.distributed.averaged import AveragedRows
from fastmtl.distributed.collectives import all_reduce, gather, together
from fastmtl.gramian import CANCELLED, Contraction, Trunk, gram_of_factors, working_dtype
from fastmtl.graph import Edge
from fastmtl.info import Info
from fastmtl.inputs import DTYPES, Row
from fastmtl.pipeline import coarsest
from fastmtl.rule import Context, Rule, solved

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["averaged_update"]

_DTYPES = sorted(DTYPES, key=str)


class _Form(NamedTuple):
    """What a rank has of the T gradients of a parameter, in integers, as it tells other ranks.

    Attributes:
        kind: `_NOTHING`, `_FACTORS`, `_ROWS`, or `_WITH`, a bias that goes with the weight.
        rows: N, of its factors.
        groups: g.
        depth: I.
        width: O.
        side: which dimension of the weight the columns of B are.
        indexed: whether A has indices instead of rows.
        dtype: of the factors, by number.
        other: the number of the bias that goes with a weight, or of the weight that a bias goes with; -1 for none.
    """

    kind: int = 0
    rows: int = 0
    groups: int = 0
    depth: int = 0
    width: int = 0
    side: int = 0
    indexed: int = 0
    dtype: int = 0
    other: int = -1

    def fits(self, other: _Form) -> bool:
        """Whether the factors of two ranks can be concatenated."""
        return self._replace(rows=0) == other._replace(rows=0)

    def numbers(self, T: int) -> int:
        """How many numbers the factors consist of."""
        return self.groups * self.rows * ((1 if self.indexed else self.depth) + T * self.width)


_NOTHING, _FACTORS, _ROWS, _WITH = range(4)


def averaged_update(
    trunk: Trunk, parameters: Sequence[Tensor], method: Rule, context: Context, group: ProcessGroup
) -> tuple[list[tuple[Tensor, Tensor]], Info]:
    """The aggregation of gradients averaged over ranks, from the results of T cotangents on each rank.

    Ranks first exchange what they have, since batch sizes and tasks may differ; the host waits for that.

    Args:
        trunk: the results of the T cotangents on this rank.
        parameters: the K shared parameters, the same and in the same order on every rank.
        method: a method that works on the Gram matrix.
        context: the step's inputs besides gradients.
        group: from `gram_group`.

    Returns:
        The parameters with a gradient on any rank, each with its update, the same bits on every rank; and the info.

    Raises:
        RuntimeError: a collective failed.
    """
    T, W = len(trunk.own), dist.get_world_size(group)
    here = _Here(trunk, parameters)
    table = _told(here.forms, parameters[0].device, group)
    factored = [k for k in range(len(parameters)) if _is_factored(k, table, T, parameters[k])]
    biases = {form.other for k in factored for rank in table if (form := rank[k]).kind == _FACTORS} - {-1}
    rest = [
        k
        for k in range(len(parameters))
        if k not in factored and k not in biases and any(rank[k].kind != _NOTHING for rank in table)
    ]
    M = torch.zeros(T, T, dtype=torch.float64, device=parameters[0].device)
    for n, k in enumerate(factored):
        factors = _gathered(here.factors(k), [rank[k] for rank in table], T, parameters[k], n % W, group)
        if factors is not None:
            M += _products(factors, biased=any(rank[k].other >= 0 for rank in table)).to(M.device) / W**2

    def weigh(M: Tensor, _: torch.dtype, context: Context) -> Info:
        return solved(method, M, coarsest(parameters), context)

    rows = AveragedRows([parameters[k] for k in rest], T, group, device=M.device)
    for t in range(T):
        rows.append(here.row(t, rest))
    updates, info = rows.combine(weigh, context, beside=M)
    found = [(parameters[k], g) for k, g in zip(rest, updates, strict=True) if g is not None]
    whole = [*factored, *sorted(biases)]
    return found + _mean(here.combined(factored, info.alpha), [parameters[k] for k in whole], group), info


class _Here:
    """What this rank has, by the numbers of the parameters."""

    def __init__(self, trunk: Trunk, parameters: Sequence[Tensor]) -> None:
        self._trunk = trunk
        numbers = {id(p): k for k, p in enumerate(parameters)}
        self._parameters = parameters
        self._weights: dict[int, list[Contraction]] = {}
        self._factors: dict[int, tuple[Tensor, Tensor]] = {}
        self.forms = [_Form()] * len(parameters)
        for c in trunk.todo.contractions:
            if any(use.edge in trunk.arrived for use in c.uses):
                self._weights.setdefault(numbers[id(c.parameter)], []).append(c)
        for k, parts in self._weights.items():
            bias = -1 if parts[0].bias is None else numbers[id(parts[0].bias)]
            self.forms[k] = self._form_of(k, parts, bias)
            if bias >= 0:
                self.forms[bias] = _Form(_WITH, other=k)
        self._rows: dict[int, Row] = {numbers[id(p)]: row for p, row in trunk.explicit}
        for t, own in enumerate(trunk.own):
            for p, g in own:
                if g is not None:
                    self._rows.setdefault(numbers[id(p)], [None] * len(trunk.own))[t] = g
        for k in self._rows:
            self.forms[k] = _Form(_ROWS)

    def _form_of(self, k: int, parts: list[Contraction], bias: int) -> _Form:
        arrived = self._arrived(parts)
        dtypes = {g.dtype for g in arrived.values()}
        found = parts[0].factors(arrived, working_dtype(dtypes)) if len(parts) == 1 else None
        if found is None:
            return _Form(_ROWS, other=bias)
        A, B = self._factors[k] = found
        _, groups, rows, width = B.shape
        depth = A.shape[-1] if A.dim() > 1 else 1
        return _Form(
            *(_FACTORS, rows, groups, depth, width, parts[0].side, int(A.dim() == 1)),
            *(_DTYPES.index(B.dtype), bias),
        )

    def factors(self, k: int) -> tuple[Tensor, Tensor] | None:
        """The factors of a parameter; None if it has none here."""
        return self._factors.get(k)

    def row(self, t: int, which: Sequence[int]) -> Row:
        """Task t's gradients of these parameters."""
        of_weights: dict[int, Tensor] = {}
        for c in (c for k in which for c in self._weights.get(k, ())):
            for p, g in c.gradients({edge: g[t] for edge, g in self._arrived([c]).items()}):
                of_weights[id(p)] = of_weights[id(p)] + g if id(p) in of_weights else g
        return [self._rows[k][t] if k in self._rows else of_weights.get(id(self._parameters[k])) for k in which]

    def combined(self, which: Sequence[int], alpha: Tensor) -> dict[int, Tensor]:
        """Σ_t α_t g_t of the gradients of these parameters, which have factors, and of their biases; by id."""
        weights = [c for k in which for c in self._weights.get(k, ())]
        part = Trunk(self._trunk.todo._replace(contractions=weights), self._arrived(weights), [])
        return {id(p): g for p, g in part.combined(alpha)}

    def _arrived(self, weights: Sequence[Contraction]) -> dict[Edge, Tensor]:
        """The cotangents that arrived at their uses."""
        edges = {use.edge for c in weights for use in c.uses}
        return {edge: g for edge, g in self._trunk.arrived.items() if edge in edges}


def _told(forms: Sequence[_Form], device: torch.device, group: ProcessGroup) -> list[list[_Form]]:
    """The forms of all ranks."""
    mine = torch.tensor(forms, dtype=torch.int64).to(device)
    whole = mine.new_empty(dist.get_world_size(group), *mine.shape)
    with together():
        dist.all_gather(list(whole), mine, group=group)
    return [[_Form(*form) for form in rank] for rank in whole.tolist()]


def _is_factored(k: int, table: Sequence[Sequence[_Form]], T: int, parameter: Tensor) -> bool:
    """Whether a weight's factors are sent: those of all ranks that have a gradient are alike, and they are smaller."""
    forms = [form for rank in table if (form := rank[k]).kind != _NOTHING]
    if not forms or any(form.kind != _FACTORS or not form.fits(forms[0]) for form in forms):
        return False
    bias = forms[0].other
    if bias >= 0 and any(rank[bias] not in (_Form(), _Form(_WITH, other=k)) for rank in table):
        return False
    return sum(form.numbers(T) for form in forms) < 2 * T * parameter.numel()


def _gathered(
    mine: tuple[Tensor, Tensor] | None,
    forms: Sequence[_Form],
    T: int,
    parameter: Tensor,
    owner: int,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor] | None:
    """The factors of all ranks, concatenated, on the rank that multiplies them; None on the others."""
    like = next(form for form in forms if form.kind == _FACTORS)
    g, N, dtype = like.groups, max(form.rows for form in forms), _DTYPES[like.dtype]
    # Rows of zeros contribute nothing.
    shape, device = (N,) if like.indexed else (g, N, like.depth), parameter.device
    A = torch.zeros(shape, dtype=torch.int64 if like.indexed else dtype, device=device)
    B = torch.zeros(T, g, N, like.width, dtype=dtype, device=device)
    if mine is not None:
        A.narrow(A.dim() - 1 if like.indexed else 1, 0, mine[0].shape[0 if like.indexed else 1]).copy_(mine[0])
        B[:, :, : mine[1].shape[2]] = mine[1]
    all_A, all_B = gather(A, owner, group), gather(B, owner, group)
    if all_A is None or all_B is None:
        return None
    there = [r for r, form in enumerate(forms) if form.kind == _FACTORS]
    return torch.cat([all_A[r] for r in there], 0 if like.indexed else 1), torch.cat([all_B[r] for r in there], 2)


def _products(factors: tuple[Tensor, Tensor], biased: bool) -> Tensor:
    """Their Gram matrix [T, T], float64."""
    A, B = factors
    M, size = gram_of_factors([(A, B)], biased)
    if A.device.type == "cpu" and (size > CANCELLED * M.diagonal()).any():  # nothing waits for a GPU
        M = gram_of_factors([(A.double() if A.is_floating_point() else A, B.double())], biased)[0]
    return M


def _mean(here: dict[int, Tensor], parameters: Sequence[Tensor], group: ProcessGroup) -> list[tuple[Tensor, Tensor]]:
    """The parameters with the average over ranks of each one's gradient; a rank without one counts as zero."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in parameters:
        kinds.setdefault((p.dtype, p.device), []).append(p)
    found: list[tuple[Tensor, Tensor]] = []
    for members in kinds.values():
        flat = torch.cat([here.get(id(p), torch.zeros_like(p)).reshape(-1) for p in members])
        flat /= dist.get_world_size(group)  # before the sum, as DistributedDataParallel does: float16 must not overflow
        all_reduce(flat, group)
        parts = flat.split([p.numel() for p in members])
        found += [(p, part.view(p.shape)) for p, part in zip(members, parts, strict=True)]
    return found
