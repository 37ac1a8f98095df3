"""Quadratic problems in the task weights: MGDA, projections on the dual cone, CAGrad.

All are solved on gradients of unit length, C = D^-1/2 M D^-1/2 with D the diagonal of M, and come down to

    min ½ xᵀCx - pᵀx    over    x >= 0,

by the active-set method of Lawson and Hanson, in float64 on the host, one matrix after the other. csrc/math has the
derivations, and a faster way to the same solution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["cagrad", "dual_cone", "mgda"]

EPS = torch.finfo(torch.float64).eps


def mgda(M: Tensor) -> tuple[Tensor, Tensor]:
    """The shortest vector of the convex hull (Désidéri 2012; Sener and Koltun 2018): argmin αᵀMα, α >= 0, Σα = 1.

    Args:
        M: [..., T, T].

    Returns:
        α [..., T] and the residual [...], both float64: by how much Wolfe's criterion (Mα)_t >= αᵀMα, with equality
        where α_t > 0, is violated, relative to the lengths of the gradients; NaN where M is not finite. A zero gradient
        gets all the weight.
    """
    return _solve_each(M, _mgda)


def dual_cone(M: Tensor, weights: Tensor | None, each: bool) -> tuple[Tensor, Tensor]:
    """The projection of Gᵀu on the dual cone: argmin vᵀMv over v >= u (Quinton and Rey 2024, proposition 1).

    Args:
        M: [..., T, T].
        weights: [T] float64, or None for 1/T each.
        each: the sum of the solutions for u = weights_i e_i (UPGrad), instead of the one for u = weights (DualProj).

    Returns:
        α [..., T] and the residual [...], both float64: the largest violation of Mv >= 0, with equality where v > u,
        relative to the lengths of the gradients; NaN where M is not finite.
    """

    def solve(one: Tensor) -> tuple[Tensor, Tensor]:
        T = one.shape[0]
        u = one.new_full((T,), 1 / T) if weights is None else weights.to(one)
        if not each:
            return _dual_cone(one, u)
        projected = [_dual_cone(one, row) for row in torch.diag(u)]
        return torch.stack([v for v, _ in projected]).sum(0), torch.stack([r for _, r in projected]).max()

    return _solve_each(M, solve)


def cagrad(M: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """Conflict-averse gradient descent (Liu et al. 2021), without its final rescaling.

    α = 1/T + (ρ / ‖g_w‖) w with ρ = c ‖g0‖, g0 the mean gradient, and w the minimiser of g_wᵀg0 + ρ ‖g_w‖ over the
    simplex; where zero is in the convex hull, the nearest point to g0 of the dual cone.

    Args:
        M: [..., T, T].
        c: radius around the mean gradient, relative to its length.

    Returns:
        α [..., T] and the residual [...], both float64: the duality gap as every gradient sees it, relative to its
        length and to the lengths of what is summed; NaN where M is not finite.
    """
    return _solve_each(M, lambda one: _cagrad(one, c))


def _solve_each(M: Tensor, solve: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    flat = M.detach().to(device="cpu", dtype=torch.float64).reshape(-1, *M.shape[-2:])
    alpha, residual = flat.new_full(flat.shape[:-1], torch.nan), flat.new_full(flat.shape[:1], torch.nan)
    for b, one in enumerate(flat):
        if bool(one.isfinite().all()):
            alpha[b], residual[b] = solve(one)
    return alpha.reshape(M.shape[:-1]).to(M.device), residual.reshape(M.shape[:-2]).to(M.device)


def _mgda(M: Tensor) -> tuple[Tensor, Tensor]:
    T = M.shape[0]
    C, norms = _unit_rows(M)
    shortest = norms.min()
    if shortest == 0:
        alpha = torch.zeros_like(norms)
        alpha[norms.argmin()] = 1
        return alpha if bool(norms.any()) else alpha.fill_(1 / T), M.new_zeros(())
    b = shortest / norms
    y, residual, _ = _shortest_point(C, b)
    return y * b / (y @ b), residual


def _shortest_point(C: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The y >= 0 with Σy = 1 of least yᵀCy / (bᵀy)², the residual of Wolfe's criterion, and yᵀCy."""
    y, _ = _nonnegative(C + b[:, None] * b, b, 1.0)
    y = y / y.sum()
    products = C @ y
    square = y @ products
    excess = products - b * (square / (b @ y))
    return y, torch.where(y > 0, excess.abs(), -excess).max().clamp_min(0), square


def _dual_cone(M: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    C, norms = _unit_rows(M)
    lengths = u * norms
    longest = lengths.abs().max()
    if longest == 0:
        return u.clone(), M.new_zeros(())
    lengths = lengths / longest
    size = float(lengths.abs().sum())
    p = -(C @ lengths)
    x, _ = _nonnegative(C, p, size)
    slope = C @ x - p
    residual = torch.where(x > 0, slope.abs(), -slope).max().clamp_min(0) / (size + x.sum())
    return u + torch.where(norms > 0, x * longest / norms, 0.0), residual


def _cagrad(M: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """The γ for which the nearest d = g0 + Gᵀx to g0 with u_iᵀd >= γ b_i is at distance ρ."""
    T = M.shape[0]
    C, norms = _unit_rows(M)
    w0 = M.new_full((T,), 1 / T)
    longest, alive = norms.max(), norms > 0
    if not c > 0 or longest == 0:
        return w0, M.new_zeros(())
    b = torch.where(alive, norms[alive].min() / norms, 0.0)
    mean = norms / longest / T
    q = C @ mean
    size, rounding = float(mean.sum()), 4 * T * EPS
    if mean @ q <= rounding * size**2:
        return w0, M.new_zeros(())
    square = c**2 * (mean @ q)

    def solve(gamma: Tensor) -> tuple[Tensor, list[int], Tensor]:
        x, support = _nonnegative(C, gamma * b - q, size + abs(float(gamma)))
        return x, support, x @ C @ x

    gamma = high = M.new_zeros(())
    low = (q[alive] / b[alive]).min()  # where g0 itself is good enough
    x, support, distance = solve(gamma)
    stationary = False
    if distance < square:
        y, _, shortest = _shortest_point(C, b)
        stationary = not bool(alive.all()) or bool(shortest <= rounding)
        if not stationary:
            low = low.clamp_min(0)
            gamma = high = ((q @ y + (square * shortest).sqrt()) / (b @ y)).clamp_min(low)  # by duality
            x, support, distance = solve(gamma)
    settled: list[int] | None = None
    for _ in range(0 if stationary else 100):
        low, high = (gamma, high) if distance < square else (low, gamma)
        if support == settled or not high - low > EPS * (high.abs() + low.abs()):
            break
        # On this support x is linear in γ.
        settled = support
        gamma = _slope_at(C, b, q, square, support) if support else low
        if not low < gamma < high:
            gamma, settled = (low + high) / 2, None
        x, support, distance = solve(gamma)
    bound = M.new_zeros(())
    if not stationary:
        x = x * (square / (x @ C @ x)).sqrt()
        bound = (x @ q + square) / (b @ x)  # of the worst slope, for w = x / Σx
    gap = (bound * b - q - C @ x)[alive].max().clamp_min(0) / (size + x.sum())
    return w0 + torch.where(alive, x * longest / norms, 0.0), gap


def _slope_at(C: Tensor, b: Tensor, q: Tensor, square: Tensor, support: list[int]) -> Tensor:
    """The larger γ with xᵀCx = square for x = C^-1 (γ b - q), all on the support; NaN where there is none."""
    right = torch.stack([b[support], q[support]], 1)
    products = right.T @ torch.linalg.solve(C[support][:, support], right)
    A, B, E = products[0, 0], products[0, 1], products[1, 1]
    return (B + (B * B - A * (E - square)).sqrt()) / A


def _unit_rows(M: Tensor) -> tuple[Tensor, Tensor]:
    """C [T, T] and the lengths [T]; zero gradients become orthogonal to all others."""
    norms = M.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    C = M * inverse[:, None] * inverse
    C.fill_diagonal_(1)
    return C, norms


def _nonnegative(C: Tensor, p: Tensor, size: float) -> tuple[Tensor, list[int]]:
    """The x >= 0 of least ½ xᵀCx - pᵀx, and its support. `size` is that of the terms p is made of.

    One index at a time enters the support, on which C stays regular, and x moves towards the minimum there; whoever
    gets to zero leaves. An index that depends on the support to rounding enters along the null vector of both.
    """
    T = C.shape[0]
    x = torch.zeros_like(p)
    support: list[int] = []
    barred: set[int] = set()  # of no use where x is now

    def move(to: Tensor, step: Tensor, leaving: int) -> None:
        """Moves to x + step · (to - x) on the support, of which x[leaving] is zero then."""
        x[support] = (x[support] + step * (to - x[support])).clamp_min(0)
        x[support[leaving]] = 0
        del support[leaving]

    for _ in range(20 * T + 20):
        slope = C @ x - p
        slope[[*support, *barred]] = torch.inf
        entering = int(slope.argmin())
        if not slope[entering] < -4 * EPS * T**0.5 * (size + float(x.sum())):
            break
        barred.add(entering)
        moved = False
        while True:  # the null vector is e_entering - z
            z = torch.linalg.solve(C[support][:, support], C[support, entering])
            if C[entering, entering] - z @ C[support, entering] > 2 * (len(support) + 2) * EPS:
                support.append(entering)
                break
            reach = torch.where(z > 1e-10, x[support] / z, torch.inf)  # below that it is rounding
            if not bool(reach.isfinite().any()):
                break
            leaving = int(reach.argmin())
            x[entering] += reach[leaving]
            move(x[support] - z, reach[leaving], leaving)
            moved = True
        while support and entering in support:
            solved = torch.linalg.solve(C[support][:, support], p[support])
            if bool((solved > 0).all()):
                x[support] = solved
                moved = True
                break
            old = x[support]
            reach = torch.where(solved > 0, torch.inf, torch.where(old > 0, old / (old - solved), 0.0))
            leaving = int(reach.argmin())
            moved = moved or bool(reach[leaving] > 0)
            move(solved, reach[leaving], leaving)
        if moved:
            barred.clear()
    return x, support
