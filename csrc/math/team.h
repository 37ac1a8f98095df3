// Who computes: the solvers of this folder are written once, for a team that shares their loops. On the CPU the team is
// one thread, on a GPU a warp.
//
// Every decision has to be the same for all members: they take it from what `sum`, `largest` and `argmax` return, or
// from memory that was written before a barrier.
//
// Internal linkage, on purpose: this is compiled once per instruction set, and the linker must not pick one for all.
#pragma once

#include <cmath>
#include <cstdint>

#include "thresholds.h"

#ifdef __CUDACC__
#define FASTMTL_HOST_DEVICE __host__ __device__
#else
#define FASTMTL_HOST_DEVICE
#endif

// For what is long and called in several places: a GPU's compiler would write it out at each, and take minutes for it.
#ifdef __CUDACC__
#define FASTMTL_ONE_COPY __noinline__
#else
#define FASTMTL_ONE_COPY
#endif

// What `each` promises of its function.
#if defined(__clang__)
#define FASTMTL_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__) && !defined(__CUDA_ARCH__)
#define FASTMTL_INDEPENDENT _Pragma("GCC ivdep")
#else
#define FASTMTL_INDEPENDENT
#endif

namespace fastmtl {
namespace {

constexpr double kInfinity = __builtin_huge_val();

// The larger of two numbers; NaN, which every comparison would drop, is larger than any.
FASTMTL_HOST_DEVICE inline double larger(double a, double b) {
  return a >= b || a != a ? a : b;
}

struct Serial {
  // f(i) for i < n, independent of one another; begins with a barrier (what it overwrites may just have been read) and
  // ends with one.
  template <class F>
  FASTMTL_HOST_DEVICE void each(int64_t n, F f) const {
    FASTMTL_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      f(i);
    }
  }

  // Σ f(i), in a fixed order: eight partial sums, which are a vector.
  template <class F>
  FASTMTL_HOST_DEVICE double sum(int64_t n, F f) const {
    double total = 0.0;
    int64_t i = 0;
    if (n >= 8) {
      double part[8] = {};
      for (; i + 8 <= n; i += 8) {
        for (int64_t k = 0; k < 8; ++k) {
          part[k] += f(i + k);
        }
      }
      total = ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
    }
    for (; i < n; ++i) {
      total += f(i);
    }
    return total;
  }

  // The largest f(i), -infinity for n = 0; NaN where one is.
  template <class F>
  FASTMTL_HOST_DEVICE double largest(int64_t n, F f) const {
    double best = -kInfinity;
    for (int64_t i = 0; i < n; ++i) {
      best = larger(best, f(i));
    }
    return best;
  }

  // The first index of the largest f(i), -1 for n = 0 and where all are -infinity.
  template <class F>
  FASTMTL_HOST_DEVICE int64_t argmax(int64_t n, F f) const {
    double best = -kInfinity;
    int64_t at = -1;
    for (int64_t i = 0; i < n; ++i) {
      const double x = f(i);
      if (x > best) {
        best = x;
        at = i;
      }
    }
    return at;
  }

  // One member runs f, between barriers.
  template <class F>
  FASTMTL_HOST_DEVICE void once(F f) const {
    f();
  }
};

// Whether none of x [n] is infinite or NaN.
template <class Team>
FASTMTL_HOST_DEVICE bool all_finite(Team team, const double* x, int64_t n) {
  return team.sum(n, [=](int64_t i) { return x[i] * 0.0; }) == 0.0;
}

} // namespace
} // namespace fastmtl
