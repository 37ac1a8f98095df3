"""ExcessMTL: Robust Multi-Task Learning with Excess Risks (He et al., ICML 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.info import Info
from fastmtl.inputs import check_matrix, has_numbers
from fastmtl.methods.memory import GradientMemory, Pieces, present
from fastmtl.options import integer, number, option
from fastmtl.rule import NOTHING, Context

__all__ = ["ExcessMTL"]

_EPS = 1e-7  # under the root and under the initial risk, as the authors do


class ExcessMTL(GradientMemory):
    """ExcessMTL: more weight for tasks that are far from their optimum, measured by their gradients.

        S_t ← S_t + g_t²        r_t = Σ_p g_tp² / sqrt(S_tp + 1e-7)        w_t ∝ w_t exp(η r_t / r_t(0))        g = wᵀ G

    r_t estimates the excess risk L_t - min L_t with AdaGrad's diagonal Hessian (their Eq. 6 to 9). As in TorchJD, the
    exponent of the first step is r_t itself, which becomes r_t(0). With `warmup` the weights stay 1/T for that many
    steps, and the mean of their r_t becomes r_t(0), as the paper's appendix recommends.

    An absent task keeps its S and w; the others share the remaining weight. Not homogeneous: with a loss scaler pass
    `grad_scale=`.

    `info` has `alpha` and `gram`.

    Source: He, Zhou, Zhang, Zhao, Yun, "Robust Multi-Task Learning with Excess Risks", ICML 2024, and the authors'
    code.

    Args:
        step_size: η, the step size of the weights: 1 as in TorchJD (LibMTL: 0.01).
        warmup: how many steps only collect risks.

    Raises:
        TypeError: an option of another kind.
        ValueError: `step_size` is not positive, `warmup` is negative; (in a step) gradients whose sizes differ from the
            first step's.
    """

    squares: Tensor  # S, [T, P] or [B, T, P]
    w: Tensor  # log of the weights, float64 [T] or [B, T]
    risks: Tensor  # r(0), or during the warm-up the sum, float64 [T] or [B, T]
    steps: Tensor  # how many each task has had, int64 [T] or [B, T]

    step_size: float = option(number(above=0))
    warmup: int = option(integer(0))

    def __init__(self, *, step_size: float = 1.0, warmup: int = 0) -> None:
        super().__init__("squares", "w", "risks", "steps")
        self.step_size = step_size
        self.warmup = warmup

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"step_size={self.step_size}, warmup={self.warmup}"

    def _present(self, M: Tensor) -> tuple[Tensor, Tensor]:
        return present(M)

    def weighting(self, G: Tensor) -> Tensor:
        """The task weights, float64 [T] or [B, T], from gradients [T, P] or [B, T, P]: a step without aggregation.

        Raises:
            TypeError: as `__call__`.
            ValueError: as `__call__`.
        """
        check_matrix(G)
        return self._weigh(Pieces(G, G.shape[-2], G.new_empty((*G.shape[:-2], G.shape[-1]))), NOTHING).alpha

    def _aggregate(self, G: Pieces, context: Context) -> Info:
        info = self._weigh(G, context)
        G.combine(info.alpha)
        return info

    def _weigh(self, G: Pieces, context: Context) -> Info:
        M = G.gram()
        there, finite = self._present(M)
        shape, device = (*G.batch, G.T), M.device
        S = self._kept("squares", (*shape, G.P), G.kept, device)
        logs = self._kept("w", shape, torch.float64, device)
        first = self._kept("risks", shape, torch.float64, device)
        steps = self._kept("steps", shape, torch.int64, device)
        counted = there & finite
        risks = self._risks(S, G, counted, context.grad_scale)
        warm, known = steps < self.warmup, steps > 0
        first.copy_(torch.where(counted & (warm | ~known), first + risks, first))
        start = first / max(self.warmup, 1)
        relative = torch.where(known | (self.warmup > 0), risks / (start + _EPS), risks)
        new = torch.where(counted & ~warm, logs + self.step_size * relative, logs)
        steps += counted
        if has_numbers(counted) and bool(counted.all()):
            logs.copy_(new.log_softmax(-1))
            return Info.of(logs.exp(), M)
        # The sum stays 1, and absent tasks keep their share of it.
        total = torch.where(there, logs, -torch.inf).logsumexp(-1, keepdim=True)
        shift = torch.where(there, new, -torch.inf).logsumexp(-1, keepdim=True) - total
        logs.copy_(torch.where(counted, new - shift, logs))
        alpha = torch.where(there, torch.where(there, new, -torch.inf).softmax(-1), 0.0)
        alpha = torch.where(finite, alpha, torch.nan)
        return Info.of(alpha, M)

    def _risks(self, S: Tensor, G: Pieces, where: Tensor, grad_scale: Tensor | float | None) -> Tensor:
        """The risks r [..., T] of this step; adds the squares to S."""
        risks = torch.zeros(where.shape, dtype=torch.float64, device=S.device)
        for t, start, stop, g in G.merged(S.dtype):
            if g is None:
                continue
            row = S[..., t, start:stop]
            g = g.to(S.dtype) if grad_scale is None else (g / grad_scale).to(S.dtype)
            squares = torch.where(where[..., t, None], g.square(), 0.0)
            row += squares
            # Not the root itself: torch spreads it over threads even for a few numbers.
            risks[..., t] += squares.mul_((row + _EPS).rsqrt_()).sum(-1, dtype=torch.float64)
        return risks
