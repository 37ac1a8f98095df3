// The kernels of csrc/cuda as host functions: one place that knows their grids and shared memory. Torch-free.
#pragma once

#include <cstdint>

#include "../gradients.h"
#include "balance.cuh"
#include "source.cuh"

namespace fastmtl::cuda {

// How a Gram matrix is computed.
struct GramPlan {
  int rows;    // 2, 4 or 8: gram_stream; 16, 24, 32, 40, 48 or 64: gram_groups; 16, 32 or 64: gram_tiles in float32
  bool blocks; // float32
  int64_t diagonal; // 64 x 64 blocks on the diagonal of M (one up to T = 64), and above it
  int64_t pairs() const {
    return diagonal * (diagonal - 1) / 2;
  }
  Layout diagonal_layout() const {
    return {blocks ? rows / 4 : 0, rows, false};
  }
  static Layout pair_layout() {
    return {kGroupRows / 4, 2 * kGroupRows, true};
  }
};

// The tensors of a list by their types.
struct Sources {
  Source part[4];
  Dtype dtype[4];
  int count;
};

// Where the blocks of a Gram pass leave their sums.
struct Partials {
  double* diagonal; // [B, plan.diagonal, blocks, plan.diagonal_layout().values() + 1]
  double* pairs;    // [B, plan.pairs(), blocks, plan.pair_layout().values() + 1]
  int64_t blocks;   // of each matrix, over all sources
};

// What a Gram matrix is turned into.
struct Weights {
  double* alpha;       // [B, T]
  double* eigenvalues; // [B, T], descending; null where nobody wants them: they take Jacobi's many steps
  int64_t* rank;       // [B]
};

// The partial sums of a source of B matrices, in blocks [first, first + blocks) of each matrix's partials.
template <class scalar>
void launch_gram(
    const Source& source,
    int64_t B,
    const GramPlan& plan,
    Pass pass,
    int64_t first,
    int64_t blocks,
    const Partials& partials,
    cudaStream_t stream);

// y = G (Gᵀ z) of a source, in blocks [first, first + blocks) of each matrix's `all`.
template <class scalar>
void launch_probe(
    const Source& source,
    int64_t B,
    const float* z, // [B, T, kProbes]
    int64_t first,
    int64_t blocks,
    int64_t all,
    double* partial, // [B, all, T, kProbes]
    cudaStream_t stream);

template <class scalar>
void launch_combine(const Source& source, int64_t B, const double* alpha, cudaStream_t stream); // alpha [B, T]

template <class scalar>
void launch_sign_drop(
    const Source& source,
    int64_t B,
    const int64_t* seed, // [1]
    const double* leak,  // [T], or null
    cudaStream_t stream);

constexpr int64_t kMaxSmallTasks = 32;

// T <= kMaxSmallTasks; gram [B, T, T] and weights may be null, where only the combined gradient is wanted.
template <class scalar>
void launch_align_small(
    const Source& source,
    int64_t B,
    const Policy& policy,
    double* gram,
    const Weights& weights,
    cudaStream_t stream);

// table[i] = words[i], i < count: carried by kernel arguments.
void launch_upload(const uint64_t* words, int64_t count, uint64_t* table, cudaStream_t stream);

// M from its partials, and `largest` [B] of the float64 entries, unless null.
void launch_reduce(
    const GramPlan& plan,
    Pass pass,
    int64_t B,
    int64_t T,
    const Partials& partials,
    double* M, // [B, T, T]
    double* largest,
    cudaStream_t stream);

// The vectors z of `launch_probe` for the M from float32 sums, and what its y says of that M: the λ_min(C) above which
// the result is as accurate as promised, C the row-normalised M.
void launch_probe_vectors(const double* M, int64_t B, int64_t T, float* z, cudaStream_t stream);
void launch_probe_bound(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    const float* z, // [B, T, kProbes]
    int64_t blocks,
    double* partial, // [B, blocks, T, kProbes]; its first block is overwritten
    double* least,   // [B]
    cudaStream_t stream);

// Entries of M that a missing row has made NaN, unless the pass is skipped or scales its G.
void launch_mend(const Sources& G, Pass pass, int64_t T, double* M, cudaStream_t stream); // M [T, T]

// T <= kMaxJacobiTasks, as for `launch_eigh`; `scratch`, B balance_scratch(T) doubles, is null where shared memory has
// room for it.
void launch_balance(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    const Policy& policy,
    Judge judge,
    Pass pass,
    const double* bound, // [B]: what the judge goes by
    double* scratch,
    const Weights& weights,
    Verdict* verdict, // [B], or null
    double* gram,     // [B, T, T], or null
    cudaStream_t stream);

void launch_eigh(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    double* eigenvalues,  // [B, T]
    double* eigenvectors, // [B, T, T]
    double* scratch,      // [B, T, T], or null
    cudaStream_t stream);

} // namespace fastmtl::cuda
