// Task weights from Gram matrices on the CPU: how matrices and tasks are shared out over threads. The same bits for any
// number of them. Where a matrix is not finite, its weights and its residual are NaN.
#pragma once

#include <cstdint>

namespace fastmtl::cpu {

void mgda(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    double* alpha,     // [B, T]
    double* residual); // [B]

// v for u = weights, or with `each` the sum of those for u = weights_i e_i.
void dual_cone(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    const double* weights, // [T], or null for 1/T
    bool each,
    double* alpha,     // [B, T]
    double* residual); // [B], the worst

void cagrad(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    double c,
    double* alpha,     // [B, T]
    double* residual); // [B]

void nash(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    double power,
    double* alpha,     // [B, T]
    double* residual); // [B]

// The weights as they are (1 / T each for null), 0 for absent tasks; NaN where the diagonal of M is not finite.
void constant(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    const double* weights, // w [T] of matrix b at b * next
    int64_t next,
    double* alpha); // [B, T]

void pcgrad(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    uint64_t seed,
    bool per_task,
    double* alpha); // [B, T]

void gradvac(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    uint64_t seed,
    double beta,
    double* targets, // [B, T, T], updated
    double* alpha);  // [B, T]

} // namespace fastmtl::cpu
