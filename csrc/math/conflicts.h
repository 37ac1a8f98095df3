// Pairwise gradient surgery in weight space: PCGrad (Yu et al., NeurIPS 2020) and GradVac (Wang et al., ICLR 2021).
//
// The modified gradient of task i is Σ_k v_k g_k, begun at v = e_i. Its products with all gradients, c = M v, are
// enough to decide and to make every correction v_j += w, and each correction changes them by w times row j of M: no
// gradient is touched. One task costs T permuted visits and one row of M (two passes for GradVac) for each correction,
// so a matrix costs at most O(T³), and tasks are independent of one another.
//
// M holds finite numbers (the caller looks, once for all rows). Absent tasks take no part: their v is 0.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"
#include "solver.h"

namespace fastmtl {
namespace {

struct Conflicts : Solver {
  static constexpr bool kResidual = false, kManyTasks = true;

  FASTMTL_HOST_DEVICE static constexpr int64_t scratch(int64_t T) {
    return 3 * T + 3;
  }
  FASTMTL_HOST_DEVICE constexpr int64_t problems(int64_t T) const {
    return T;
  }
  double nanoseconds(int64_t T) const {
    return 200.0 + 0.3 * double(T * T);
  }
};

// PCGrad's v for task i of matrix b: from the current gradient, its component along every g_j that it conflicts with is
// taken out, in random order (the authors' own for every task with `per_task`, else the same for all of a matrix).
struct Pcgrad : Conflicts {
  static constexpr auto kName = "pcgrad";
  static constexpr std::tuple kOptions{Seed{}, Flag{}};

  const int64_t* seed; // [1]
  bool per_task;

  template <class Team>
  FASTMTL_HOST_DEVICE double
  operator()(Team team, const double* M, int64_t T, Problem problem, double* v, double* scratch) const {
    const int64_t i = problem.i;
    double* order = scratch;
    double* c = order + T;
    permutation(team, uint64_t(*seed), problem.b, per_task ? i : 0, T, order, c + T);
    team.each(T, [=](int64_t k) {
      v[k] = k == i && is_present(M, T, i) ? 1.0 : 0.0;
      c[k] = M[i * T + k];
    });
    for (int64_t n = 0; n < T; ++n) {
      const int64_t j = int64_t(order[n]);
      const double* row = M + j * T;
      const double product = c[j], square = row[j];
      if (j == i || product >= 0.0 || !is_present(M, T, j)) {
        continue;
      }
      const double w = -product / square;
      team.once([=] { v[j] += w; });
      team.each(T, [=](int64_t k) { c[k] += w * row[k]; });
    }
    return 0.0;
  }
};

// GradVac's v for task i of matrix b: where the cosine φ of the current gradient with g_j is below its target φ̂, so
// much of g_j is added that it becomes φ̂,
//   w = ‖g_i‖ (φ̂ sqrt(1 - φ²) - φ sqrt(1 - φ̂²)) / (‖g_j‖ sqrt(1 - φ̂²)),
// and the target follows as (1 - β) φ̂ + β φ. No amount of g_j gives φ̂ = 1: sqrt(1 - φ̂²) counts as 1e-8 at least, and
// cosines within rounding of ±1 as ±1 (else, once the target of parallel tasks is 1, rounding errors would move them).
// A cosine with a zero vector is not defined: the targets of zero rows are kept, and those not yet visited where the
// current gradient vanishes (it does where it is opposed to g_j).
struct Gradvac : Conflicts {
  static constexpr auto kName = "gradvac";
  static constexpr std::tuple kOptions{Seed{}, fraction("beta"), State{"targets"}};

  const int64_t* seed; // [1]
  double beta;
  double* all_targets; // [B, T, T]

  template <class Team>
  FASTMTL_HOST_DEVICE double
  operator()(Team team, const double* M, int64_t T, Problem problem, double* v, double* scratch) const {
    const int64_t i = problem.i;
    const double beta = this->beta;
    double* const targets = all_targets + (problem.b * T + i) * T;
    const double rounding = kCosineRounding * double(T);
    double* order = scratch;
    double* c = order + T;
    double* before = c + T; // the targets as all members read them, while one writes the new ones
    permutation(team, uint64_t(*seed), problem.b, i, T, order, before);
    team.each(T, [=](int64_t k) {
      v[k] = k == i && is_present(M, T, i) ? 1.0 : 0.0;
      c[k] = M[i * T + k];
      before[k] = targets[k];
    });
    double square = M[i * T + i];                          // ‖current‖²
    double terms = std::sqrt(square > 0.0 ? square : 0.0); // Σ |v_k| ‖g_k‖, which bounds the rounding error of `square`
    for (int64_t n = 0; n < T && square > rounding * terms * terms; ++n) {
      const int64_t j = int64_t(order[n]);
      const double* row = M + j * T;
      if (j == i || !is_present(M, T, j)) {
        continue;
      }
      const double ratio = std::sqrt(square) / std::sqrt(row[j]);
      const double target = before[j];
      double cosine = c[j] / row[j] / ratio;
      if (std::fabs(cosine) > 1.0 - rounding) {
        cosine = cosine > 0.0 ? 1.0 : -1.0;
      }
      team.once([=] { targets[j] = (1.0 - beta) * target + beta * cosine; });
      if (cosine >= target) {
        continue;
      }
      const double left = (1.0 - target) * (1.0 + target);
      const double sine = left > kLeastSine * kLeastSine ? std::sqrt(left) : kLeastSine;
      const double w = ratio * (target * std::sqrt((1.0 - cosine) * (1.0 + cosine)) / sine - cosine);
      team.once([=] { v[j] += w; });
      team.each(T, [=](int64_t k) { c[k] += w * row[k]; });
      square = team.sum(T, [=](int64_t k) { return v[k] * c[k]; });
      terms += std::fabs(w) * std::sqrt(row[j]);
    }
    return 0.0;
  }
};

} // namespace
} // namespace fastmtl
