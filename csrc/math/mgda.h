// MGDA: the shortest vector g = Gᵀα of the convex hull of the gradients (Désidéri 2012; Sener and Koltun 2018).
//
// On rows of unit length, with b_t = (shortest length) / (length of t) and y_t ∝ α_t / b_t, it is the least m = yᵀCy
// over y >= 0, bᵀy = 1. For x = s y the problem min ½ xᵀ(C + bbᵀ)x - bᵀx, x >= 0, is min s² (m + 1) / 2 - s =
// -1 / (2 (m + 1)), which is best where m is least: one problem without the constraint, bounded also where g = 0.
#pragma once

#include "nonnegative.h"
#include "solver.h"

namespace fastmtl {
namespace {

// x [T] of `problem`, whose matrix this makes C + bbᵀ: scaled to Σx = 1. Returns by how much (Cx)_t >= b_t μ, with
// equality where x_t > 0, is violated. That is Wolfe's criterion with the multiplier μ of the solution: xᵀCx / bᵀx,
// which equals it, has lost its digits where bᵀx is small.
template <class Team>
FASTMTL_HOST_DEVICE double shortest_point(
    Team team,
    Nonnegative& problem,
    double* Q,        // [T, T], C on entry, the matrix of `problem`
    const double* b,  // [T]
    double& square) { // xᵀCx
  const int64_t T = problem.T;
  for (int64_t i = 0; i < T; ++i) {
    const double a = b[i];
    double* q = Q + i * T;
    team.each(T, [=](int64_t j) { q[j] += a * b[j]; });
  }
  problem.start(team, [](int64_t) { return true; });
  problem.solve_for(team, b, 1.0);
  const double residual = problem.residual(team, 0.0), total = problem.total(team);
  double* const x = problem.x;
  const double* const slope = problem.slope;
  const double along = team.sum(T, [=](int64_t t) { return b[t] * x[t]; });
  team.each(T, [=](int64_t t) { x[t] /= total; });
  square = team.sum(T, [=](int64_t t) { return x[t] * (slope[t] + b[t] * (1.0 - along)); }) / total;
  return residual;
}

struct Mgda : Solver {
  static constexpr auto kName = "mgda";

  FASTMTL_HOST_DEVICE static constexpr int64_t scratch(int64_t T) {
    return present_scratch(T) + T * T + 3 * T + Nonnegative::scratch(T);
  }

  template <class Team>
  FASTMTL_HOST_DEVICE double operator()(Team team, const double* M, int64_t T, Problem, double* alpha, double* scratch)
      const {
    return for_present(
        team,
        M,
        T,
        nullptr,
        alpha,
        scratch,
        [=](const double* M, int64_t T, const double*, double* alpha, double* scratch) {
          double *const Q = scratch, *const norms = Q + T * T, *const inverse = norms + T, *const b = inverse + T;
          unit_rows(team, M, T, Q, norms, inverse);
          const double shortest = -team.largest(T, [=](int64_t t) { return -norms[t]; });
          team.each(T, [=](int64_t t) { b[t] = shortest * inverse[t]; });
          Nonnegative problem(Q, T, b + T);
          double square;
          const double residual = shortest_point(team, problem, Q, b, square);
          const double* const x = problem.x;
          const double along = team.sum(T, [=](int64_t t) { return b[t] * x[t]; });
          team.each(T, [=](int64_t t) { alpha[t] = b[t] * x[t] / along; });
          return residual;
        });
  }
};

} // namespace
} // namespace fastmtl
