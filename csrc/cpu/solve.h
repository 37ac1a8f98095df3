// The solvers of csrc/math on the CPU: how matrices and tasks are distributed over threads, with the same bits for any
// number of them. If a matrix is not finite, its weights and its residual are NaN.
#pragma once

#include <cstdint>

#include "../math/solvers.h"
#include "projections.h"

namespace fastmtl::cpu {

// A solver with its options, without its type, for functions of another translation unit.
struct Solve {
  size_t solver; // in Solvers
  const void* method;
  int64_t problems, scratch;
  double nanoseconds; // of a problem
};

void solve(
    const Solve& solve,
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    double* alpha,     // [B, T]
    double* residual); // [B], the worst of a matrix; may be null

template <class Method>
void solve(const Method& method, const double* M, int64_t B, int64_t T, double* alpha, double* residual) {
  if constexpr (std::is_same_v<Method, DualCone>) {
    if (T >= kMinProjections) {
      return projections(M, B, T, method.weights, method.each, alpha, residual);
    }
  }
  const Solve one{kSolver<Method>, &method, method.problems(T), Method::scratch(T), method.nanoseconds(T)};
  solve(one, M, B, T, alpha, residual);
}

// The weights as they are (1 / T each for null), 0 for absent tasks; NaN where the diagonal of M is not finite.
void constant(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    const double* weights, // w [T] of matrix b at b * next
    int64_t next,
    double* alpha); // [B, T]

} // namespace fastmtl::cpu
