// CAGrad (Liu et al. 2021): the direction d = Gᵀα within ρ = c ‖g0‖ of the mean gradient g0 = Gᵀw0 whose worst slope
// γ = min_i g_iᵀd is best.
//
// For a given γ the nearest d to g0 with g_iᵀd >= γ is g0 + Gᵀx with x = argmin ½ xᵀMx - (γ1 - p)ᵀx over x >= 0 and
// p = Mw0. h(γ) = ‖Gᵀx‖ is convex and grows with γ: the solution is where it gets to ρ, to which Newton's method leads
// from above. With h' = Σx / h its step goes to
//
//   γ - h (h - ρ) / Σx = g_wᵀg0 + ρ ‖g_w‖ =: f(w),    w = x / Σx,
//
// the value of the paper's dual problem, min f over the simplex: a bound on γ for every w.
//
// Where zero is in the convex hull of the gradients (g_w = 0), no γ > 0 is possible; then x at γ = 0, the projection on
// the dual cone, is the solution if it is near enough.
//
// On rows of unit length, as everywhere, the constraint is u_iᵀd >= γ b_i, b_i = (shortest length) / (length of i).
#pragma once

#include "mgda.h"

namespace fastmtl {
namespace {

// f(w) of a w that need not be normalised.
template <class Team>
FASTMTL_HOST_DEVICE double cagrad_bound(
    Team team,
    int64_t T,
    const double* w, // [T]
    const double* b, // [T]
    const double* q, // [T]
    double radius,
    double square) { // ‖g_w‖²
  const double across = team.sum(T, [=](int64_t t) { return b[t] * w[t]; });
  const double over = team.sum(T, [=](int64_t t) { return q[t] * w[t]; });
  return (over + radius * std::sqrt(square)) / across;
}

// Returns the duality gap, row by row: the largest f(w) b_i - u_iᵀd, relative to the lengths of what d is made of. In
// f(w), h² counts as ρ² if it is to the rounding of a sum of products of these lengths and to what x has as a residual.
template <class Team>
FASTMTL_HOST_DEVICE double cagrad_of_present(
    Team team,
    const double* M, // [T, T]
    int64_t T,
    double share, // of each gradient in g0
    double c,
    double* alpha, // [T]
    double* scratch) {
  double *const C = scratch, *const Q = C + T * T, *const norms = Q + T * T, *const inverse = norms + T;
  double *const b = inverse + T, *const mean = b + T, *const q = mean + T, *const p = q + T;
  unit_rows(team, M, T, C, norms, inverse);
  team.each(T, [=](int64_t t) { alpha[t] = share; });
  const double longest = team.largest(T, [=](int64_t t) { return norms[t]; });
  const double shortest = -team.largest(T, [=](int64_t t) { return -norms[t]; });
  if (!(c > 0.0)) {
    return 0.0;
  }
  team.each(T, [=](int64_t t) {
    b[t] = shortest * inverse[t];
    mean[t] = norms[t] / longest * share;
  });
  multiply(team, C, T, mean, q);
  const double size = team.sum(T, [=](int64_t t) { return mean[t]; });
  const double rounding = 4.0 * double(T) * kRounding; // of a square, relative to that of the lengths
  const double squared_mean = team.sum(T, [=](int64_t t) { return mean[t] * q[t]; });
  if (!(squared_mean > rounding * size * size)) { // g0 = 0, and so is ρ
    return 0.0;
  }
  const double square = c * c * squared_mean, radius = std::sqrt(square);

  Nonnegative problem(C, T, p + T), hull(Q, T, p + T + Nonnegative::scratch(T));
  double* const x = problem.x;
  const double* const slope = problem.slope;
  double gamma = 0.0, distance = 0.0, along = 0.0, toward = 0.0, lengths = 0.0, violation = 0.0;
  const auto solve = [&] {
    const double at = gamma;
    team.each(T, [=](int64_t t) { p[t] = at * b[t] - q[t]; });
    violation = problem.solve_for(team, p, size + std::fabs(at));
    distance = team.sum(T, [=](int64_t t) { return x[t] * (slope[t] + p[t]); }); // ‖Gᵀx‖²
    along = team.sum(T, [=](int64_t t) { return b[t] * x[t]; });
    toward = team.sum(T, [=](int64_t t) { return q[t] * x[t]; });
    lengths = size + problem.total(team);
  };
  problem.start(team, [=](int64_t t) { return q[t] < 0.0; });
  solve();
  bool stationary = false;
  if (distance < square) { // γ > 0
    team.each(T * T, [=](int64_t i) { Q[i] = C[i]; });
    double shortest_square;
    shortest_point(team, hull, Q, b, shortest_square);
    stationary = !(shortest_square > rounding);
    if (!stationary) {
      const double* const y = hull.x;
      gamma = cagrad_bound(team, T, y, b, q, radius, shortest_square);
      problem.start(team, [=](int64_t t) { return y[t] > 0.0; });
      solve();
    }
  }
  double excess = 0.0; // f(w) - γ
  if (!stationary) {
    for (int64_t step = 0; step < kMaxNewtonSteps; ++step) {
      if (!(distance - square > kRounding * lengths * lengths)) {
        break;
      }
      const double next = (toward + radius * std::sqrt(distance)) / along;
      if (!(next < gamma)) {
        break;
      }
      gamma = next;
      solve();
    }
    excess = std::fabs(square - distance) - (rounding + violation) * lengths * lengths;
    excess = excess > 0.0 ? excess / along : 0.0;
  }
  const double worst = team.largest(T, [=](int64_t t) { return excess * b[t] - slope[t]; });
  team.each(T, [=](int64_t t) { alpha[t] += x[t] * longest * inverse[t]; });
  return worst <= 0.0 ? 0.0 : worst / lengths; // NaN stays
}

// g0 is the sum of the gradients that are there, over T.
struct Cagrad : Solver {
  static constexpr auto kName = "cagrad";
  static constexpr std::tuple kOptions{not_negative("c")};

  double c;

  FASTMTL_HOST_DEVICE static constexpr int64_t scratch(int64_t T) {
    return present_scratch(T) + 2 * T * T + 6 * T + 2 * Nonnegative::scratch(T);
  }

  template <class Team>
  FASTMTL_HOST_DEVICE double operator()(Team team, const double* M, int64_t T, Problem, double* alpha, double* scratch)
      const {
    const double c = this->c;
    const double share = 1.0 / double(T);
    return for_present(
        team,
        M,
        T,
        nullptr,
        alpha,
        scratch,
        [=](const double* M, int64_t T, const double*, double* alpha, double* scratch) {
          return cagrad_of_present(team, M, T, share, c, alpha, scratch);
        });
  }
};

} // namespace
} // namespace fastmtl
