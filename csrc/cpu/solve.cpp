#include "solve.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace fastmtl::cpu {

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// The least work for a thread, in nanoseconds: if other processes are busy, waiting for a second thread takes
// milliseconds.
constexpr double kGrain = 2e5;
// From this many matrices on, each is the work of one thread, and tasks need no memory of their own.
constexpr int64_t kEnoughMatrices = 16;

// Calls f(begin, end) for ranges of `count` parts, given the nanoseconds that each takes.
template <class F>
void share(int64_t count, double nanoseconds, F&& f) {
  const int64_t grain = std::max<int64_t>(1, int64_t(kGrain / nanoseconds));
  if (count <= grain) {
    f(0, count);
  } else {
    parallel_for(0, count, grain, f);
  }
}

// Problem i of matrix b into v, and its residual.
double run(const Solve& solve, const double* M, int64_t T, int64_t b, int64_t i, double* v, double* scratch) {
  return kernels().solvers[solve.solver](solve.method, M + b * T * T, T, b, i, v, scratch);
}

// Starts the sums of matrix b; false if it is not finite.
bool clear(const double* M, int64_t T, int64_t b, double* alpha, double* residual) {
  const bool good = all_finite(Serial{}, M + b * T * T, T * T);
  std::fill_n(alpha + b * T, T, good ? 0.0 : kNan);
  if (residual) {
    residual[b] = good ? 0.0 : kNan;
  }
  return good;
}

void add(int64_t T, int64_t b, const double* v, double error, double* alpha, double* residual) {
  for (int64_t t = 0; t < T; ++t) {
    alpha[b * T + t] += v[t];
  }
  if (residual) {
    residual[b] = larger(residual[b], error);
  }
}

// One problem per matrix.
void solve_each(const Solve& solve, const double* M, int64_t B, int64_t T, double* alpha, double* residual) {
  share(B, solve.nanoseconds, [&](int64_t begin, int64_t end) {
    double* memory = thread_scratch(0, solve.scratch);
    for (int64_t b = begin; b < end; ++b) {
      if (clear(M, T, b, alpha, residual)) {
        const double error = run(solve, M, T, b, 0, alpha + b * T, memory);
        if (residual) {
          residual[b] = error;
        }
      }
    }
  });
}

// alpha = Σ_i v of every matrix.
void sum_tasks(const Solve& solve, const double* M, int64_t B, int64_t T, double* alpha, double* residual) {
  if (B >= kEnoughMatrices || double(B * T) * solve.nanoseconds <= kGrain) {
    share(B, double(T) * solve.nanoseconds, [&](int64_t begin, int64_t end) {
      double *v = thread_scratch(0, T + solve.scratch), *memory = v + T;
      for (int64_t b = begin; b < end; ++b) {
        if (clear(M, T, b, alpha, residual)) {
          for (int64_t i = 0; i < T; ++i) {
            add(T, b, v, run(solve, M, T, b, i, v, memory), alpha, residual);
          }
        }
      }
    });
    return;
  }
  std::vector<double> memory(static_cast<size_t>(B * T * (T + 1)));
  double *v = memory.data(), *errors = v + B * T * T; // [B, T, T], [B, T]
  for (int64_t b = 0; b < B; ++b) {
    if (!clear(M, T, b, alpha, residual)) {
      continue;
    }
    share(T, solve.nanoseconds, [&](int64_t begin, int64_t end) {
      double* own = thread_scratch(0, solve.scratch);
      for (int64_t i = begin; i < end; ++i) {
        errors[b * T + i] = run(solve, M, T, b, i, v + (b * T + i) * T, own);
      }
    });
    for (int64_t i = 0; i < T; ++i) {
      add(T, b, v + (b * T + i) * T, errors[b * T + i], alpha, residual);
    }
  }
}

} // namespace

void solve(const Solve& solve, const double* M, int64_t B, int64_t T, double* alpha, double* residual) {
  (solve.problems > 1 ? sum_tasks : solve_each)(solve, M, B, T, alpha, residual);
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

} // namespace fastmtl::cpu
