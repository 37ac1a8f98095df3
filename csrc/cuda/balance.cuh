// Gram matrix -> task weights, T <= 128, one matrix a block: rank, scale and α, eigenvalues where they are wanted, and
// what a second pass over G has to mend. All decisions are taken on the device.
//
// Where M has full rank, α comes from a tridiagonal matrix (tridiagonal.cuh): of M itself where no eigenvalues are far
// below its largest, else of Lᵀ L for M = L Lᵀ (uneven.cuh). T steps that follow each other where Jacobi (eigh.cuh) has
// some 8 T. Jacobi solves what remains: M, and where its spectrum alone does not prove full rank, C. Reads T² 8 bytes
// and writes 2 T 8.
#pragma once

#include "../math/balance.h"
#include "eigh.cuh"
#include "gram.cuh"
#include "tridiagonal.cuh"
#include "uneven.cuh"

namespace fastmtl::cuda {

// What the first pass was, hence what may be wrong with M.
enum class Judge {
  none,
  blocks, // float32 sums: good enough where λ_min(C) is above a bound
  range   // float64 entries whose squares over- or underflow; the largest of them is the bound
};

// Doubles of what a block needs beside the matrix that it solves: another, and the terms of S^-1/2.
__host__ __device__ constexpr int64_t balance_scratch(int64_t T) {
  return T * (jacobi_stride(T) + 2 * kNodes);
}

// The small arrays of the tridiagonal way, or of Jacobi's: cosines, sines, and two spectra with their places.
__host__ __device__ constexpr int64_t balance_arrays(int64_t T) {
  return reduction_doubles(T); // more than 7 (T + 1)
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

// One matrix, the memory for its weights, and where they go.
struct Balancing {
  const double* M; // [T, T]
  int T;
  double down, up;     // powers of two: down brings the largest entry near one, and up back
  double largest;      // diagonal entry
  double smallest;     // likewise
  double least;        // of λ_min(C)
  double* A;           // [T, ld]
  double* arrays;      // balance_arrays
  double* other;       // balance_scratch
  double* alpha;       // [T]
  double* eigenvalues; // [T], descending, or null

  __device__ int ld() const {
    return jacobi_stride(T);
  }
  __device__ double* terms() const { // [T, 2, kNodes]
    return other + T * ld();
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

// What the weights of a matrix of full rank are found in.
struct Reduction {
  Reduced S, of_rows;  // of M, or of Lᵀ L, and of C
  double *w, *scratch; // [T], [2 T + 32]

  __device__ explicit Reduction(const Balancing& b)
      : S{b.arrays, b.T}, of_rows{b.arrays + Reduced::kArrays * b.T, b.T} {
    w = b.arrays + 2 * Reduced::kArrays * b.T;
    scratch = w + b.T;
  }
  // w becomes what M^-1/2 is applied to.
  __device__ void take_weights(const Policy& policy) const {
    for (int i = int(threadIdx.x); i < S.T; i += int(blockDim.x)) {
      w[i] = policy.weights ? policy.weights[i] : 1.0 / double(S.T);
    }
  }
};

// s of M, which S is similar to, all of whose eigenvalues lie between low > 0 and high.
__device__ inline double full_rank_scale(const Balancing& b, Scale scale, Reduced S, double low, double high) {
  if (scale == Scale::min) {
    return low;
  }
  if (scale == Scale::median) {
    return eigenvalue(S, S.T - 1 - S.T / 2, low, high);
  }
  double trace = 0.0;
  for (int i = 0; i < S.T; ++i) {
    trace += b.M[i * S.T + i] * b.down;
  }
  return trace / double(S.T);
}

// λ_min(C), less what its reduction may have added.
__device__ inline double least_of_rows(const Balancing& b, const Reduction& of, const Policy& policy, double& most) {
  scale_rows(b.M, b.T, policy.zero * sqrt(b.largest), b.other, b.ld(), of.scratch);
  reduce(b.other, b.ld(), of.of_rows, of.scratch, nullptr);
  most = above_all(of.of_rows);
  return eigenvalue(of.of_rows, 0, kLeastEigenvalue * most, most) - kReductionError * double(b.T) * most;
}

// α by M = L Lᵀ, where λ_min(C) is at least `least` > 0; or false where that is not accurate.
__device__ inline FASTMTL_ONE_COPY bool
weigh_uneven(const Balancing& b, const Reduction& of, const Policy& policy, double least) {
  const int T = b.T, ld = b.ld(), thread = int(threadIdx.x), threads = int(blockDim.x);
  double* rest = of.of_rows.memory; // C's are not needed any more
  const Factor F{b.A, ld, T, reinterpret_cast<int*>(rest), reinterpret_cast<int*>(rest + T), rest + 2 * T};
  double *lengths = rest + 3 * T, *y = rest + 4 * T;
  if (!(b.largest <= kSpectralMaxRatio * b.smallest)) {
    return false;
  }
  b.load();
  of.take_weights(policy);
  if (!factor(F)) {
    return false;
  }
  lr_step(F, of.w, b.other, ld, y);
  for (int i = thread; i < T; i += threads) {
    lengths[i] = sqrt(b.other[i * ld + i]);
  }
  __syncthreads();
  reduce(b.other, ld, of.S, of.scratch, y);
  if (!(growth(b.other, ld, of.S, lengths, of.scratch) <= kMaxGrowth)) {
    return false;
  }
  const double above = above_all(of.S), scaled = b.smallest * b.down;
  const double smallest = eigenvalue(of.S, 0, 0.5 * least * scaled, fmin(above, 2.0 * scaled));
  if (!(smallest > 0.0)) {
    return false;
  }
  const double s = full_rank_scale(b, policy.scale, of.S, smallest, above);
  inverse_root(b.other, ld, of.S, of.scratch, smallest, above, y, b.terms());
  if (thread < 32) {
    unscale(F, y, lengths);
  }
  __syncthreads();
  // αᵀ M α = s wᵀ w, or something has gone wrong.
  double form = 0.0, square = 0.0;
  const auto along = [&](int i, int c) { return b.M[i * T + c] * b.down * lengths[c]; };
  each_row(0, T, 0, T, along, [&](int i, int lane, double sum) {
    if (lane == 0) {
      y[i] = sum * lengths[i];
    }
  });
  __syncthreads();
  for (int i = 0; i < T; ++i) {
    form += y[i];
    square += of.w[i] * of.w[i];
  }
  for (int i = thread; i < T; i += threads) {
    b.alpha[i] = sqrt(s) * lengths[i];
  }
  return fabs(form - square) <= kFormError * square;
}

// α of a matrix of full rank, by a tridiagonal form; or false where the rank is not proved, or λ_min(C) may be no more
// than `least`, or that form is not accurate. T > 2.
__device__ inline FASTMTL_ONE_COPY bool weigh_reduced(const Balancing& b, const Policy& policy) {
  const int T = b.T, ld = b.ld(), thread = int(threadIdx.x), threads = int(blockDim.x);
  const Reduction of(b);
  const bool by_gram = policy.rank_rule == RankRule::gram;
  // Whether an error of eps λ_max / λ_min is none: M has it already, or G's rounding is more.
  const bool even = b.smallest * kEvenRows >= b.largest || policy.zero > kRounding / kLeastEigenvalue;
  double smallest = 0.0, above = 0.0;
  bool full = false, well_conditioned = false;
  if (even && b.smallest > kLeastEigenvalue * b.largest) {
    b.load();
    of.take_weights(policy);
    __syncthreads();
    reduce(b.A, ld, of.S, of.scratch, of.w);
    above = above_all(of.S);
    smallest = eigenvalue(of.S, 0, kLeastEigenvalue * above, above);
    const double certain = smallest - kReductionError * double(T) * above;
    full = by_gram ? certain > above * policy.rtol * policy.rtol
                   : proves_full_rank(certain, b.largest * b.down, T, policy.rtol);
    well_conditioned = certain > b.least * b.largest * b.down;
  }
  if (by_gram && !full) {
    return false;
  }
  if (!full || !well_conditioned) {
    double most;
    const double certain = least_of_rows(b, of, policy, most);
    full = full || certain > most * policy.rtol * policy.rtol;
    if (!full || !(certain > b.least)) {
      return false;
    }
    if (!(smallest > 0.0)) {
      return weigh_uneven(b, of, policy, certain);
    }
  }
  const double s = full_rank_scale(b, policy.scale, of.S, smallest, above);
  inverse_root(b.A, ld, of.S, of.scratch, smallest, above, of.w, b.terms());
  for (int i = thread; i < T; i += threads) {
    b.alpha[i] = sqrt(s) * of.w[i];
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
__device__ inline FASTMTL_ONE_COPY int64_t
weigh_by_vectors(const Balancing& b, const Policy& policy, bool judged, bool& well_conditioned) {
  const int T = b.T, ld = b.ld(), thread = int(threadIdx.x), threads = int(blockDim.x);
  const int room = jacobi_array(T);
  double *A = b.A, *V = b.other;
  double *cosine = b.arrays, *sine = cosine + room / 2;
  double* of_rows = sine + room / 2; // eigenvalues of C
  int* place = reinterpret_cast<int*>(of_rows + room);
  double* own = of_rows + 2 * room; // eigenvalues of M
  double* inverse = own + room;     // 1 / norms of the rows, then factors of the vectors
  int* own_place = reinterpret_cast<int*>(inverse + room);
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
  weigh(V, ld, own, own_place, R, T, policy, inverse, b.alpha);
  for (int i = thread; b.eigenvalues && i < T; i += threads) {
    b.eigenvalues[i] = own[i];
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
  Balancing b{M, T, 1.0, 1.0, largest, smallest, judge == Judge::blocks ? least : 0.0};
  power_of_two(largest, b.down, b.up);
  b.A = reinterpret_cast<double*>(shared);
  b.arrays = b.A + T * b.ld();
  b.other = scratch ? scratch : b.arrays + balance_arrays(T);
  b.alpha = alpha;
  b.eigenvalues = eigenvalues;
  int64_t R = T;
  bool well_conditioned = true;
  if (eigenvalues || T < 3 || !(smallest > 0.0) || !weigh_reduced(b, policy)) {
    R = weigh_by_vectors(b, policy, judge == Judge::blocks, well_conditioned);
  }
  if (threadIdx.x == 0) {
    *rank = R;
  }
  __syncthreads();
  if (judge == Judge::range) {
    return !(b.largest > kLeastSquare && b.largest < kMostSquare);
  }
  return judge == Judge::blocks && (b.smallest < kFloat32Square || !well_conditioned); // products may have underflowed
}

} // namespace fastmtl::cuda
