#include "weights.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "../common.h"
#include "../math/cagrad.h"
#include "../math/conflicts.h"
#include "../math/dual_cone.h"
#include "../math/mgda.h"
#include "../math/nash.h"
#include "kernels.h"
#include "projections.h"
#include "threads.h"

namespace fastmtl::cpu {

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// What a thread should have to do at least, in nanoseconds: where other processes are busy, waiting for a second thread
// takes milliseconds.
constexpr double kGrain = 2e5;
// From so many matrices on each is the work of one thread, and tasks need no memory of their own.
constexpr int64_t kEnoughMatrices = 16;

bool all_finite(const double* M, int64_t count) {
  constexpr uint64_t kExponent = UINT64_C(0x7ff0000000000000);
  uint64_t bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t bits;
    std::memcpy(&bits, M + i, sizeof bits);
    bad |= uint64_t((bits & kExponent) == kExponent);
  }
  return !bad;
}

// Calls f(begin, end) for ranges of `count` parts that take so many nanoseconds each.
template <class F>
void share(int64_t count, double nanoseconds, F&& f) {
  const int64_t grain = std::max<int64_t>(1, int64_t(kGrain / nanoseconds));
  if (count <= grain) {
    f(0, count);
  } else {
    parallel_for(0, count, grain, f);
  }
}

// About what one problem takes, in nanoseconds.
double cost(int64_t T, double once, double for_each_entry) {
  return once + for_each_entry * double(T * T);
}

// alpha and residual of every matrix by solve(M, alpha, scratch).
template <class Solve>
void solve_all(const double* M, int64_t B, int64_t T, int64_t scratch, double* alpha, double* residual, Solve solve) {
  share(B, cost(T, 5000, 10), [&](int64_t begin, int64_t end) {
    double* memory = thread_scratch(0, scratch);
    for (int64_t b = begin; b < end; ++b) {
      if (all_finite(M + b * T * T, T * T)) {
        residual[b] = solve(M + b * T * T, alpha + b * T, memory);
      } else {
        std::fill_n(alpha + b * T, T, kNan);
        residual[b] = kNan;
      }
    }
  });
}

// alpha = Σ_i v of every matrix, by solve(b, i, v, scratch), which returns a residual and takes so many nanoseconds;
// `residual` may be null.
template <class Solve>
void sum_tasks(
    const double* M,
    int64_t B,
    int64_t T,
    double nanoseconds,
    int64_t scratch,
    double* alpha,
    double* residual,
    Solve solve) {
  const auto clear = [&](int64_t b) { // false where the matrix is not finite
    const bool good = all_finite(M + b * T * T, T * T);
    std::fill_n(alpha + b * T, T, good ? 0.0 : kNan);
    if (residual) {
      residual[b] = good ? 0.0 : kNan;
    }
    return good;
  };
  const auto add = [&](int64_t b, const double* v, double error) {
    for (int64_t t = 0; t < T; ++t) {
      alpha[b * T + t] += v[t];
    }
    if (residual) {
      residual[b] = larger(residual[b], error);
    }
  };
  if (B >= kEnoughMatrices || double(B * T) * nanoseconds <= kGrain) {
    share(B, double(T) * nanoseconds, [&](int64_t begin, int64_t end) {
      double *v = thread_scratch(0, T + scratch), *memory = v + T;
      for (int64_t b = begin; b < end; ++b) {
        if (clear(b)) {
          for (int64_t i = 0; i < T; ++i) {
            add(b, v, solve(b, i, v, memory));
          }
        }
      }
    });
    return;
  }
  std::vector<double> memory(static_cast<size_t>(B * T * (T + 1)));
  double *v = memory.data(), *errors = v + B * T * T; // [B, T, T], [B, T]
  for (int64_t b = 0; b < B; ++b) {
    if (!clear(b)) {
      continue;
    }
    share(T, nanoseconds, [&](int64_t begin, int64_t end) {
      double* own = thread_scratch(0, scratch);
      for (int64_t i = begin; i < end; ++i) {
        errors[b * T + i] = solve(b, i, v + (b * T + i) * T, own);
      }
    });
    for (int64_t i = 0; i < T; ++i) {
      add(b, v + (b * T + i) * T, errors[b * T + i]);
    }
  }
}

} // namespace

void mgda(const double* M, int64_t B, int64_t T, double* alpha, double* residual) {
  solve_all(M, B, T, mgda_scratch(T), alpha, residual, [&](const double* one, double* to, double* scratch) {
    return kernels().mgda(one, T, to, scratch);
  });
}

void dual_cone(
    const double* M,
    int64_t B,
    int64_t T,
    const double* weights,
    bool each,
    double* alpha,
    double* residual) {
  if (T >= kMinProjections) {
    const std::vector<double> even(static_cast<size_t>(T), 1.0 / double(T));
    const auto range = [&](int64_t begin, int64_t end) {
      std::vector<double> scratch(static_cast<size_t>(present_scratch(T) + T * T));
      for (int64_t b = begin; b < end; ++b) {
        const double* one = M + b * T * T;
        if (!all_finite(one, T * T)) {
          std::fill_n(alpha + b * T, T, kNan);
          residual[b] = kNan;
          continue;
        }
        residual[b] = for_present(
            Serial{},
            one,
            T,
            weights ? weights : even.data(),
            alpha + b * T,
            scratch.data(),
            [&](const double* N, int64_t n, const double* u, double* v, double*) {
              return projections(N, n, u, each, v);
            });
      }
    };
    if (B >= kEnoughMatrices) {
      parallel_for(0, B, 1, range);
    } else { // one at a time, on several threads
      range(0, B);
    }
    return;
  }
  const int64_t size = dual_cone_scratch(T);
  const double even = 1.0 / double(T);
  if (each) {
    sum_tasks(
        M, B, T, cost(T, 500, 3), T + size, alpha, residual, [&](int64_t b, int64_t i, double* v, double* scratch) {
          std::fill_n(scratch, T, 0.0);
          scratch[i] = weights ? weights[i] : even;
          return kernels().dual_cone(M + b * T * T, T, scratch, v, scratch + T);
        });
    return;
  }
  Buffer<double, 128> u(T);
  for (int64_t t = 0; t < T; ++t) {
    u[t] = weights ? weights[t] : even;
  }
  solve_all(M, B, T, size, alpha, residual, [&](const double* one, double* to, double* scratch) {
    return kernels().dual_cone(one, T, u.get(), to, scratch);
  });
}

void cagrad(const double* M, int64_t B, int64_t T, double c, double* alpha, double* residual) {
  solve_all(M, B, T, cagrad_scratch(T), alpha, residual, [&](const double* one, double* to, double* scratch) {
    return kernels().cagrad(one, T, c, to, scratch);
  });
}

void nash(const double* M, int64_t B, int64_t T, double power, double* alpha, double* residual) {
  solve_all(M, B, T, nash_scratch(T), alpha, residual, [&](const double* one, double* to, double* scratch) {
    return kernels().nash(one, T, power, to, scratch);
  });
}

void constant(const double* M, int64_t B, int64_t T, const double* weights, int64_t next, double* alpha) {
  for (int64_t b = 0; b < B; ++b) {
    double sum = 0.0; // |M_ij| is at most the larger of M_ii and M_jj
    for (int64_t t = 0; t < T; ++t) {
      sum += 0.0 * M[(b * T + t) * T + t];
    }
    const bool good = sum == 0.0;
    for (int64_t t = 0; t < T; ++t) {
      const double w = weights ? weights[b * next + t] : 1.0 / double(T);
      alpha[b * T + t] = !good ? kNan : is_present(M + b * T * T, T, t) ? w : 0.0;
    }
  }
}

void pcgrad(const double* M, int64_t B, int64_t T, uint64_t seed, bool per_task, double* alpha) {
  sum_tasks(
      M,
      B,
      T,
      cost(T, 200, 0.3),
      conflicts_scratch(T),
      alpha,
      nullptr,
      [&](int64_t b, int64_t i, double* v, double* scratch) {
        kernels().pcgrad_row(M + b * T * T, T, seed, b, i, per_task, v, scratch);
        return 0.0;
      });
}

void gradvac(const double* M, int64_t B, int64_t T, uint64_t seed, double beta, double* targets, double* alpha) {
  sum_tasks(
      M,
      B,
      T,
      cost(T, 200, 0.3),
      conflicts_scratch(T),
      alpha,
      nullptr,
      [&](int64_t b, int64_t i, double* v, double* scratch) {
        kernels().gradvac_row(M + b * T * T, T, seed, b, i, beta, targets + (b * T + i) * T, v, scratch);
        return 0.0;
      });
}

} // namespace fastmtl::cpu
