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
    for (int i = thread; i < T; i += threads) {
      alpha[i] = eigenvalues[i] = 0.0 / 0.0;
    }
    if (thread == 0) {
      *rank = 0;
    }
    return true; // an exact, or rescaled, pass will tell
  }
  bool small = false;
  for (int i = 0; i < T; ++i) {
    const double d = A[i * ld + i];
    largest = fmax(largest, d);
    small = small || d < 1e-20; // products of float32 may have underflowed
  }
  const bool out_of_range = !(largest > 1e-200 && largest < 1e200);
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
  int64_t R = T;
  bool well_conditioned = own[T - 1] > least * largest;
  if (policy.rank_rule == RankRule::gram) {
    R = kept(own, T, policy.rtol);
  }
  const bool full = policy.rank_rule == RankRule::gram || proves_full_rank(own[T - 1], largest, T, policy.rtol);
  if (!full || (judge == Judge::blocks && !well_conditioned)) {
    const double floor = policy.zero * sqrt(largest);
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
    well_conditioned = judged[T - 1] > least;
    if (!full) {
      R = kept(judged, T, policy.rtol);
      while (R > 0 && !(own[R - 1] > 0.0)) { // of M's own, fewer may be positive
        --R;
      }
    }
  }
  // α = sqrt(s) Σ_{j < R} λ_j^-1/2 v_j (v_jᵀ w)
  const double s = R > 0 ? squared_scale(own, R, policy.scale) : 0.0;
  __syncthreads();
  for (int j = thread; j < R; j += threads) {
    double along = 0.0, square = 0.0;
    for (int i = 0; i < T; ++i) {
      const double x = V[i * ld + own_place[j]];
      along += x * (policy.weights ? policy.weights[i] : 1.0 / double(T));
      square += x * x;
    }
    inverse[j] = sqrt(s / own[j]) * along / square;
  }
  __syncthreads();
  for (int i = thread; i < T; i += threads) {
    double sum = 0.0;
    for (int j = 0; j < R; ++j) {
      sum += inverse[j] * V[i * ld + own_place[j]];
    }
    alpha[i] = sum;
    eigenvalues[i] = own[i] / factor / factor;
  }
  if (thread == 0) {
    *rank = R;
  }
  __syncthreads();
  return judge == Judge::range ? out_of_range : judge == Judge::blocks && (small || !well_conditioned);
}

// Two factors whose product brings the largest float64 entry near one, ones where it need not or cannot be.
FASTMTL_HOST_DEVICE inline void rescale(double largest, double& half, double& rest) {
  half = rest = 1.0;
  if (!(largest > 0.0) || !(largest * 0.0 == 0.0) || (largest < 1e100 && largest > 1e-100)) {
    return;
  }
  int exponent;
  frexp(largest, &exponent);
  half = ldexp(1.0, -exponent / 2);
  rest = ldexp(1.0, -exponent + exponent / 2);
}

} // namespace fastmtl::cuda
