// gradients -> Gram -> weights -> combine on the CPU.
#pragma once

#include "../math/balance.h"
#include "kernels.h"

namespace fastmtl::cpu {

void combine(const Gradients& G, const double* alpha); // alpha [T]

void combine_batch(const Gradients* G, int64_t B, const double* alpha); // alpha [B, T]

// GradDrop of B matrices of the same T and P, into their results; the same bits for any number of threads.
void sign_drop(
    const Gradients* G, // [B]
    int64_t B,
    uint64_t seed,
    const double* leak); // [T], or null where nothing leaks

// All three. Rows of float64 whose squares over- or underflow are rescaled for the Gram that decides α.
void align(
    const Gradients& G,
    const Policy& policy,
    double* M,      // [T, T]
    double* alpha,  // [T]
    int64_t* rank); // or null

void align_batch(const Gradients* G, int64_t B, const Policy& policy);

} // namespace fastmtl::cpu
