"""The two losses of two parameters, their gradients, the optimum of their weighted sum and their Pareto front.

    f1 = log max(|½(-x1-7) - tanh(-x2)|, 5e-6) + 6          f2 = log max(|½(-x1+3) + tanh(-x2) + 2|, 5e-6) + 6
    g1 = ((-x1+7)² + 0.1(-x2-8)²)/10 - 20                    g2 = ((-x1-7)² + 0.1(-x2-8)²)/10 - 20
    c1 = max(tanh(x2/2), 0)      c2 = max(tanh(-x2/2), 0)    L_i = c1 f_i + c2 g_i

These are the formulas of the code behind the three papers that use the problem; the Aligned-MTL paper prints other
signs in f2, g1 and g2. What is minimised is L0 = a L1 + (1-a) L2.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BOUND", "INITS", "gradients", "losses", "optimum", "pareto_front", "task_weights"]

INITS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
BOUND = -20.0  # below both losses, everywhere


def losses(x: Tensor) -> Tensor:
    """L1 and L2 at `x` [..., 2], as a tensor [..., 2] of x's dtype."""
    x1, x2 = x.unsqueeze(-2).unbind(-1)  # [..., 1] each, beside the tasks
    sign = x.new_tensor([1.0, -1.0])  # the tasks are mirror images: (x1, task 1) for (-x1, task 2)
    h = (-x1 - 7 * sign) / 2 - sign * torch.tanh(-x2)
    f = _at_least(h.abs(), 5e-6).log() + 6
    g = ((-x1 + 7 * sign).square() + 0.1 * (-x2 - 8).square()) / 10 - 20
    turn = torch.tanh(x2 / 2)
    return _at_least(turn, 0.0) * f + _at_least(-turn, 0.0) * g


def _at_least(t: Tensor, bound: float) -> Tensor:
    # Not `clamp`: since torch 2.14 its derivative at the bound is 0, and no gradient would lead away from (0, 0).
    return torch.where(t >= bound, t, bound)


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """The losses at `x` [..., 2] and their gradients [..., task, parameter], both without a graph."""
    # One copy of x for each task: a single backward gives both gradients.
    copies = x.detach().expand(2, *x.shape).clone().requires_grad_()
    with torch.enable_grad():
        L = losses(copies)
        (G,) = torch.autograd.grad(L[0, ..., 0].sum() + L[1, ..., 1].sum(), copies)
    return L[0].detach(), G.movedim(0, -2)


def task_weights(a: Tensor) -> Tensor:
    """(a, 1-a) [..., 2] for a [...]."""
    return torch.stack([a, 1 - a], -1)


def optimum(a: Tensor) -> Tensor:
    """Where L0 is smallest, for every a [N] in [0, 1]: x* [N, 2], float64, found by L-BFGS.

    It starts in the lower half plane, where L0 comes near -20; in the upper one it stays above -6.3.
    """
    weights = task_weights(a.to(torch.float64))
    x = torch.tensor([0.0, -8.0], dtype=torch.float64).repeat(len(a), 1).requires_grad_()
    solver = torch.optim.LBFGS(
        [x], max_iter=200, tolerance_grad=1e-13, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def total() -> Tensor:
        solver.zero_grad()
        L0 = (weights * losses(x)).sum()
        L0.backward()
        return L0

    solver.step(total)
    return x.detach()


def pareto_front(points: int = 201) -> tuple[Tensor, Tensor]:
    """Points of the Pareto front, which is convex, by minimising L0 for a from 0 to 1.

    Returns:
        x [points, 2] and its losses [points, 2], float64.
    """
    x = optimum(torch.linspace(0, 1, points, dtype=torch.float64))
    return x, losses(x)
