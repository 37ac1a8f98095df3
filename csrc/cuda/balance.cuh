// Gram matrix -> task weights, T <= 64, one matrix a block: eigenvalues, rank, scale and α, and what a second pass over
// G has to mend. All decisions are taken on the device.
//
// Reads T² 8 bytes and writes 2 T 8; two eigenproblems where the spectrum of M alone does not prove full rank, else
// one.
#pragma once

#include "../math/balance.h"
#include "eigh.cuh"
#include "gram.cuh"

namespace fastmtl::cuda {

// What the first pass was, hence what may be wrong with M.
enum class Judge {
  none,
  blocks, // float32 sums: good enough where λ_min(C) is above a bound
  range   // float64 entries whose squares over- or underflow; the largest of them is the bound
};

// Shared memory of `balance_block` in bytes; `vectors` where the eigenvectors of M lie there as well.
__host__ __device__ constexpr size_t balance_shared(int64_t T, bool vectors) {
  return jacobi_shared(T, vectors) + 3 * kMaxJacobiTasks * sizeof(double);
}

// Eigenvalues of C = D^-1/2 M D^-1/2, rows of at most norm `floor` becoming zero: `judged` [T], descending.
__device__ inline void row_spectrum(
    const double* M, // [T, T]
    int T,
    double floor,
    double* A, // [T, ld]
    int ld,
    double* cosine,
    double* sine,
    double* inverse, // [T]
    double* judged,
    int* place) { // [T]
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  for (int i = thread; i < T; i += threads) {
    const double norm = sqrt(fmax(M[i * T + i], 0.0));
    inverse[i] = norm > floor ? 1.0 / norm : 0.0;
  }
  __syncthreads();
  for (int k = thread; k < T * T; k += threads) {
    A[k / T * ld + k % T] = M[k] * inverse[k / T] * inverse[k % T];
  }
  jacobi(A, ld, nullptr, 0, T, cosine, sine);
  sort(A, ld, T, true, judged, place);
}

__device__ inline void fill_nan(int T, double* alpha, double* eigenvalues, int64_t* rank) {
  for (int i = int(threadIdx.x); i < T; i += int(blockDim.x)) {
    alpha[i] = eigenvalues[i] = 0.0 / 0.0;
  }
  if (threadIdx.x == 0) {
    *rank = 0;
  }
}

// α = sqrt(s) Σ_{j < R} λ_j^-1/2 v_j (v_jᵀ w), v_j being column place[j] of V.
__device__ inline void weigh(
    const double* V, // [T, ld]
    int ld,
    const double* eigenvalues, // [T]
    const int* place,          // [T]
    int64_t R,
    int T,
    const Policy& policy,
    double* factors, // [T]
    double* alpha) { // [T]
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const double s = R > 0 ? squared_scale(eigenvalues, R, policy.scale) : 0.0;
  __syncthreads();
  for (int j = thread; j < R; j += threads) {
    double along = 0.0, square = 0.0;
    for (int i = 0; i < T; ++i) {
      const double x = V[i * ld + place[j]];
      along += x * (policy.weights ? policy.weights[i] : 1.0 / double(T));
      square += x * x;
    }
    factors[j] = sqrt(s / eigenvalues[j]) * along / square;
  }
  __syncthreads();
  for (int i = thread; i < T; i += threads) {
    double sum = 0.0;
    for (int j = 0; j < R; ++j) {
      sum += factors[j] * V[i * ld + place[j]];
    }
    alpha[i] = sum;
  }
}

// M [T, T] may lie in shared memory. V: [T, ld] of global memory where it is not to be in shared memory, else null.
// eigenvalues are divided by factor². Every thread returns the same verdict.
__device__ inline bool balance_block(
    const double* M,
    int T,
    const Policy& policy,
    Judge judge,
    double least, // of λ_min(C), where blocks are judged
    double factor,
    unsigned char* shared,
    double* V,
    double* alpha,       // [T]
    double* eigenvalues, // [T], descending
    int64_t* rank) {
  const int ld = jacobi_stride(T), thread = int(threadIdx.x), threads = int(blockDim.x);
  double* A = reinterpret_cast<double*>(shared); // [T, ld]
  double* cosine = A + T * ld;
  double* sine = cosine + kMaxJacobiTasks / 2;
  double* judged = sine + kMaxJacobiTasks / 2; // eigenvalues of C
  int* place = reinterpret_cast<int*>(judged + kMaxJacobiTasks);
  double* own = judged + 2 * kMaxJacobiTasks; // eigenvalues of M
  double* inverse = own + kMaxJacobiTasks;    // 1 / norms of the rows, then factors of the vectors
  int* own_place = reinterpret_cast<int*>(inverse + kMaxJacobiTasks);
  if (!V) {
    V = inverse + 2 * kMaxJacobiTasks;
  }
  double poison = 0.0, largest = 0.0;
  for (int k = thread; k < T * T; k += threads) {
    const double x = M[k];
    A[k / T * ld + k % T] = x;
    poison += x * 0.0;
  }
  if (__syncthreads_or(poison != 0.0)) {
    fill_nan(T, alpha, eigenvalues, rank);
    return true; // an exact, or rescaled, pass will tell
  }
  bool small = false;
  for (int i = 0; i < T; ++i) {
    const double d = A[i * ld + i];
    largest = fmax(largest, d);
    small = small || d < kFloat32Square; // products of float32 may have underflowed
  }
  const bool out_of_range = !(largest > kLeastSquare && largest < kMostSquare);
  double down, up;
  power_of_two(largest, down, up);
  __syncthreads();
  for (int k = thread; k < T * T; k += threads) {
    A[k / T * ld + k % T] *= down;
  }
  jacobi(A, ld, V, ld, T, cosine, sine);
  sort(A, ld, T, true, own, own_place);
  for (int i = thread; i < T; i += threads) {
    own[i] = fmax(own[i] * up, 0.0);
  }
  __syncthreads();
  bool well_conditioned = own[T - 1] > least * largest;
  const bool by_gram = policy.rank_rule == RankRule::gram;
  int64_t R = by_gram ? kept(own, T, policy.rtol) : T;
  const bool full = by_gram || proves_full_rank(own[T - 1], largest, T, policy.rtol);
  if (!full || (judge == Judge::blocks && !well_conditioned)) {
    row_spectrum(M, T, policy.zero * sqrt(largest), A, ld, cosine, sine, inverse, judged, place);
    well_conditioned = judged[T - 1] > least;
    if (!full) {
      R = kept(judged, T, policy.rtol);
      while (R > 0 && !(own[R - 1] > 0.0)) { // of M's own, fewer may be positive
        --R;
      }
    }
  }
  weigh(V, ld, own, own_place, R, T, policy, inverse, alpha);
  for (int i = thread; i < T; i += threads) {
    eigenvalues[i] = own[i] / factor / factor;
  }
  if (thread == 0) {
    *rank = R;
  }
  __syncthreads();
  return judge == Judge::range ? out_of_range : judge == Judge::blocks && (small || !well_conditioned);
}

} // namespace fastmtl::cuda
