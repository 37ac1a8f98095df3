"""NTK weights: When and Why PINNs Fail to Train: A Neural Tangent Kernel Perspective (Wang et al., JCP 2022)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastmtl.gramian import examples
from fastmtl.inputs import describe
from fastmtl.options import integer, option
from fastmtl.scalarization.base import Scalarization, masked
from fastmtl.scalarization.updates import in_order, trainable

__all__ = ["NTK"]

_ONE_PASS = 1024  # residuals whose kernel [n, n] is small enough to be formed


class NTK(Scalarization):
    """NTK weights: Σ_t w_t L_t, weighted so that all residuals of a physics-informed network train at similar rates.

        w_t = Σ_s Tr(K_s) / Tr(K_t)        K_t = J_t J_tᵀ    J_t the Jacobian of task t's residuals

    The trace is the sum of squared norms of the residuals' gradients. The losses' gradients do not contain it, so
    `update` gets the residuals themselves, before squares and means:

        if step % 100 == 0:
            ntk.update([u(boundary) - g, pde(inside)], model)
        ntk.backward([...])                                          # the losses

    By default it estimates the traces from `probes` backward passes a task: E ‖Jᵀ z‖² = Tr(J Jᵀ) for random signs z.
    `probes=None` is exact: up to 1024 residuals [n], each at a point of its own, take one pass, which computes K_t
    itself (docs/per-example.md); others take one pass each. Before the first update the weights are 1. A task whose
    residuals are None keeps its trace; a task that depends on no parameter has weight 0.

    Source: Wang, Yu, Perdikaris, "When and Why PINNs Fail to Train: A Neural Tangent Kernel Perspective", Journal of
    Computational Physics 2022, Eq. 6.5 and 6.6.

    Args:
        tasks: number of tasks T.
        probes: number of backward passes for each task; None for exact traces.

    Raises:
        TypeError: `tasks` or `probes` is not an int.
        ValueError: one of them is less than 1.
    """

    traces: Tensor  # Tr(K_t), float64 [T]; infinite before they are known
    tasks: int = option(integer(1), fixed=True)
    probes: int | None = option(integer(1, optional=True))

    def __init__(self, tasks: int, *, probes: int | None = 16) -> None:
        super().__init__(tasks)
        self.probes = probes
        self.register_buffer("traces", torch.full((self.tasks,), torch.inf, dtype=torch.float64))

    def reset(self) -> None:
        """Forgets the traces."""
        super().reset()
        self.traces.fill_(torch.inf)

    def update(
        self,
        residuals: Sequence[Tensor | None] | Mapping[str, Tensor | None],
        parameters: nn.Module | Iterable[Tensor],
    ) -> None:
        """Computes the traces of the kernels, by backward passes that leave every `.grad` as it is.

        Args:
            residuals: T tensors of any shape, with their graphs, which are kept.
            parameters: what to differentiate with respect to: a module or parameters.

        Raises:
            TypeError: residuals that are not floating tensors.
            ValueError: the number of residuals is not T, or no parameter requires grad.
        """
        parts, trained = in_order(self, residuals, "residuals"), trainable(parameters)
        found = []
        for t, r in enumerate(parts):
            if r is not None and not (isinstance(r, Tensor) and r.is_floating_point()):
                raise TypeError(f"residuals[{t}]: expected a floating tensor or None, got {describe(r)}")
            found.append(self.traces[t] if r is None else self._trace(r, trained))
        traces = torch.stack(found)
        self.traces.copy_(torch.where(traces.isfinite(), traces, self.traces))

    def _trace(self, r: Tensor, parameters: list[Tensor]) -> Tensor:
        zero = self.traces.new_zeros(())
        if not r.requires_grad:
            return zero
        if self.probes is None and r.ndim == 1 and 1 < r.numel() <= _ONE_PASS:
            with contextlib.suppress(ValueError, NotImplementedError):  # points that mix, operations it cannot read
                return examples.gram(r[None], parameters).trace().to(zero)
        exact = self.probes is None or self.probes >= r.numel()
        passes = r.numel() if exact else self.probes or 1
        total = zero
        for i in range(passes):
            if exact:
                z = torch.zeros_like(r).view(-1)
                z[i].fill_(1)  # an assignment would copy a number from the host
                z = z.view_as(r)
            else:
                z = torch.randint_like(r, 2) * 2 - 1
            for g in torch.autograd.grad(r, parameters, z, retain_graph=True, allow_unused=True):
                if g is not None:
                    total = total + g.detach().to(torch.float64).square().sum()
        return total if exact else total / passes

    def _scalarize(self, L: Tensor, here: Tensor | None) -> tuple[None, Tensor]:
        known = self.traces.isfinite()
        there = known if here is None else known & here
        total = torch.where(there, self.traces, 0.0).sum()
        w = torch.where(self.traces > 0, total / self.traces, 0.0)
        return None, masked(torch.where(known, w, 1.0), here).to(L.dtype)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"tasks={self.tasks}, probes={self.probes}"
