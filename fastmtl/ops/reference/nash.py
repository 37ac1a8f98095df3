"""The bargaining solution M α = α^-p: Nash-MTL (p = 1) and FairGrad (p = 1 / its alpha).

The algorithm is that of csrc/math/nash.h, which has the mathematics.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmtl.ops.reference.present import solve_each

__all__ = ["nash"]

EPS = torch.finfo(torch.float64).eps
MAX_STEPS = 200


def nash(M: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """α > 0 with M α = α^-power, elementwise, by Newton's method on the convex potential of which it is the minimum.

    Args:
        M: [..., T, T].
        power: p > 0.

    Returns:
        α [..., T] and the residual [...], both float64: the largest error of the equations (of unit gradients),
        relative to their value, or to 2^-22 of their terms if these cancel further; infinity and α = 0 if there is no
        solution because a convex combination of the gradients vanishes; NaN where M is not finite.
    """
    return solve_each(M, lambda one, there: _nash(one, power))


def _nash(M: Tensor, power: float) -> tuple[Tensor, Tensor]:
    alpha, residual, positive = _newton(M, power)
    # For other powers, terms drop below rounding errors long before γ shows that a combination vanishes.
    if residual == math.inf or (not positive and power != 1.0 and _newton(M, 1.0)[1] == math.inf):
        return torch.zeros_like(M[0]), M.new_full((), math.inf)
    return alpha, M.new_full((), residual)


def _newton(M: Tensor, power: float) -> tuple[Tensor, float, bool]:
    """α, its residual, and whether M α > 0 beyond rounding errors (which proves that there is a solution)."""
    T = M.shape[-1]
    largest = M.diagonal().max()
    h = (M.diagonal() / largest) ** ((power - 1.0) / (2.0 * (power + 1.0)))
    scale = h / M.diagonal().sqrt()
    gamma, best = torch.ones_like(h), torch.ones_like(h)
    least, stalled, near = math.inf, 0, False
    for step in range(MAX_STEPS + 1):
        product = scale * (M @ (scale * gamma))
        terms = scale * (M.abs() @ (scale * gamma))
        form = gamma @ product
        if form <= 4 * T * EPS * (h @ gamma).square():
            return gamma, math.inf, False
        if step == 0:  # start at the best multiple of γ = 1
            multiple = (h.square().sum() / form) ** (1.0 / (1.0 + power))
            gamma, product, terms = gamma * multiple, product * multiple, terms * multiple
        wanted = h.square() * gamma**-power
        root = (wanted * gamma).sqrt()
        error = (product - wanted).abs()
        residual = float((error / torch.maximum(wanted, 2.0**-22 * terms)).amax())
        residual = residual if residual < math.inf else math.inf  # also for NaN, from powers that overflow
        solved = near and bool((error <= EPS * (4 * terms + 4 * (1 + power) * wanted)).all())
        stalled = stalled + 1 if near and not residual <= 0.5 * least else 0
        if residual < least or solved or step == 0:
            least, best = residual, gamma
        if solved or stalled == 3 or step == MAX_STEPS:
            break
        y = scale * gamma / root
        # Near the end, equations that hold to rounding drive no step: their noise would disturb the others.
        driving = error > (4 * EPS if near else 0.0) * terms
        right = torch.where(driving, (wanted - product) * gamma / root, 0.0)
        direction = _solve(y[:, None] * M * y, power, right)
        fall = float(direction @ right)
        if not fall > 0.0:  # solved exactly, or overflown
            break
        s = direction / root
        near = bool((1 + power) * s.abs().max() < 0.2)
        curvature = max(fall - power * float(direction @ direction), 0.0)
        rise = float((s * gamma) @ product)
        gamma = gamma * (1 + (1.0 if near else _length(power, rise, curvature, root.square(), s)) * s)
    positive = bool((product > 16 * EPS * terms).all())
    return largest ** (0.5 - 1.0 / (1.0 + power)) * scale * best, least, positive


def _solve(E: Tensor, shift: float, right: Tensor) -> Tensor:
    """(E + shift)^-1 right for positive semi-definite E, by Uᵀ D^-1 U with U's diagonal D, none of it below `shift`.

    E is graded: elimination keeps the accuracy of its small rows, which an eigendecomposition would not.
    """
    U = E.clone()
    for i in range(len(U)):
        U[i, i] = U[i, i].clamp_min(0.0) + shift
        row = U[i, i + 1 :]
        U[i + 1 :, i + 1 :] -= row[:, None] * (row / U[i, i])
    v = torch.linalg.solve_triangular(U.triu().mT, right[:, None], upper=False)
    solution: Tensor = torch.linalg.solve_triangular(U.triu(), U.diagonal()[:, None] * v, upper=True)
    return solution[:, 0]


def _length(power: float, rise: float, curvature: float, q: Tensor, s: Tensor) -> float:
    """How far to go along γ (1 + t s): until the potential's slope is at most a tenth of that at 0."""
    shrinking = float((-s).max())
    most = 0.999 / shrinking if shrinking > 0.999e-8 else 1e8
    start = rise - float((q * s).sum())
    low, high, length = 0.0, most, min(most, 1.0)
    for _ in range(30):
        at = length
        terms = q * s * (1 + at * s) ** -power
        slope = rise + at * curvature - float(terms.sum())
        if abs(slope) <= -0.1 * start or (slope < 0.0 and at >= most):
            return at
        low, high = (at, high) if slope < 0.0 else (low, at)
        length = at - slope / (curvature + power * float((terms * s / (1 + at * s)).sum()))
        if slope < 0.0 and high == most:  # no upper bound has been found yet
            length = min(length, 8 * at, most)
        elif not low < length < high or slope > -start:  # Newton's steps descend a steep wall slowly
            length = (low + high) / 2
    return low if low > 0.0 else length
