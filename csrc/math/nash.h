// The bargaining solution (Navon et al., "Multi-task learning as a bargaining game", ICML 2022) and its α-fair
// relatives (Ban and Ji, "Fair resource allocation in multi-task learning", ICML 2024): α > 0 with M α = α^-p,
// elementwise.
//
// α minimises the strictly convex ½ αᵀMα - Σ_t ∫α_t^-p. With d = diag(M) / μ, μ its largest entry, and
//
//   α = μ^-1/(1+p) d^-1/2 h γ,   h = d^((p-1)/(2(p+1))),   N = h C h,   C = D^-1/2 M D^-1/2
//
// (products of vectors are elementwise) this is N γ = h² γ^-p, where neither the scale of the gradients nor a spread of
// their norms leaves the range of numbers. A Newton step γ (1 + s) solves, with z = γ^((1+p)/2) and q = h² γ^(1-p),
//
//   (z C z + p 1) (√q s) = √q - γ N γ / √q,
//
// whose matrix has no eigenvalue below p however singular M is (nor a pivot: those that rounding puts below are
// lifted). Far away the step's length minimises the potential along it, which converges from everywhere; near the
// solution it is
// 1. A step costs T³/6 multiply-adds; 3 to 8 are usual, 20 where gradients are nearly opposed.
//
// Where a convex combination of the gradients vanishes there is no solution: γ grows along it without bound, until with
// β = h γ the square of the combination, (β/Σβ)ᵀ C (β/Σβ), is no more than rounding errors of products of unit vectors.
#pragma once

#include "cholesky.h"
#include "solver.h"

namespace fastmtl {
namespace {

// x^-p
FASTMTL_HOST_DEVICE inline double inverse_power(double x, double p) {
  return p == 1.0 ? 1.0 / x : std::pow(x, -p);
}

// How far to go along γ (1 + t s). The slope of the potential there, rise + t curvature - Σ q s (1 + t s)^-p, is
// negative at 0 and increases: a tenth of that is near enough to its root.
template <class Team>
FASTMTL_HOST_DEVICE double nash_length(
    Team team,
    int64_t T,
    double power,
    double rise,
    double curvature,
    const double* root, // [T], √q
    const double* s,    // [T]
    double* terms) {    // [T]
  // No 1 + t s falls below a thousandth; a step of 1e8 ends where there is no solution.
  const double shrinking = team.largest(T, [=](int64_t t) { return -s[t]; });
  const double most = shrinking > kNashShrink / kNashFarthest ? kNashShrink / shrinking : kNashFarthest;
  const double start = rise - team.sum(T, [=](int64_t t) { return root[t] * root[t] * s[t]; });
  double low = 0.0, high = most, length = most < 1.0 ? most : 1.0;
  for (int evaluation = 0; evaluation < 30; ++evaluation) {
    const double at = length;
    team.each(T, [=](int64_t t) { terms[t] = root[t] * root[t] * s[t] * inverse_power(1.0 + at * s[t], power); });
    const double slope = rise + at * curvature - team.sum(T, [=](int64_t t) { return terms[t]; });
    if (std::fabs(slope) <= -kNashSlope * start || (slope < 0.0 && at >= most)) {
      return at;
    }
    (slope < 0.0 ? low : high) = at;
    const double bend = curvature + power * team.sum(T, [=](int64_t t) { return terms[t] * s[t] / (1.0 + at * s[t]); });
    length = at - slope / bend;
    if (slope < 0.0 && high == most) { // no end has been seen yet
      const double farthest = 8.0 * at < most ? 8.0 * at : most;
      length = length < farthest ? length : farthest;
    } else if (!(length > low && length < high) || slope > -start) { // Newton's steps climb down a wall slowly
      length = 0.5 * (low + high);
    }
  }
  return low > 0.0 ? low : length;
}

// h², h / sqrt(diag(M)) and γ = 1.
template <class Team>
FASTMTL_HOST_DEVICE void nash_start(
    Team team,
    const double* M, // [T, T]
    int64_t T,
    double power,
    double largest,  // of M's diagonal
    double* square,  // [T]
    double* scale,   // [T]
    double* gamma) { // [T]
  team.each(T, [=](int64_t t) {
    const double h = power == 1.0 ? 1.0 : std::pow(M[t * T + t] / largest, (power - 1.0) / (2.0 * (power + 1.0)));
    square[t] = h * h;
    scale[t] = h / std::sqrt(M[t * T + t]);
    gamma[t] = 1.0;
  });
}

// The best multiple of γ = 1, to begin with.
template <class Team>
FASTMTL_HOST_DEVICE void nash_rescale(
    Team team,
    int64_t T,
    double power,
    double form,          // γ N γ
    const double* square, // [T]
    double* gamma,        // [T]
    double* product,      // [T]
    double* terms) {      // [T]
  const double squares = team.sum(T, [=](int64_t t) { return square[t]; });
  const double multiple = inverse_power(form / squares, 1.0 / (1.0 + power));
  team.each(T, [=](int64_t t) {
    gamma[t] *= multiple;
    product[t] *= multiple;
    terms[t] *= multiple;
  });
}

// N γ and |N| γ, elementwise, for N = scale M scale; `scaled` becomes scale γ.
template <class Team>
FASTMTL_HOST_DEVICE void nash_product(
    Team team,
    const double* M, // [T, T]
    int64_t T,
    const double* scale, // [T]
    const double* gamma, // [T]
    double* scaled,      // [T]
    double* product,     // [T]
    double* terms) {     // [T]
  team.each(T, [=](int64_t t) {
    scaled[t] = scale[t] * gamma[t];
    product[t] = 0.0;
    terms[t] = 0.0;
  });
  for (int64_t u = 0; u < T; ++u) {
    const double* row = M + u * T;
    const double factor = scaled[u];
    team.each(T, [=](int64_t t) {
      product[t] += factor * row[t];
      terms[t] += factor * std::fabs(row[t]);
    });
  }
  team.each(T, [=](int64_t t) {
    product[t] *= scale[t];
    terms[t] *= scale[t];
  });
}

// √q s of a Newton step, in place of its right side: z C z + p 1 = y M y + p 1 is factored.
template <class Team>
FASTMTL_HOST_DEVICE void nash_solve(
    Team team,
    const double* M, // [T, T]
    int64_t T,
    double power,
    const double* y, // [T]
    double* U,       // [T, T]
    double* inverse, // [T]
    double* step) {  // [T]
  const auto fill = [=](int64_t i, double* u) {
    const double* row = M + i * T;
    const double factor = y[i];
    team.each(T - i, [=](int64_t j) { u[i + j] = factor * row[i + j] * y[i + j]; });
  };
  const auto pivot = [=](int64_t, double left) { return left > 0.0 ? left + power : power; };
  eliminate(team, T, fill, pivot, U, T, inverse);
  Cholesky{M, T, U, inverse, nullptr, T}.solve(team, step);
}

// The largest |Nγ - h² γ^-p|, relative, and in `excess` what is left of it beyond rounding errors, of the power too.
template <class Team>
FASTMTL_HOST_DEVICE double nash_residual(
    Team team,
    int64_t T,
    double power,
    const double* product, // [T]
    const double* terms,   // [T]
    const double* wanted,  // [T]
    double& excess) {
  const double residual = team.largest(T, [=](int64_t t) {
    const double cancelled = kNashCancelled * terms[t];
    return std::fabs(product[t] - wanted[t]) / (wanted[t] > cancelled ? wanted[t] : cancelled);
  });
  excess = team.largest(T, [=](int64_t t) {
    return std::fabs(product[t] - wanted[t]) - kRounding * (4.0 * terms[t] + 4.0 * (1.0 + power) * wanted[t]);
  });
  return residual < kInfinity ? residual : kInfinity; // NaN, of powers out of the range of numbers
}

// `Nash` of finite M whose diagonal is positive. `positive`: whether M α > 0 beyond rounding errors, which proves that
// there is a solution.
template <class Team>
FASTMTL_HOST_DEVICE double nash_newton(
    Team team,
    const double* M, // [T, T]
    int64_t T,
    double power,
    double* alpha,   // [T]
    double* scratch, // [T² + 10 T]
    bool& positive) {
  double* const U = scratch;
  double* const inverse = U + T * T;
  double* const square = inverse + T; // h²
  double* const scale = square + T;   // h / sqrt(diag(M)): N = scale M scale
  double* const gamma = scale + T;
  double* const best = gamma + T;    // the γ of the least residual
  double* const product = best + T;  // N γ
  double* const terms = product + T; // |N| γ
  double* const wanted = terms + T;  // h² γ^-p
  double* const root = wanted + T;   // √q
  double* const step = root + T;     // s, or √q s
  double* const right = wanted;      // the right side of that, in its place
  const double largest = team.largest(T, [=](int64_t t) { return M[t * T + t]; });
  nash_start(team, M, T, power, largest, square, scale, gamma);
  double least = kInfinity;
  int64_t stalled = 0;
  bool near = false;
  for (int64_t iteration = 0;; ++iteration) {
    nash_product(team, M, T, scale, gamma, alpha, product, terms);
    const double form = team.sum(T, [=](int64_t t) { return gamma[t] * product[t]; });
    const double total = team.sum(T, [=](int64_t t) { return std::sqrt(square[t]) * gamma[t]; });
    if (form <= 4.0 * double(T) * kRounding * total * total) {
      return kInfinity;
    }
    if (iteration == 0) {
      nash_rescale(team, T, power, form, square, gamma, product, terms);
    }
    team.each(T, [=](int64_t t) {
      wanted[t] = square[t] * inverse_power(gamma[t], power);
      root[t] = std::sqrt(wanted[t] * gamma[t]);
    });
    double excess;
    const double residual = nash_residual(team, T, power, product, terms, wanted, excess);
    stalled = near && !(residual <= 0.5 * least) ? stalled + 1 : 0;
    const bool solved = near && excess <= 0.0;
    if (residual < least || solved || iteration == 0) {
      least = residual;
      team.each(T, [=](int64_t t) { best[t] = gamma[t]; });
    }
    if (solved || stalled == 3 || iteration == 200) {
      break;
    }

    // Near the end equations that hold to rounding drive no step: their noise would keep the others from holding.
    const double ignored = near ? 4.0 * kRounding : 0.0;
    team.each(T, [=](int64_t t) {
      const double missing = wanted[t] - product[t];
      right[t] = std::fabs(missing) > ignored * terms[t] ? missing * gamma[t] / root[t] : 0.0;
      step[t] = right[t];
      alpha[t] = scale[t] * gamma[t] / root[t]; // z C z = alpha M alpha
    });
    nash_solve(team, M, T, power, alpha, U, inverse, step);
    const double fall = team.sum(T, [=](int64_t t) { return step[t] * right[t]; });
    if (!(fall > 0.0)) { // solved exactly, or out of the range of numbers
      break;
    }
    const double curvature = fall - power * team.sum(T, [=](int64_t t) { return step[t] * step[t]; });
    team.each(T, [=](int64_t t) { step[t] /= root[t]; });
    near = (1.0 + power) * team.largest(T, [=](int64_t t) { return std::fabs(step[t]); }) < kNashNear;
    double length = 1.0;
    if (!near) {
      const double rise = team.sum(T, [=](int64_t t) { return step[t] * gamma[t] * product[t]; });
      length = nash_length(team, T, power, rise, curvature > 0.0 ? curvature : 0.0, root, step, terms);
    }
    team.each(T, [=](int64_t t) { gamma[t] *= 1.0 + length * step[t]; });
  }
  positive = team.largest(T, [=](int64_t t) { return 16.0 * kRounding * terms[t] - product[t]; }) < 0.0;
  const double unit = std::pow(largest, 0.5 - 1.0 / (1.0 + power)); // 1 for p = 1
  team.each(T, [=](int64_t t) { alpha[t] = unit * scale[t] * best[t]; });
  return least;
}

// The solution for any p > 0. Returns the residual ‖β^p ∘ Cβ / k - 1‖_inf with β = D^1/2 α and k = D^((p-1)/2), the
// equation of unit gradients; where k β^-p is less than 2^-22 |C|β, it is relative to that: of a sum that cancels so
// far no α in float64 gives all digits, and 1e-8 is then ten rounding errors of it. Infinity and α = 0 where there is
// no solution.
struct Nash : Solver {
  static constexpr auto kName = "nash";
  static constexpr std::tuple kOptions{positive("power")};

  double power;

  FASTMTL_HOST_DEVICE static constexpr int64_t scratch(int64_t T) {
    return present_scratch(T) + 2 * T * T + 11 * T;
  }

  template <class Team>
  FASTMTL_HOST_DEVICE double operator()(Team team, const double* M, int64_t T, Problem, double* alpha, double* scratch)
      const {
    const double power = this->power;
    return for_present(
        team,
        M,
        T,
        nullptr,
        alpha,
        scratch,
        [=](const double* M, int64_t T, const double*, double* alpha, double* scratch) {
          double *const work = scratch + T * T, *const kept = work + T * T + 10 * T; // behind M, where that lies there
          bool positive = true;
          double residual = nash_newton(team, M, T, power, alpha, work, positive);
          if (!positive && power != 1.0 && residual < kInfinity) {
            // Large powers drop below rounding errors long before γ shows that a combination vanishes; p = 1 does not.
            team.each(T, [=](int64_t t) { kept[t] = alpha[t]; });
            if (nash_newton(team, M, T, 1.0, alpha, work, positive) == kInfinity) {
              residual = kInfinity;
            }
            team.each(T, [=](int64_t t) { alpha[t] = kept[t]; });
          }
          if (!(residual < kInfinity)) {
            team.each(T, [=](int64_t t) { alpha[t] = 0.0; });
            residual = kInfinity;
          }
          return residual;
        });
  }
};

} // namespace
} // namespace fastmtl
