// Gram matrices on the CPU, and how accurate each way to one is.
#pragma once

#include "kernels.h"

namespace fastmtl::cpu {

// M = G Gᵀ, all products and sums in float64; the same bits for any number of threads.
void gram(const Gradients& G, double* M); // M [T, T]

// G [B] matrices of the same T.
void gram_batch(const Gradients* G, int64_t B, double* M); // M [B, T, T]

// The Grams of neighbours in a batch, on this thread, in one walk over their columns: while one ends, the next is
// prefetched. A batch has one segment per matrix, and neighbouring matrices have neighbouring segments.
void gram_serial(const Gradients* G, int64_t count, double* M); // M [count, T, T]

// The Gram from float32 blocks, if its first chunks suggest that these are accurate enough; else false, and M is
// undefined. They are accurate enough if λ_min(C) is above `least`, C the row-normalised M.
bool gram_from_blocks(const Gradients& G, double* M, double* least); // M [T, T]

// Whether λ_min(C) > least.
bool well_conditioned(const double* M, int64_t T, double least); // M [T, T]

// Whether squares of float64 entries may have over- or underflowed.
bool out_of_range(const Gradients& G, const double* M); // M [T, T]

// Gram of G scaled by the power of two that brings its largest float64 entry near one; returns that factor.
double gram_rescaled(const Gradients& G, double* M); // M [T, T]

} // namespace fastmtl::cpu
