"""PCD: Not All Objectives Are Born Equal: Priority-Constrained Descent (Varam and AlHajri, TMLR 2026)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops, options
from fastmtl.info import Info
from fastmtl.methods.state import StatefulMethod
from fastmtl.ops.reference.present import is_present
from fastmtl.options import number, option
from fastmtl.rule import NOTHING, Context

__all__ = ["PCD"]

_EPS = torch.finfo(torch.float64).eps
_INFEASIBLE = 1e-10  # squared distance from the primary task's gradient to infinity, in a scale from 0 to 1


def _checked_tau(tau: object, name: str) -> float | Tensor:
    return options.fractions(tau, name, "a number or T - 1 numbers", "one number or shape [T - 1]")


class PCD(StatefulMethod):
    """PCD: the direction nearest to the first task's gradient that improves all other tasks by their share.

        d = argmin ‖d - g̃_0‖²    subject to    <g̃_t, d> >= τ_t ‖g̃_t‖² for t > 0        g = ‖g_0‖ d / ‖d‖

    with g̃_t = g_t / sqrt(v_t + ε) and v_t the bias-corrected moving average of ‖g_t‖². The first task is the
    primary one: its loss has priority, and the others (regularizers, auxiliary losses) must not get worse.

    Solved exactly: the problem is the projection of a vector onto the dual cone of T vectors in one more dimension
    (Lawson and Hanson's least distance programming), which UPGrad's solver computes. If the conditions exclude each
    other, g is g_0 and `info.residual` is infinite. If the first task is absent, or d is zero, g is zero.

    Without ε the weights do not change with the gradients' size, so `grad_scale=` matters only for tiny gradients.

    `info` has `alpha`, `gram` and `residual`.

    Source: Varam, AlHajri, "Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical
    Multi-Objective Optimization", TMLR 2026, and the authors' code.

    Args:
        tau: τ, one number in [0, 1] for all other tasks, or T - 1 of them.
        beta: decay of the moving average, in [0, 1).
        eps: ε, added to it.

    Raises:
        TypeError: an option of another kind.
        ValueError: a `tau` outside [0, 1], a `beta` outside [0, 1), a negative `eps`; (in a step) a `tau` whose length
            is not T - 1.
    """

    remembers = True
    mean: Tensor  # of squared norms, not corrected, float64 [T] or [B, T]
    steps: Tensor  # how many norms each average has, int64 [T] or [B, T]

    tau: float | Tensor = option(_checked_tau)
    beta: float = option(number(low=0, below=1))
    eps: float = option(number(low=0))

    def __init__(self, *, tau: float | options.Numbers = 0.02, beta: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__("mean", "steps")
        self.tau = tau  # type: ignore[assignment]
        self.beta = beta
        self.eps = eps
        self._copies = options.Copies()

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"tau={options.show_weights(self.tau)}, beta={self.beta}, eps={self.eps}"

    def check_tasks(self, T: int) -> None:
        if isinstance(self.tau, Tensor) and self.tau.shape[0] != T - 1:
            raise ValueError(
                f"tau: expected length {T - 1} (one for each task after the first of {T}), got {self.tau.shape[0]}"
            )

    def _counted(self, M: Tensor) -> Tensor:
        """Which tasks' norms enter their averages."""
        return is_present(M)

    def solve(self, M: Tensor, dtype: torch.dtype, context: Context = NOTHING) -> Info:
        self.check_tasks(M.shape[-1])
        wide = context.unscaled(M)
        finite = wide.isfinite().all(-1).all(-1)
        squares = wide.diagonal(dim1=-2, dim2=-1)
        average = self._average(squares, self._counted(wide), finite[..., None]) + self.eps
        scales = torch.where(is_present(wide) & (average > 0), average.rsqrt(), 0.0)
        C = wide * scales[..., :, None] * scales[..., None, :]
        mu, residual = self._multipliers(C)
        w = torch.cat([torch.ones_like(scales[..., :1]), mu], -1)
        squared = (w[..., None, :] @ C @ w[..., None]).squeeze(-1)
        rounding = 16 * _EPS * (w * C.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()).sum(-1, keepdim=True).square()
        length = torch.where(squared > rounding, (squares[..., :1] / squared).sqrt(), 0.0)
        there = is_present(wide)
        alpha = torch.where(there & there[..., :1], length * w * scales, 0.0)
        nothing = ~there[..., 0]
        residual = torch.where(nothing, 0.0, residual)
        return Info.of(
            torch.where(finite[..., None], alpha, torch.nan), M, residual=torch.where(finite, residual, torch.nan)
        )

    def _average(self, squares: Tensor, counted: Tensor, finite: Tensor) -> Tensor:
        """The corrected average of squared norms [..., T], including these; the state takes them in too."""
        mean = self._kept("mean", squares.shape, torch.float64, squares.device)
        steps = self._kept("steps", squares.shape, torch.int64, squares.device)
        new = torch.where(counted, self.beta * mean + (1 - self.beta) * squares, mean)
        count = steps + counted
        corrected = torch.where(count > 0, new / (1 - self.beta ** count.to(torch.float64)), 0.0)
        mean.copy_(torch.where(finite, new, mean))
        steps.copy_(torch.where(finite, count, steps))
        return corrected

    def _multipliers(self, C: Tensor) -> tuple[Tensor, Tensor]:
        """μ >= 0 [..., T - 1] with d = g̃_0 + Σ μ_t g̃_t, zero if the conditions exclude each other; and the residual.

        min ‖x‖ with <a_t, x> >= h_t: the projection of (0, 1) onto the dual cone of (0, 1) and the (a_t, -h_t) is a
        multiple of (x, 1), and zero if there is no such x.
        """
        T = C.shape[-1]
        if T == 1:
            return C.new_zeros((*C.shape[:-2], 0)), C.new_zeros(C.shape[:-2])
        first = C[..., 0, 0]
        unit = torch.where(first > 0, first, 1.0)[..., None]
        squares = C.diagonal(dim1=-2, dim2=-1)[..., 1:]
        tau = self._copies.get(self.tau, C) if isinstance(self.tau, Tensor) else self.tau
        h = tau * squares - C[..., 1:, 0]
        lifted = C.clone()
        lifted[..., 0, 0] = unit[..., 0]
        lifted[..., 0, 1:] = lifted[..., 1:, 0] = -h
        lifted[..., 1:, 1:] += h[..., :, None] * h[..., None, :] / unit[..., None]
        one = torch.zeros(T, dtype=torch.float64, device=C.device)
        one[0].fill_(1)
        v, residual = ops.dual_cone(lifted, one, False)
        last = v[..., :1] - (v[..., 1:] * h).sum(-1, keepdim=True) / unit
        possible = last > _INFEASIBLE
        mu = torch.where(possible, v[..., 1:] / last, 0.0)
        return mu, torch.where(possible[..., 0], residual, torch.inf)
