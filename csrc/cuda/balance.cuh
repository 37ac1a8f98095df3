// Gram matrix -> task weights, T <= 64, one matrix a block: rank, scale and α, eigenvalues where they are wanted, and
// what a second pass over G has to mend. All decisions are taken on the device.
//
// Where M has full rank, and no eigenvalues far below its largest, α comes from a tridiagonal matrix (tridiagonal.cuh):
// T steps that follow each other where Jacobi (eigh.cuh) has some 8 T. Else Jacobi solves M, and where its spectrum
// alone does not prove full rank, C. Reads T² 8 bytes and writes 2 T 8.
#pragma once

#include "../math/balance.h"
#include "eigh.cuh"
#include "gram.cuh"
#include "tridiagonal.cuh"

namespace fastmtl::cuda {

// What the first pass was, hence what may be wrong with M.
enum class Judge {
  none,
  blocks, // float32 sums: good enough where λ_min(C) is above a bound
  range   // float64 entries whose squares over- or underflow; the largest of them is the bound
};

// Doubles of what a block needs beside the matrix that it solves: eigenvectors, or C, or the terms of S^-1/2.
__host__ __device__ constexpr int64_t balance_scratch(int64_t T) {
  return T * (T < 2 * kNodes ? 2 * kNodes : jacobi_stride(T));
}

// The small arrays of Jacobi's way: cosines, sines, and two spectra with their places; or of the tridiagonal way.
__host__ __device__ constexpr int64_t balance_arrays(int64_t T) {
  return reduction_doubles(T) > 7 * kMaxJacobiTasks ? reduction_doubles(T) : 7 * kMaxJacobiTasks;
}

// Shared memory of `balance_block` in bytes; `scratch` where that lies there as well.
__host__ __device__ constexpr size_t balance_shared(int64_t T, bool scratch) {
  return size_t(T * jacobi_stride(T) + balance_arrays(T) + (scratch ? balance_scratch(T) : 0)) * sizeof(double);
}

// C = D^-1/2 M D^-1/2, rows of at most norm `floor` becoming zero. Begins and ends with a barrier.
__device__ inline void scale_rows(
    const double* M, // [T, T]
    int T,
    double floor,
    double* C, // [T, ld]
    int ld,
    double* inverse) { // [T]
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  __syncthreads();
  for (int i = thread; i < T; i += threads) {
    const double norm = sqrt(fmax(M[i * T + i], 0.0));
    inverse[i] = norm > floor ? 1.0 / norm : 0.0;
  }
  __syncthreads();
  for (int k = thread; k < T * T; k += threads) {
    C[k / T * ld + k % T] = M[k] * inverse[k / T] * inverse[k % T];
  }
  __syncthreads();
}

__device__ inline void fill_nan(int T, double* alpha, double* eigenvalues, int64_t* rank) {
  for (int i = int(threadIdx.x); i < T; i += int(blockDim.x)) {
    alpha[i] = 0.0 / 0.0;
    if (eigenvalues) {
      eigenvalues[i] = 0.0 / 0.0;
    }
  }
  if (threadIdx.x == 0) {
    *rank = 0;
  }
}

// One matrix, and the memory for its weights.
struct Balancing {
  const double* M; // [T, T]
  int T;
  double down, up; // powers of two: down brings the largest entry near one, and up back
  double largest;  // diagonal entry
  double least;    // of λ_min(C)
  double* A;       // [T, ld]
  double* arrays;  // balance_arrays
  double* other;   // balance_scratch

  __device__ int ld() const {
    return jacobi_stride(T);
  }
  // A = M, its largest entry near one. Begins and ends with a barrier.
  __device__ void load() const {
    __syncthreads();
    for (int k = int(threadIdx.x); k < T * T; k += int(blockDim.x)) {
      A[k / T * ld() + k % T] = M[k] * down;
    }
    __syncthreads();
  }
};

// α of a matrix of full rank, by its tridiagonal form; or false where the rank is not proved, λ_min is too far below
// λ_max, or λ_min(C) may be no more than `least`. T > 2.
__device__ inline bool weigh_reduced(const Balancing& b, const Policy& policy, double* alpha) { // [T]
  const int T = b.T, ld = b.ld(), thread = int(threadIdx.x), threads = int(blockDim.x);
  const Reduced S{b.arrays, T}, of_rows{b.arrays + Reduced::kArrays * T, T};
  double *w = b.arrays + 2 * Reduced::kArrays * T, *scratch = w + T;
  b.load();
  for (int i = thread; i < T; i += threads) {
    w[i] = policy.weights ? policy.weights[i] : 1.0 / double(T);
  }
  double trace = 0.0;
  for (int i = 0; i < T; ++i) {
    trace += b.A[i * ld + i];
  }
  __syncthreads();
  reduce(b.A, ld, S, scratch, w);
  const double above = above_all(S), smallest = eigenvalue(S, 0, above);
  const double certain = smallest - kReductionError * double(T) * above;
  const bool by_gram = policy.rank_rule == RankRule::gram;
  bool full = by_gram ? certain > above * policy.rtol * policy.rtol
                      : proves_full_rank(certain, b.largest * b.down, T, policy.rtol);
  if (!(smallest > 0.0) || (by_gram && !full)) {
    return false;
  }
  bool well_conditioned = certain > b.least * b.largest * b.down;
  if (!full || !well_conditioned) {
    scale_rows(b.M, T, policy.zero * sqrt(b.largest), b.other, ld, scratch);
    reduce(b.other, ld, of_rows, scratch, nullptr);
    const double most = above_all(of_rows), judged = eigenvalue(of_rows, 0, most);
    const double proved = judged - kReductionError * double(T) * most;
    full = full || proved > most * policy.rtol * policy.rtol;
    well_conditioned = proved > b.least;
    if (!full || !well_conditioned) {
      return false;
    }
  }
  const double s = policy.scale == Scale::min      ? smallest
                   : policy.scale == Scale::median ? eigenvalue(S, T - 1 - T / 2, above)
                                                   : trace / double(T);
  inverse_root(b.A, ld, S, scratch, smallest, above, w, b.other);
  for (int i = thread; i < T; i += threads) {
    alpha[i] = sqrt(s) * w[i];
  }
  return true;
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

// α by all eigenvectors, whatever the rank, which is returned. C is solved where the spectrum of M alone does not prove
// that all rows are kept, or (`judged`) that λ_min(C) is above `least`: well_conditioned.
__device__ inline FASTMTL_ONE_COPY int64_t weigh_by_vectors(
    const Balancing& b,
    const Policy& policy,
    bool judged,
    bool& well_conditioned,
    double* alpha,         // [T]
    double* eigenvalues) { // [T], descending, or null
  const int T = b.T, ld = b.ld(), thread = int(threadIdx.x), threads = int(blockDim.x);
  double *A = b.A, *V = b.other;
  double *cosine = b.arrays, *sine = cosine + kMaxJacobiTasks / 2;
  double* of_rows = sine + kMaxJacobiTasks / 2; // eigenvalues of C
  int* place = reinterpret_cast<int*>(of_rows + kMaxJacobiTasks);
  double* own = of_rows + 2 * kMaxJacobiTasks; // eigenvalues of M
  double* inverse = own + kMaxJacobiTasks;     // 1 / norms of the rows, then factors of the vectors
  int* own_place = reinterpret_cast<int*>(inverse + kMaxJacobiTasks);
  b.load();
  jacobi(A, ld, V, ld, T, cosine, sine);
  sort(A, ld, T, true, own, own_place);
  for (int i = thread; i < T; i += threads) {
    own[i] = fmax(own[i] * b.up, 0.0);
  }
  __syncthreads();
  well_conditioned = own[T - 1] > b.least * b.largest;
  const bool by_gram = policy.rank_rule == RankRule::gram;
  int64_t R = by_gram ? kept(own, T, policy.rtol) : T;
  const bool full = by_gram || proves_full_rank(own[T - 1], b.largest, T, policy.rtol);
  if (!full || (judged && !well_conditioned)) {
    scale_rows(b.M, T, policy.zero * sqrt(b.largest), A, ld, inverse);
    jacobi(A, ld, nullptr, 0, T, cosine, sine);
    sort(A, ld, T, true, of_rows, place);
    well_conditioned = of_rows[T - 1] > b.least;
    if (!full) {
      R = kept(of_rows, T, policy.rtol);
      while (R > 0 && !(own[R - 1] > 0.0)) { // of M's own, fewer may be positive
        --R;
      }
    }
  }
  weigh(V, ld, own, own_place, R, T, policy, inverse, alpha);
  for (int i = thread; eigenvalues && i < T; i += threads) {
    eigenvalues[i] = own[i];
  }
  return R;
}

// A function of its own, whose registers come and go. M [T, T] may lie in shared memory. `scratch`: balance_scratch(T)
// doubles of global memory where it is not to be in shared memory, else null. Eigenvalues may be null, where nobody
// wants them. Every thread returns the same verdict.
__device__ inline FASTMTL_ONE_COPY bool balance_block(
    const double* M,
    int T,
    const Policy& policy,
    Judge judge,
    double least, // of λ_min(C), where blocks are judged
    unsigned char* shared,
    double* scratch,
    double* alpha,       // [T]
    double* eigenvalues, // [T], descending
    int64_t* rank) {
  double poison = 0.0;
  for (int k = int(threadIdx.x); k < T * T; k += int(blockDim.x)) {
    poison += M[k] * 0.0;
  }
  if (__syncthreads_or(poison != 0.0)) {
    fill_nan(T, alpha, eigenvalues, rank);
    return true; // an exact, or rescaled, pass will tell
  }
  double largest = 0.0, smallest = M[0];
  for (int i = 0; i < T; ++i) {
    largest = fmax(largest, M[i * T + i]);
    smallest = fmin(smallest, M[i * T + i]);
  }
  const bool small = smallest < kFloat32Square; // products of float32 may have underflowed
  // Whether an error of eps λ_max / λ_min is none: M has it already, or G's rounding is more.
  const bool even = smallest * kEvenRows >= largest || policy.zero > kRounding / kLeastEigenvalue;
  const bool out_of_range = !(largest > kLeastSquare && largest < kMostSquare);
  Balancing b{M, T, 1.0, 1.0, largest, judge == Judge::blocks ? least : 0.0};
  power_of_two(largest, b.down, b.up);
  b.A = reinterpret_cast<double*>(shared);
  b.arrays = b.A + T * b.ld();
  b.other = scratch ? scratch : b.arrays + balance_arrays(T);
  int64_t R = T;
  bool well_conditioned = true;
  if (eigenvalues || T < 3 || !even || !(largest > 0.0) || !weigh_reduced(b, policy, alpha)) {
    R = weigh_by_vectors(b, policy, judge == Judge::blocks, well_conditioned, alpha, eigenvalues);
  }
  if (threadIdx.x == 0) {
    *rank = R;
  }
  __syncthreads();
  return judge == Judge::range ? out_of_range : judge == Judge::blocks && (small || !well_conditioned);
}

} // namespace fastmtl::cuda
