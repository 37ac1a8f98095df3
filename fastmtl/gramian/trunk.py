"""What the shared parameters get from T cotangents: the Gram matrix and, with task weights, the gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.gramian.contraction import CANCELLED
from fastmtl.gramian.plan import Plan
from fastmtl.graph import Edge
from fastmtl.info import Info
from fastmtl.inputs import Row
from fastmtl.pipeline import coarsest, combine_into, gram_of
from fastmtl.rule import Context, Rule, solved

__all__ = ["Trunk", "without_autocast", "working_dtype"]


class Trunk(NamedTuple):
    """What T cotangents at the frontier brought.

    Attributes:
        todo: the plan that it is for.
        arrived: for operations with a closed form, all T cotangents of their output [T, ...].
        explicit: parameters with their T gradients.
        own: for each task the parameters that its loss alone reaches, with their gradients.
    """

    todo: Plan
    arrived: dict[Edge, Tensor]
    explicit: list[tuple[Tensor, Row]]
    own: Sequence[Sequence[tuple[Tensor, Tensor | None]]] = ()

    def aggregated(
        self, parameters: Sequence[Tensor], method: Rule, context: Context
    ) -> tuple[list[tuple[Tensor, Tensor]], Info]:
        """The parameters that were reached, with their gradients, and the info."""
        info = solved(method, self.gram(len(self.own), parameters[0].device), coarsest(parameters), context)
        updates = self.combined(info.alpha)
        for alpha, found in zip(info.alpha, self.own, strict=True):
            updates += [(p, g * alpha.to(g)) for p, g in found if g is not None]
        return updates, info

    def gram(self, T: int, device: torch.device) -> Tensor:
        """M [T, T], float64."""
        M = torch.zeros(T, T, dtype=torch.float64, device=device)
        if self.explicit:
            parameters = [p for p, _ in self.explicit]
            M += gram_of([rows[t] for t in range(T) for _, rows in self.explicit], T, parameters).to(device)
        parts = []
        for contraction in self.todo.contractions:
            dtypes = {self.arrived[use.edge].dtype for use in contraction.uses if use.edge in self.arrived}
            if dtypes:
                own, size = contraction.gram(self.arrived, working_dtype(dtypes))
                parts.append((contraction, own.to(device), size.to(device)))
        M += sum(own for _, own, _ in parts)
        if device.type == "cpu":  # nothing waits for a GPU
            allowed = CANCELLED * M.diagonal()
            if (sum(size for _, _, size in parts) > allowed).any():
                for contraction, own, size in parts:
                    if (len(parts) * size > allowed).any():
                        M += contraction.gram(self.arrived, torch.float64)[0] - own
        for t, found in enumerate(self.own):
            M[t, t] += sum(g.double().square().sum().to(device) for _, g in found if g is not None)
        return M

    def combined(self, alpha: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The parameters that were reached, with Σ_t α_t g_t of their gradients: what one more pass would bring."""
        updates = [(p, torch.empty_like(p)) for p, _ in self.explicit]
        if updates:
            rows = [rows[t] for t in range(len(alpha)) for _, rows in self.explicit]
            combine_into([g for _, g in updates], rows, alpha)
        cotangents = {}
        for edge, g in self.arrived.items():
            cotangents[edge] = out = torch.empty_like(g[0], memory_format=torch.contiguous_format)
            ops.combine(g.flatten(1), alpha.to(g.device), out.view(-1))
        for contraction in self.todo.contractions:
            updates += contraction.gradients(cotangents)
        return updates


def working_dtype(dtypes: set[torch.dtype]) -> torch.dtype:
    """The dtype for products of tensors of these dtypes: float32 only if torch does not round its operands (TF32)."""
    exact = torch.get_float32_matmul_precision() == "highest"
    doubled = not dtypes.isdisjoint((torch.float64, torch.complex128))
    return torch.float32 if exact and not doubled else torch.float64


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """A context in which products keep the dtype of their operands, even if the caller has autocast on."""
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield
