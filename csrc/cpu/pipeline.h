// gradients -> Gram -> weights -> combine on the CPU: how the work is split over threads, and how accurate each part
// is.
#pragma once

#include "../math/balance.h"
#include "kernels.h"

namespace fastmtl::cpu {

// M = G Gᵀ, all products and sums in float64; the same bits for any number of threads.
void gram(const Gradients& G, double* M); // M [T, T]

// G [B] matrices of the same T.
void gram_batch(const Gradients* G, int64_t B, double* M); // M [B, T, T]

void balance(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    const Policy& policy,
    double* alpha,       // [B, T]
    double* eigenvalues, // [B, T], descending
    int64_t* rank);      // [B]

// α = D^-1/2 C⁺ w and C C⁺ w, where M = D^1/2 C D^1/2 with the diagonal D; entries of w count as zero where D is, and
// so does w where C⁺ keeps no more of it than what is uncertain: rtol of its length, and rounding errors.
void unit_solve(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    const double* weights, // w [T], or null for ones
    double rtol,           // singular values at most rtol times the largest count as zero
    double* alpha,         // [B, T]
    double* cosines);      // [B, T]

void combine(const Gradients& G, const double* alpha); // alpha [T]

void combine_batch(const Gradients* G, int64_t B, const double* alpha); // alpha [B, T]

// GradDrop of B matrices of the same T and P, into their results; the same bits for any number of threads.
void sign_drop(
    const Gradients* G, // [B]
    int64_t B,
    uint64_t seed,
    const double* leak); // [T], or null where nothing leaks

// α and the rank alone: without the eigenvalues, which most callers never see, large T is several times faster.
void align_gram(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    const Policy& policy,
    double* alpha,  // [B, T]
    int64_t* rank); // [B]

// All three. Rows of float64 whose squares over- or underflow are rescaled for the Gram that decides α.
void align(
    const Gradients& G,
    const Policy& policy,
    double* M,      // [T, T]
    double* alpha,  // [T]
    int64_t* rank); // or null

void align_batch(const Gradients* G, int64_t B, const Policy& policy);

// Symmetric eigenproblems, T <= kMaxLanesTasks.
void eigh(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    double* eigenvalues,   // [B, T]
    double* eigenvectors); // [B, T, T]

constexpr int64_t kMaxLanesTasks = 32;

} // namespace fastmtl::cpu
