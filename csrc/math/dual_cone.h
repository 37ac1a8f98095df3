// The projection of Gᵀu on the cone of directions that no task objects to: Gᵀv with v = argmin vᵀMv over v >= u
// (Quinton and Rey 2024, proposition 1, for UPGrad and DualProj; Lopez-Paz and Ranzato 2017).
//
// With v = u + x it is min ½ xᵀMx + (Mu)ᵀx over x >= 0, here on rows of unit length.
#pragma once

#include "nonnegative.h"
#include "solver.h"

namespace fastmtl {
namespace {

// Returns by how much Mv >= 0, with equality where v > u, is violated, relative to the lengths of the gradients and of
// what is summed; infinity where v, or the sum of as many, leaves the range of numbers.
template <class Team>
FASTMTL_HOST_DEVICE double dual_cone(
    Team team,
    const double* M, // [T, T]
    int64_t T,
    const double* u,   // [T]
    double* v,         // [T]
    double* scratch) { // [DualCone::scratch(T) - T]
  return for_present(
      team, M, T, u, v, scratch, [=](const double* M, int64_t T, const double* u, double* v, double* scratch) {
        double *const C = scratch, *const norms = C + T * T, *const inverse = norms + T;
        double *const scaled = inverse + T, *const p = scaled + T;
        unit_rows(team, M, T, C, norms, inverse);
        // Weights in units of a power of two, so that no length leaves the range of numbers.
        int unit = 0;
        std::frexp(team.largest(T, [=](int64_t t) { return std::fabs(u[t]); }), &unit);
        team.each(T, [=](int64_t t) {
          v[t] = u[t];
          scaled[t] = -norms[t] * std::ldexp(u[t], -unit);
        });
        const double longest = team.largest(T, [=](int64_t t) { return std::fabs(scaled[t]); });
        if (!(longest > 0.0)) {
          return 0.0;
        }
        team.each(T, [=](int64_t t) { scaled[t] /= longest; });
        multiply(team, C, T, scaled, p);
        const double size = team.sum(T, [=](int64_t t) { return std::fabs(scaled[t]); });
        Nonnegative problem(C, T, p + T);
        problem.start(team, [=](int64_t t) { return p[t] > 0.0; });
        const double residual = problem.solve_for(team, p, size);
        const double* const x = problem.x;
        team.each(T, [=](int64_t t) { v[t] = u[t] + std::ldexp(x[t] * longest * inverse[t], unit); });
        return team.sum(T, [=](int64_t t) { return 0.0 * (double(T) * v[t]); }) == 0.0 ? residual : kInfinity;
      });
}

// v for u = weights, or with `each` the sum of those for u = weights_i e_i.
struct DualCone : Solver {
  static constexpr auto kName = "dual_cone";
  static constexpr std::tuple kOptions{PerTask{"weights"}, Flag{}};

  const double* weights; // [T], or null for 1/T
  bool each;

  FASTMTL_HOST_DEVICE static constexpr int64_t scratch(int64_t T) {
    return present_scratch(T) + T * T + 5 * T + Nonnegative::scratch(T);
  }
  FASTMTL_HOST_DEVICE constexpr int64_t problems(int64_t T) const {
    return each ? T : 1;
  }
  double nanoseconds(int64_t T) const {
    return each ? 500.0 + 3.0 * double(T * T) : Solver::nanoseconds(T);
  }

  template <class Team>
  FASTMTL_HOST_DEVICE double operator()(Team team, const double* M, int64_t T, Problem problem, double* v, double* u)
      const {
    const double* const weights = this->weights;
    const bool all = !each;
    team.each(T, [=](int64_t t) { u[t] = !all && t != problem.i ? 0.0 : weights ? weights[t] : 1.0 / double(T); });
    return dual_cone(team, M, T, u, v, u + T);
  }
};

} // namespace
} // namespace fastmtl
