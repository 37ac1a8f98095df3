// Task weights from Gram matrices on a GPU, T <= kMaxJacobiTasks: the solvers of csrc/math, a warp each. Torch-free.
//
// As csrc/cpu/weights.h, but that seed and weights lie on the device. Nothing here waits for it.
#pragma once

#include "pipeline.h"

namespace fastmtl::cuda {

void mgda(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    double* alpha,    // [B, T]
    double* residual, // [B]
    const Context& context);

// v for u = weights, or with `each` the sum of those for u = weights_i e_i.
void dual_cone(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    const double* weights, // [T], or null for 1/T
    bool each,
    double* alpha,    // [B, T]
    double* residual, // [B], the worst
    const Context& context);

void cagrad(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    double c,
    double* alpha,    // [B, T]
    double* residual, // [B]
    const Context& context);

void nash(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    double power,
    double* alpha,    // [B, T]
    double* residual, // [B]
    const Context& context);

void pcgrad(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    const int64_t* seed, // [1]
    bool per_task,
    double* alpha, // [B, T]
    const Context& context);

void gradvac(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    const int64_t* seed, // [1]
    double beta,
    double* targets, // [B, T, T], updated where M is finite
    double* alpha,   // [B, T]
    const Context& context);

} // namespace fastmtl::cuda
