// The solvers of csrc/math on a GPU. Where a matrix is not finite, its weights and its residual are NaN.
#pragma once

#include "../math/solvers.h"
#include "pipeline.h"

namespace fastmtl::cuda {

constexpr int64_t kMaxSolverTasks = 64; // of one warp; the CPU has others for more

// `method` is the functor, as bytes: its type is one of each translation unit.
void launch_solver(
    size_t solver, // in Solvers
    const void* method,
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    double* alpha,    // [B, T]
    double* residual, // [B], the worst of a matrix; may be null
    const Context& context);

template <class Method>
void launch_solver(
    const Method& method,
    const double* M,
    int64_t B,
    int64_t T,
    double* alpha,
    double* residual,
    const Context& context) {
  launch_solver(kSolver<Method>, &method, M, B, T, alpha, residual, context);
}

} // namespace fastmtl::cuda
