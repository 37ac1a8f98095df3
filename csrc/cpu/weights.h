// Task weights and eigenproblems of Gram matrices on the CPU: which solver a matrix gets.
#pragma once

#include "../math/balance.h"
#include "kernels.h"

namespace fastmtl::cpu {

void balance(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    const Policy& policy,
    double* alpha,       // [B, T]
    double* eigenvalues, // [B, T], descending
    int64_t* rank);      // [B]

// α = D^-1/2 C⁺ w and C C⁺ w, where M = D^1/2 C D^1/2 with D its diagonal. Entries of w count as zero where D is zero,
// and so does all of w if C⁺ keeps no more of it than is uncertain: rtol of its length, and rounding errors.
void unit_solve(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    const double* weights, // w [T], or null for ones
    double rtol,           // singular values at most rtol times the largest count as zero
    double* alpha,         // [B, T]
    double* cosines);      // [B, T]

// α and the rank alone: without the eigenvalues, which most callers do not need, large T is several times faster.
void align_gram(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    const Policy& policy,
    double* alpha,  // [B, T]
    int64_t* rank); // [B]

// For one matrix, by the most accurate solver that its size allows.
void balance_one(
    const double* M, // [T, T]
    int64_t T,
    const Policy& policy,
    double* alpha,       // [T]
    double* eigenvalues, // [T], descending; null, which is cheaper, if not wanted
    int64_t* rank);      // [1], or null

// Whether the weights alone could be computed more cheaply, at full rank and with a lower bound of λ_min(M).
bool definite(const double* M, int64_t T, const Policy& policy, double* alpha, int64_t* rank, double* smallest);

// Whether a batch of this size is better solved with one matrix per SIMD lane.
bool worth_lanes(int64_t B, int64_t T);

// Up to `lanes` matrices at once, on this thread.
void balance_lanes(
    const double* M, // [count, T, T]
    int64_t count,
    int64_t T,
    const Policy& policy,
    double* alpha,       // [count, T]
    double* eigenvalues, // [count, T]
    int64_t* rank);      // [count]

double largest_diagonal(const double* M, int64_t T); // M [T, T]

// Symmetric eigenproblems, T <= kMaxLanesTasks.
void eigh(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    double* eigenvalues,   // [B, T]
    double* eigenvectors); // [B, T, T]

} // namespace fastmtl::cpu
