"""Quadratic problems in the task weights: MGDA, projections on the dual cone, CAGrad.

All are solved on gradients of unit length, C = D^-1/2 M D^-1/2 with D the diagonal of M, and come down to

    min ½ xᵀCx - pᵀx    over    x >= 0,

by proximal points and the active-set method of Lawson and Hanson, in float64 on the host, one matrix after the other.
Absent tasks are taken out of M first. csrc/math has the derivations, and a faster way to the same solution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.ops.reference.present import solve_each

__all__ = ["cagrad", "dual_cone", "mgda"]

EPS = torch.finfo(torch.float64).eps


def mgda(M: Tensor) -> tuple[Tensor, Tensor]:
    """The shortest vector of the convex hull (Désidéri 2012; Sener and Koltun 2018): argmin αᵀMα, α >= 0, Σα = 1.

    Args:
        M: [..., T, T].

    Returns:
        α [..., T] and the residual [...], both float64: by how much Wolfe's criterion (Mα)_t >= αᵀMα, with equality
        where α_t > 0, is violated, relative to the lengths of the gradients; NaN where M is not finite.
    """
    return solve_each(M, lambda one, there: _mgda(one))


def dual_cone(M: Tensor, weights: Tensor | None, each: bool) -> tuple[Tensor, Tensor]:
    """The projection of Gᵀu on the dual cone: argmin vᵀMv over v >= u (Quinton and Rey 2024, proposition 1).

    Args:
        M: [..., T, T].
        weights: [T] float64, or None for 1/T each.
        each: return the sum of the solutions for u = weights_i e_i (UPGrad), not the one for u = weights (DualProj).

    Returns:
        α [..., T] and the residual [...], both float64: the largest violation of Mv >= 0, with equality where v > u,
        relative to the lengths of the gradients; infinite where α overflows, NaN where M is not finite.
    """
    T = M.shape[-1]

    def solve(one: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        u = one.new_full((T,), 1 / T) if weights is None else weights.to(one)
        u = u[there]
        if not each:
            return _dual_cone(one, u)
        projected = [_dual_cone(one, row) for row in torch.diag(u)]
        return sum((v for v, _ in projected), torch.zeros_like(u)), torch.stack([r for _, r in projected]).amax()

    return solve_each(M, solve)


def cagrad(M: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """Conflict-averse gradient descent (Liu et al. 2021), without its final rescaling.

    α = 1/T + (ρ / ‖g_w‖) w with ρ = c ‖g0‖, g0 the sum of the gradients over T, and w the minimiser of g_wᵀg0 + ρ ‖g_w‖
    over the simplex; where zero is in the convex hull, the nearest point to g0 of the dual cone.

    Args:
        M: [..., T, T].
        c: radius around the mean gradient, relative to its length.

    Returns:
        α [..., T] and the residual [...], both float64: the duality gap as every gradient sees it, relative to its
        length and to the lengths of what is summed; NaN where M is not finite.
    """
    return solve_each(M, lambda one, there: _cagrad(one, 1 / M.shape[-1], c))


def _mgda(M: Tensor) -> tuple[Tensor, Tensor]:
    C, norms = _unit_rows(M)
    b = norms.min() / norms
    y, residual, _ = _shortest_point(C, b)
    return y * b / (y @ b), residual


def _shortest_point(C: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The y >= 0 with Σy = 1 of least yᵀCy / (bᵀy)², the residual of Wolfe's criterion, and yᵀCy."""
    x, slope = _nonnegative(C + b[:, None] * b, b, 1.0)
    total = x.sum()
    y = x / total
    square = y @ (slope + b * (1 - b @ x)) / total
    return y, _violation(x, slope) / total, square


def _dual_cone(M: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    C, norms = _unit_rows(M)
    unit = torch.frexp(u.abs().amax()).exponent  # weights in units of 2^unit, so that no length overflows
    lengths = torch.ldexp(u, -unit) * norms
    longest = lengths.abs().amax()
    if longest == 0:
        return u.clone(), M.new_zeros(())
    lengths = lengths / longest
    size = float(lengths.abs().sum())
    p = -(C @ lengths)
    x, slope = _nonnegative(C, p, size)
    residual = _violation(x, slope) / (size + x.sum())
    return u + torch.ldexp(x * longest / norms, unit), residual


def _cagrad(M: Tensor, share: float, c: float) -> tuple[Tensor, Tensor]:
    """Finds the γ for which the d = g0 + Gᵀx nearest to g0 with u_iᵀd >= γ b_i is at distance ρ; g0 = share · Σ g_i."""
    T = M.shape[0]
    C, norms = _unit_rows(M)
    w0 = M.new_full((T,), share)
    longest = norms.amax()
    if not c > 0:
        return w0, M.new_zeros(())
    b = norms.amin() / norms
    mean = norms / longest * share
    q = C @ mean
    size, rounding = float(mean.sum()), 4 * T * EPS  # of a square, relative to that of the lengths
    if mean @ q <= rounding * size**2:
        return w0, M.new_zeros(())
    square = c**2 * (mean @ q)

    def solve(gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = gamma * b - q
        x, slope = _nonnegative(C, p, size + abs(float(gamma)))
        return x, slope, x @ (slope + p)

    gamma = M.new_zeros(())
    x, slope, distance = solve(gamma)
    stationary = False
    if distance < square:
        y, _, shortest = _shortest_point(C, b)
        stationary = bool(shortest <= rounding)
        if not stationary:
            gamma = (q @ y + (square * shortest).sqrt()) / (b @ y)  # by duality
            x, slope, distance = solve(gamma)
    excess = M.new_zeros(())  # by which the bound on the worst slope, for w = x / Σx, exceeds γ
    if not stationary:
        for _ in range(100):
            following = (q @ x + (square * distance).sqrt()) / (b @ x)
            if not (distance - square > EPS * (size + x.sum()) ** 2 and following < gamma):
                break
            gamma = following
            x, slope, distance = solve(gamma)
        lengths = size + x.sum()
        uncertain = (rounding + _violation(x, slope) / lengths) * lengths**2
        excess = ((square - distance).abs() - uncertain).clamp_min(0)
        excess = excess / (b @ x) if excess > 0 else excess
    gap = (excess * b - slope).max().clamp_min(0) / (size + x.sum())
    return w0 + x * longest / norms, gap


def _unit_rows(M: Tensor) -> tuple[Tensor, Tensor]:
    """C [T, T] and the lengths [T], all positive.

    M's upper triangle is read. If C is indefinite beyond rounding (from products in float32), what it lacks is added to
    the diagonal.
    """
    norms = M.diagonal().sqrt()
    inverse = 1 / norms
    C = (M * inverse[:, None] * inverse).clamp(-1, 1).triu(1)
    C = C + C.T + torch.eye(M.shape[0], dtype=M.dtype, device=M.device)
    lacking = -torch.linalg.eigvalsh(C)[0]
    if lacking > 16 * M.shape[0] * EPS:
        C.diagonal().add_(lacking)
    return C, norms


def _violation(x: Tensor, slope: Tensor) -> Tensor:
    """By how much slope >= 0, with equality where x > 0, is violated."""
    return torch.where(x > 0, slope.abs(), -slope).max().clamp_min(0)


def _nonnegative(C: Tensor, p: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """The x >= 0 with the least ½ xᵀCx - pᵀx, and its slope Cx - p. `size` is that of the terms of p.

    C may be singular: the proximal points argmin ½ xᵀ(C + δ)x - (p + δ x_before)ᵀx, x >= 0, converge to it.
    """
    T = C.shape[0]
    ridge = 64 * T * EPS
    A = C + ridge * torch.eye(T, dtype=C.dtype, device=C.device)
    x = torch.zeros_like(p)
    slope, least = -p, torch.inf
    for _ in range(8):
        following = _lawson_hanson(A, p + ridge * x, size)
        turned = C @ following - p
        violation = float(_violation(following, turned) / (size + following.sum()))
        if not violation < least:
            break
        x, slope, least = following, turned, violation
    return x, slope


def _lawson_hanson(A: Tensor, p: Tensor, size: float) -> Tensor:
    """The x >= 0 with the least ½ xᵀAx - pᵀx for a positive definite A.

    One index at a time enters the support, and x moves towards the minimum there; an index that reaches zero leaves.
    """
    T = A.shape[0]
    x = torch.zeros_like(p)
    support: list[int] = []
    barred: set[int] = set()  # that bring no progress from the current x
    for _ in range(20 * T + 20):
        slope = A @ x - p
        slope[[*support, *barred]] = torch.inf
        entering = int(slope.argmin())
        if not slope[entering] < -4 * EPS * T**0.5 * (size + float(x.sum())):
            break
        support.append(entering)
        barred.add(entering)
        moved = False
        while support:
            solved = torch.linalg.solve(A[support][:, support], p[support])
            if bool((solved > 0).all()):
                x[support] = solved
                moved = True
                break
            old = x[support]
            reach = torch.where(solved > 0, torch.inf, torch.where(old > 0, old / (old - solved), 0.0))
            leaving = int(reach.argmin())
            moved = moved or bool(reach[leaving] > 0)
            x[support] = (old + reach[leaving] * (solved - old)).clamp_min(0)
            x[support[leaving]] = 0
            del support[leaving]
        if moved:
            barred.clear()
    return x
