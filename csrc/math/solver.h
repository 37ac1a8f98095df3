// What a solver is. A solver turns one Gram matrix into task weights; it is a functor, written once for any team
// (team.h), and named in solvers.h. CPU and CUDA make an op of it.
#pragma once

#include <tuple>

#include "present.h"

namespace fastmtl {
namespace {

// Options of the op, in the order of its schema and of the functor's members; Value is the type of the member.

// A number within bounds.
struct Number {
  using Value = double;
  const char* name;
  const char* expected;
  bool (*holds)(double);
};

constexpr Number not_negative(const char* name) {
  return {name, "a finite number >= 0", [](double x) { return x >= 0.0 && x < kInfinity; }};
}

constexpr Number positive(const char* name) {
  return {name, "a finite number > 0", [](double x) { return x > 0.0 && x < kInfinity; }};
}

constexpr Number fraction(const char* name) {
  return {name, "a number in [0, 1]", [](double x) { return x >= 0.0 && x <= 1.0; }};
}

struct Flag {
  using Value = bool;
};

// A vector [T], or null.
struct PerTask {
  using Value = const double*;
  const char* name;
};

// The key of random numbers [1].
struct Seed {
  using Value = const int64_t*;
};

// Matrices [B, T, T] that the solver updates.
struct State {
  using Value = double*;
  const char* name;
};

// Which problem a call solves: matrix b of the batch, and of a method whose weights are a sum over tasks, task i.
struct Problem {
  int64_t b, i;
};

// What a solver has unless it says otherwise. It adds the name of its op, `kName`, and
//
//   template <class Team>
//   FASTMTL_HOST_DEVICE double operator()(
//       Team team,
//       const double* M, // [T, T], finite
//       int64_t T,
//       Problem problem,
//       double* v,            // [T], the weights
//       double* scratch) const; // [scratch(T)]
//
// which returns how far the weights are from optimal.
struct Solver {
  static constexpr std::tuple<> kOptions{};
  static constexpr bool kResidual = true;   // whether the op returns it, too
  static constexpr bool kManyTasks = false; // whether a warp of a GPU gets done with more than 64 in good time

  FASTMTL_HOST_DEVICE static constexpr int64_t scratch(int64_t) {
    return 0;
  }
  // 1, or T where the weights are Σ_i v_i.
  FASTMTL_HOST_DEVICE constexpr int64_t problems(int64_t) const {
    return 1;
  }
  // About what a problem takes a CPU: how many of them are worth another thread.
  double nanoseconds(int64_t T) const {
    return 5000.0 + 10.0 * double(T * T);
  }
};

} // namespace
} // namespace fastmtl
