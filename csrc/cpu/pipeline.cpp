#include "pipeline.h"

#include <vector>

#include "../common.h"
#include "gram.h"
#include "share.h"
#include "weights.h"

namespace fastmtl::cpu {

namespace {

void combine_serial(const Gradients& G, const double* alpha) {
  kernels().combine(G, alpha, 0, columns(G), false);
}

} // namespace

void combine(const Gradients& G, const double* alpha) {
  share_columns(G, [&](int64_t begin, int64_t end, bool stream) { kernels().combine(G, alpha, begin, end, stream); });
}

void combine_batch(const Gradients* G, int64_t B, const double* alpha) {
  const int64_t T = B ? G[0].tasks : 0;
  if (B && share_out(G, B)) {
    parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        combine_serial(G[b], alpha + b * T);
      }
    });
    return;
  }
  share_matrices(B, B && is_small(G[0]), [&](int64_t b) { combine(G[b], alpha + b * T); });
}

void sign_drop(const Gradients* G, int64_t B, uint64_t seed, const double* leak) {
  const int64_t P = B ? columns(G[0]) : 0;
  if (B && share_out(G, B)) {
    parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        kernels().sign_drop(G[b], seed, b * P, leak, 0, P, false);
      }
    });
    return;
  }
  share_matrices(B, B && is_small(G[0]), [&](int64_t b) {
    share_columns(G[b], [&](int64_t begin, int64_t end, bool stream) {
      kernels().sign_drop(G[b], seed, b * P, leak, begin, end, stream);
    });
  });
}

void align(const Gradients& G, const Policy& policy, double* M, double* alpha, int64_t* rank) {
  const int64_t T = G.tasks;
  double smallest = 0.0, least = 0.0;
  if (gram_from_blocks(G, M, &least)) {
    // λ_min(C) >= λ_min(M) / max D: computing the weights often shows that the Gram is good enough for them. But a
    // tridiagonalisation is too expensive to be done in vain.
    const bool solved = definite(M, T, policy, alpha, rank, &smallest);
    if (smallest > least * largest_diagonal(M, T) || well_conditioned(M, T, least)) {
      if (!solved) {
        balance_one(M, T, policy, alpha, nullptr, rank);
      }
      combine(G, alpha);
      return;
    }
  }
  gram(G, M);
  const double* judged = M;
  std::vector<double> scaled;
  if (out_of_range(G, M)) {
    scaled.resize(size_t(T * T));
    judged = gram_rescaled(G, scaled.data()) == 1.0 ? M : scaled.data();
  }
  if (!definite(judged, T, policy, alpha, rank, &smallest)) {
    balance_one(judged, T, policy, alpha, nullptr, rank);
  }
  combine(G, alpha);
}

void align_batch(const Gradients* G, int64_t B, const Policy& policy) {
  if (B == 0) {
    return;
  }
  const int64_t T = G[0].tasks;
  if (!share_out(G, B)) {
    share_matrices(B, is_small(G[0]), [&](int64_t b) {
      Buffer<double, 512> memory(T * T + T);
      align(G[b], policy, memory.get(), memory.get() + T * T, nullptr);
    });
    return;
  }
  // Gram, eigenproblem and recombination of a group of entries while they are in the cache: G is read from memory once.
  const int64_t group = kernels().lanes;
  parallel_for(0, (B + group - 1) / group, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> memory(static_cast<size_t>(group * (T * T + 2 * T)));
    std::vector<int64_t> rank(static_cast<size_t>(group));
    double *M = memory.data(), *alpha = M + group * T * T, *eigenvalues = alpha + group * T;
    for (int64_t b = begin * group; b < std::min(B, end * group); b += group) {
      const int64_t count = std::min(group, B - b);
      gram_serial(G + b, count, M);
      if (worth_lanes(B, T)) {
        balance_lanes(M, count, T, policy, alpha, eigenvalues, rank.data());
      }
      for (int64_t i = 0; i < count; ++i) {
        if (out_of_range(G[b + i], M + i * T * T)) {
          gram_rescaled(G[b + i], M + i * T * T);
          balance_one(M + i * T * T, T, policy, alpha + i * T, nullptr, nullptr);
        } else if (!worth_lanes(B, T)) {
          balance_one(M + i * T * T, T, policy, alpha + i * T, nullptr, nullptr);
        }
        combine_serial(G[b + i], alpha + i * T);
      }
    }
  });
}

} // namespace fastmtl::cpu
