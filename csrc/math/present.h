// The tasks that are there. A task whose gradient is exactly zero (a label is missing, a loss is constant) is absent:
// the problem is that of the others, and its weight is 0. This file decides which those are, for all solvers.
#pragma once

#include "team.h"

namespace fastmtl {
namespace {

// Whether task t is there. `M` [T, T] holds finite numbers.
FASTMTL_HOST_DEVICE inline bool is_present(const double* M, int64_t T, int64_t t) {
  return M[t * T + t] > 0.0;
}

FASTMTL_HOST_DEVICE constexpr int64_t present_scratch(int64_t T) {
  return 3 * T;
}

// The residual of solve(M, n, u, v, work) on the n tasks that are there; no other is in M [n, n] and u [n] (null where
// the caller's is), and v [n] is the start of their weights' way to v [T]. 0 where there is no task, infinity where a
// weight is out of the range of numbers.
//
// Where tasks are absent M lies at the start of `work`: what a solver makes of M, it has to make there in place.
template <class Team, class Solve>
FASTMTL_HOST_DEVICE double for_present(
    Team team,
    const double* M, // [T, T]
    int64_t T,
    const double* u, // [T], or null
    double* v,       // [T]
    double* scratch, // [present_scratch(T) + what `solve` needs]
    Solve solve) {
  double *const index = scratch, *const some = index + T, *const found = some + T, *const work = found + T;
  const int64_t n = int64_t(team.sum(T, [=](int64_t t) { return is_present(M, T, t) ? 1.0 : 0.0; }));
  const double* N = M;
  if (n < T) {
    team.once([=] {
      for (int64_t t = 0, k = 0; t < T; ++t) {
        if (is_present(M, T, t)) {
          index[k++] = double(t);
        }
      }
    });
    for (int64_t i = 0; i < n; ++i) {
      const double* from = M + int64_t(index[i]) * T;
      team.each(n, [=](int64_t j) { work[i * n + j] = from[int64_t(index[j])]; });
    }
    team.each(u ? n : 0, [=](int64_t k) { some[k] = u[int64_t(index[k])]; });
    team.each(T, [=](int64_t t) { v[t] = 0.0; });
    N = work;
  }
  double residual = n > 0 ? solve(N, n, u && n < T ? some : u, n < T ? found : v, work) : 0.0;
  if (n < T) {
    team.each(n, [=](int64_t k) { v[int64_t(index[k])] = found[k]; });
  }
  if (residual < kInfinity && !(team.sum(T, [=](int64_t t) { return 0.0 * v[t]; }) == 0.0)) {
    residual = kInfinity;
  }
  return residual;
}

} // namespace
} // namespace fastmtl
