// Gram, weights and recombination of one small matrix in one block, a whole batch in one launch: G is read once from
// memory and once more from the cache.
#pragma once

#include "balance.cuh"
#include "combine.cuh"
#include "gram.cuh"

namespace fastmtl::cuda {

// kRows: 8 (gram_stream's way), 16 or 32 (gram_groups').
template <int kRows>
struct Small {
  static constexpr int kThreads = kRows == 8 ? 128 : 256;
  static constexpr int kValues = kStreamValues<kRows>;

  // Bytes: the partial, M and α beside what the larger of the parts needs.
  static constexpr size_t shared(int64_t T) {
    const size_t balance = balance_shared(T, true);
    size_t gram = size_t(kThreads / 32) * (kValues + 1) * sizeof(double);
    if constexpr (kRows > 8) {
      gram = Groups<kRows, kThreads>::kShared;
    }
    return (gram > balance ? gram : balance) + size_t(kValues + 1 + T * T + T + 2) * sizeof(double);
  }
};

// Blocks of a multiprocessor that are worth fewer registers; where they would spill, one.
template <class scalar, int kRows>
constexpr int kSmallResident = kRows == 8                                                    ? 3
                               : sizeof(scalar) == 4 || (kRows == 16 && sizeof(scalar) == 2) ? 2
                                                                                             : 1;

template <class scalar, int kRows>
__global__ __launch_bounds__(Small<kRows>::kThreads, (kSmallResident<scalar, kRows>)) void align_small(
    const __grid_constant__ Source source,
    Policy policy,
    double* gram,        // [B, T, T], as are the rest: results where they are wanted, else null
    double* alpha_out,   // [B, T]
    int64_t* rank_out) { // [B]
  using Shape = Small<kRows>;
  FASTMTL_DYNAMIC_SHARED(shared);
  const int64_t b = blockIdx.x;
  const int T = int(source.tasks);
  double* values = reinterpret_cast<double*>(shared); // [kValues + 1]
  double* M = values + Shape::kValues + 1;            // [T, T]
  double* alpha = M + T * T;
  int64_t* rank = reinterpret_cast<int64_t*>(alpha + T);
  // Stages of 16-byte vectors begin on a multiple of 16.
  unsigned char* rest_of_shared = shared + (size_t(Shape::kValues + 1 + T * T + T + 1) + 1) / 2 * 2 * sizeof(double);
  const Run all(source.tiles, 0, 1);
  double half = 1.0, rest = 1.0;
  for (int pass = 0; pass < 2; ++pass) {
    if constexpr (kRows == 8) {
      stream_block<scalar, kRows, Shape::kThreads>(
          source, b, all, half, rest, reinterpret_cast<double*>(rest_of_shared), values);
    } else {
      groups_block<scalar, kRows, Shape::kThreads>(
          source, b, all, 0, half, rest, reinterpret_cast<double*>(rest_of_shared), values);
    }
    constexpr Layout layout{0, kRows, false};
    for (int k = int(threadIdx.x); k < Shape::kValues; k += Shape::kThreads) {
      int i, j;
      layout.place(k, i, j);
      if (i < T && j < T && layout.owns(i, j)) {
        M[i * T + j] = values[k];
        M[j * T + i] = values[k];
      }
    }
    __syncthreads();
    if (gram && pass == 0) {
      for (int k = int(threadIdx.x); k < T * T; k += Shape::kThreads) {
        gram[b * T * T + k] = M[k];
      }
    }
    const Judge judge = sizeof(scalar) == 8 && pass == 0 ? Judge::range : Judge::none;
    const bool again = balance_block(M, T, policy, judge, 0.0, rest_of_shared, nullptr, alpha, nullptr, rank);
    if (judge == Judge::none || !again) {
      break;
    }
    rescale(values[Shape::kValues], half, rest);
    if (half == 1.0) {
      break;
    }
    __syncthreads();
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < T && alpha_out; i += Shape::kThreads) {
    alpha_out[b * T + i] = alpha[i];
  }
  if (threadIdx.x == 0 && rank_out) {
    rank_out[b] = *rank;
  }
  if (source.table || source.out) {
    combine_run<scalar, Shape::kThreads>(source, b, all, alpha);
  }
}

} // namespace fastmtl::cuda
