// CAGrad (Liu et al. 2021): the direction d = Gᵀα within ρ = c ‖g0‖ of the mean gradient g0 = Gᵀw0 whose worst slope
// γ = min_i g_iᵀd is best.
//
// For a given γ the nearest d to g0 with g_iᵀd >= γ is g0 + Gᵀx with x = argmin ½ xᵀMx - (γ1 - p)ᵀx over x >= 0 and
// p = Mw0, and ‖Gᵀx‖ grows with γ: the solution is where it gets to ρ. On a fixed support x is linear in γ, so that γ
// is the root of a quadratic, exact once the support is right. w = x / Σx is the minimiser of the paper's problem
// g_wᵀg0 + ρ ‖g_w‖ over the simplex, whose value at w bounds γ from above for any w: the duality gap.
//
// Where zero is in the convex hull of the gradients (g_w = 0), no γ > 0 is possible; then x at γ = 0, the projection on
// the dual cone, is the solution if it is near enough.
//
// On rows of unit length, as everywhere, the constraint is u_iᵀd >= γ b_i, b_i = (shortest length) / (length of i).
#pragma once

#include "mgda.h"

namespace fastmtl {
namespace {

constexpr int64_t kMaxRootSteps = 100;

FASTMTL_HOST_DEVICE constexpr int64_t cagrad_scratch(int64_t T) {
  return 2 * T * T + 10 * T + 2 * Nonnegative::scratch(T);
}

// The larger γ at which ‖Gᵀx‖² = `square` for the support of `problem`: x_S = γ a - e, with a = C_S^-1 b_S and
// e = C_S^-1 q_S. NaN where there is none.
template <class Team>
FASTMTL_HOST_DEVICE double slope_at(
    Team team,
    const Nonnegative& problem,
    const double* b, // [T]
    const double* q, // [T]
    double square,
    double* work) { // [2 T]
  double *const a = work, *const e = work + problem.T;
  const int64_t* const support = problem.support;
  const int64_t n = problem.count;
  team.each(n, [=](int64_t i) {
    a[i] = b[support[i]];
    e[i] = q[support[i]];
  });
  problem.solve(team, a);
  problem.solve(team, e);
  // γ² A - 2 γ B + E = square
  const double A = team.sum(n, [=](int64_t i) { return a[i] * b[support[i]]; });
  const double B = team.sum(n, [=](int64_t i) { return e[i] * b[support[i]]; });
  const double E = team.sum(n, [=](int64_t i) { return e[i] * q[support[i]]; });
  return (B + std::sqrt(B * B - A * (E - square))) / A;
}

// Returns the duality gap, row by row: the largest f(w) b_i - u_iᵀd, relative to the lengths of what d is made of.
template <class Team>
FASTMTL_HOST_DEVICE double cagrad(
    Team team,
    const double* M, // [T, T]
    int64_t T,
    double c,
    double* alpha,     // [T]
    double* scratch) { // [cagrad_scratch(T)]
  double *const C = scratch, *const Q = C + T * T, *const norms = Q + T * T, *const inverse = norms + T;
  double *const b = inverse + T, *const mean = b + T, *const q = mean + T, *const p = q + T;
  double *const before = p + T, *const product = before + T, *const work = product + T; // work [2 T]
  unit_rows(team, M, T, C, norms, inverse);
  team.each(T, [=](int64_t t) { alpha[t] = 1.0 / double(T); });
  const double longest = team.largest(T, [=](int64_t t) { return norms[t]; });
  const double smallest = -team.largest(T, [=](int64_t t) { return -norms[t]; });
  const double shortest = -team.largest(T, [=](int64_t t) { return norms[t] > 0.0 ? -norms[t] : -kInfinity; });
  if (!(c > 0.0) || !(longest > 0.0)) {
    return 0.0;
  }
  team.each(T, [=](int64_t t) {
    b[t] = shortest * inverse[t];
    mean[t] = norms[t] / longest / double(T);
  });
  multiply(team, C, T, mean, q);
  const double size = team.sum(T, [=](int64_t t) { return mean[t]; });
  const double rounding = 4.0 * double(T) * kRounding; // of a square, relative to that of the lengths
  const double squared_mean = team.sum(T, [=](int64_t t) { return mean[t] * q[t]; });
  if (!(squared_mean > rounding * size * size)) { // g0 = 0, and so is ρ
    return 0.0;
  }
  const double square = c * c * squared_mean, radius = std::sqrt(square);

  Nonnegative problem(C, T, work + 2 * T), hull(Q, T, work + 2 * T + Nonnegative::scratch(T));
  double* const x = problem.x;
  const auto solve = [&](double gamma) { // ‖Gᵀx‖²
    team.each(T, [=](int64_t t) { p[t] = gamma * b[t] - q[t]; });
    problem.solve_for(team, p, size + std::fabs(gamma));
    const double* const slope = problem.slope;
    return team.sum(T, [=](int64_t t) { return x[t] * (slope[t] + p[t]); });
  };
  problem.start(team, [=](int64_t t) { return q[t] < 0.0; });
  const double at_zero = solve(0.0);
  // At the lower end g0 itself is good enough.
  double low = -team.largest(T, [=](int64_t t) { return inverse[t] > 0.0 ? -q[t] / b[t] : -kInfinity; });
  double high = 0.0, gamma = 0.0, distance = at_zero;
  bool stationary = false;
  double bound = 0.0; // f(w) where g_w = 0
  if (at_zero < square) {
    low = low > 0.0 ? low : 0.0;
    stationary = smallest == 0.0;
    if (!stationary) {
      team.each(T * T, [=](int64_t i) { Q[i] = C[i]; });
      double shortest_square;
      shortest_point(team, hull, Q, b, shortest_square);
      stationary = !(shortest_square > rounding);
      if (!stationary) {
        const double* const y = hull.x;
        const double along = team.sum(T, [=](int64_t t) { return b[t] * y[t]; });
        const double toward = team.sum(T, [=](int64_t t) { return q[t] * y[t]; });
        high = (toward + radius * std::sqrt(shortest_square)) / along;
        problem.start(team, [=](int64_t t) { return y[t] > 0.0; });
        gamma = high > low ? high : low;
        high = gamma;
        distance = solve(gamma);
      }
    }
  }
  if (!stationary) {
    int64_t settled = -1; // size of the support that `gamma` is the root on; its indices are in `before`
    for (int64_t step = 0; step < kMaxRootSteps; ++step) {
      const int64_t* const support = problem.support;
      const int64_t n = problem.count;
      if (distance < square) {
        low = gamma;
      } else {
        high = gamma;
      }
      if (n == settled && team.sum(n, [=](int64_t i) { return before[i] == double(support[i]) ? 0.0 : 1.0; }) == 0.0) {
        break;
      }
      if (!(high - low > kRounding * (std::fabs(high) + std::fabs(low)))) {
        break;
      }
      double next = n > 0 ? slope_at(team, problem, b, q, square, work) : low;
      settled = n;
      if (!(next > low && next < high)) {
        next = low + 0.5 * (high - low);
        settled = -1;
      }
      team.each(n, [=](int64_t i) { before[i] = double(support[i]); });
      gamma = next;
      distance = solve(gamma);
    }
    // What is left is rounding.
    const double stretch = distance > 0.0 ? std::sqrt(square / distance) : 1.0;
    team.each(T, [=](int64_t t) { x[t] *= stretch; });
    multiply(team, C, T, x, product);
    const double total = team.sum(T, [=](int64_t t) { return b[t] * x[t]; });
    bound = (team.sum(T, [=](int64_t t) { return x[t] * q[t]; }) + square) / total;
  } else {
    multiply(team, C, T, x, product);
  }
  const double worst =
      team.largest(T, [=](int64_t t) { return inverse[t] > 0.0 ? bound * b[t] - q[t] - product[t] : -kInfinity; });
  const double lengths = size + problem.total(team);
  team.each(T, [=](int64_t t) { alpha[t] += x[t] * longest * inverse[t]; });
  return worst > 0.0 ? worst / lengths : 0.0;
}

} // namespace
} // namespace fastmtl
