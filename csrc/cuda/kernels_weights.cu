// The kernels that do not depend on the gradients' type, and their launches.
#include "kernels.h"
#include "mend.cuh"

namespace fastmtl::cuda {

namespace {

constexpr int kReduceThreads = 1024, kReduceValues = 32;

// M[i, j] = M[j, i] = Σ_c partial[c, k] in order of c: 32 threads sum every 32nd partial each, then one of them the 32.
// Reads each partial once, coalesced over k. There are few values of few tasks: what counts is how many reads wait at
// the same time.
__global__ __launch_bounds__(kReduceThreads) void gram_reduce(
    Layout layout,
    Pass pass,
    int64_t T,
    int64_t blocks,
    int64_t next_partial,
    int64_t next_group,
    const double* partial, // [B, groups, blocks, values + 1]
    double* M,             // [B, T, T]
    double* largest) {     // [B], or null
  const int values = layout.values();
  const int64_t columns = (values + kReduceValues) / kReduceValues; // blocks of a matrix; one value more is the largest
  const int64_t b = blockIdx.x / columns;
  if (pass.skip(b)) {
    return;
  }
  FASTMTL_DYNAMIC_SHARED(shared);
  double* sums = reinterpret_cast<double*>(shared); // [kParts, kReduceValues]
  constexpr int kParts = kReduceThreads / kReduceValues;
  const int x = int(threadIdx.x) % kReduceValues, y = int(threadIdx.x) / kReduceValues;
  const int k = int(blockIdx.x % columns) * kReduceValues + x;
  const double* from = partial + b * next_partial + blockIdx.y * next_group;
  double sum = 0.0;
  if (k < values) {
#pragma unroll 8
    for (int64_t c = y; c < blocks; c += kParts) {
      sum += from[c * (values + 1) + k];
    }
  } else if (k == values) {
#pragma unroll 8
    for (int64_t c = y; c < blocks; c += kParts) {
      sum = fmax(sum, from[c * (values + 1) + k]);
    }
  }
  sums[y * kReduceValues + x] = sum;
  __syncthreads();
  if (y != 0) {
    return;
  }
  for (int p = 1; p < kParts; ++p) {
    sum = k == values ? fmax(sum, sums[p * kReduceValues + x]) : sum + sums[p * kReduceValues + x];
  }
  if (k == values && largest && blockIdx.y == 0 && !layout.pair) {
    largest[b] = sum;
  }
  if (k >= values) {
    return;
  }
  int i, j;
  layout.place(k, i, j);
  int64_t row = i, column = j;
  if (layout.pair) {
    int64_t p = blockIdx.y, q = 1;
    for (; p >= q; ++q) {
      p -= q;
    }
    row += p * kGroupRows;
    column += q * kGroupRows;
  } else {
    row += blockIdx.y * kGroupRows;
    column += blockIdx.y * kGroupRows;
  }
  if (row < T && column < T && layout.owns(i, j)) {
    M[(b * T + row) * T + column] = sum;
    M[(b * T + column) * T + row] = sum;
  }
}

// A thread an entry.
__global__ __launch_bounds__(kReduceThreads) void probe_vectors(
    const double* M, // [B, T, T]
    int64_t B,
    int64_t T,
    float* z) { // [B, T, kProbes]
  const int64_t k = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (k < B * T * kProbes) {
    const int64_t row = k / kProbes, t = row % T;
    z[k] = probe_entry_over_root3(t, k % kProbes) * probe_scale(M[row * T + t]);
  }
}

// A block a matrix, a thread an entry of M z - y: ‖D^-1/2 (M z - y)‖ of each probe, the largest of which, times √3,
// what the scale of z misses of 1 / norm and the safety of so many probes, over what is promised, is the bound. NaN
// where M or y is not finite. Reads M once for every probe, and the partials once.
__global__ __launch_bounds__(kReduceThreads) void probe_bound(
    const double* M, // [B, T, T]
    int64_t T,
    const float* z, // [B, T, kProbes]
    int64_t blocks,
    double* partial, // [B, blocks, T, kProbes]: the squares go to the first block's
    double* least) { // [B]
  const int64_t b = blockIdx.x, slot = T * kProbes;
  M += b * T * T;
  z += b * slot;
  partial += b * blocks * slot;
  for (int64_t k = threadIdx.x; k < slot; k += kReduceThreads) {
    const int64_t i = k / kProbes, p = k % kProbes;
    double y = partial[k], along = 0.0;
    for (int64_t c = 1; c < blocks; ++c) {
      y += partial[c * slot + k];
    }
    for (int64_t j = 0; j < T; ++j) {
      along += M[j * T + i] * double(z[j * kProbes + p]);
    }
    partial[k] = (along - y) * (along - y) / M[i * T + i];
  }
  __syncthreads();
  if (threadIdx.x != 0) {
    return;
  }
  double largest = 0.0, correction = 0.0;
  for (int64_t t = 0; t < T; ++t) {
    correction = fmax(correction, 1.0 / (sqrt(M[t * T + t]) * double(probe_scale(M[t * T + t]))));
  }
  for (int p = 0; p < kProbes; ++p) {
    double squares = 0.0;
    for (int64_t i = 0; i < T; ++i) {
      squares += partial[i * kProbes + p];
    }
    largest = squares <= largest ? largest : squares; // NaN stays
  }
  least[b] = probe_safety(kProbes) * sqrt(3.0 * largest) * correction / promised_error(T);
}

// Eigenvalues (ascending) and vectors (columns); the lower triangle is read. NaN where an entry is not finite.
__global__ __launch_bounds__(kMaxJacobiThreads, 2) void eigh(
    const double* M, // [B, T, T]
    int T,
    bool vectors_shared,  // else they are rotated where they lie
    double* eigenvalues,  // [B, T]
    double* eigenvectors, // [B, T, T]
    double* scratch) {    // [B, T, T] where the vectors do not fit shared memory
  FASTMTL_DYNAMIC_SHARED(shared);
  const int64_t b = blockIdx.x;
  const int ld = jacobi_stride(T);
  double* A = reinterpret_cast<double*>(shared); // [T, ld]
  double* cosine = A + T * ld;
  double* sine = cosine + kMaxJacobiTasks / 2;
  double* sorted = sine + kMaxJacobiTasks / 2;
  int* place = reinterpret_cast<int*>(sorted + kMaxJacobiTasks);
  double* V = vectors_shared ? sorted + 2 * kMaxJacobiTasks : scratch + b * T * T;
  const int next_row = vectors_shared ? ld : T;
  M += b * T * T;
  double poison = 0.0, largest = 0.0;
  for (int k = int(threadIdx.x); k < T * T; k += int(blockDim.x)) {
    const int i = k / T, j = k % T;
    if (j <= i) {
      const double x = M[k];
      A[j * ld + i] = x;
      poison += x * 0.0;
    }
  }
  const bool finite = !__syncthreads_or(poison != 0.0);
  if (finite) {
    for (int i = 0; i < T; ++i) { // by all threads alike, which is cheaper than telling each other
      for (int j = int(threadIdx.x) % 32; j < T; j += 32) {
        largest = j >= i ? fmax(largest, fabs(A[i * ld + j])) : largest;
      }
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      largest = fmax(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    }
    double down, up;
    power_of_two(largest, down, up);
    __syncthreads();
    for (int k = int(threadIdx.x); k < T * T; k += int(blockDim.x)) {
      if (k % T >= k / T) {
        A[k / T * ld + k % T] *= down;
      }
    }
    jacobi(A, ld, V, next_row, T, cosine, sine);
    sort(A, ld, T, false, sorted, place);
    for (int k = int(threadIdx.x); k < T * T; k += int(blockDim.x)) {
      eigenvectors[b * T * T + k] = V[k / T * next_row + place[k % T]];
    }
    for (int i = int(threadIdx.x); i < T; i += int(blockDim.x)) {
      eigenvalues[b * T + i] = sorted[i] * up;
    }
    return;
  }
  const double nan = poison != 0.0 ? poison : 0.0 / 0.0;
  for (int k = int(threadIdx.x); k < T * T; k += int(blockDim.x)) {
    eigenvectors[b * T * T + k] = nan;
  }
  for (int i = int(threadIdx.x); i < T; i += int(blockDim.x)) {
    eigenvalues[b * T + i] = nan;
  }
}

__global__ __launch_bounds__(kMaxJacobiThreads, 2) void balance(
    const double* M, // [B, T, T]
    int T,
    Policy policy,
    Judge judge,
    Pass pass,
    const double* bound, // [B]: what the judge goes by
    bool vectors_shared,
    double* scratch,     // [B, T, ld] where the vectors do not fit shared memory
    double* alpha,       // [B, T]
    double* eigenvalues, // [B, T]
    int64_t* rank,       // [B]
    Verdict* verdict,    // [B], or null
    double* gram) {      // [B, T, T]: where the second pass leaves an M that needed no scaling, or null
  const int64_t b = blockIdx.x;
  if (pass.skip(b)) {
    return;
  }
  FASTMTL_DYNAMIC_SHARED(shared);
  M += b * T * T;
  const bool again = balance_block(
      M,
      T,
      policy,
      judge,
      judge == Judge::blocks ? bound[b] : 0.0,
      pass.verdict ? pass.verdict[b].factor() : 1.0,
      shared,
      vectors_shared ? nullptr : scratch + b * T * jacobi_stride(T),
      alpha + b * T,
      eigenvalues + b * T,
      rank + b);
  if (gram && !pass.rescales(b)) {
    for (int k = int(threadIdx.x); k < T * T; k += int(blockDim.x)) {
      gram[b * T * T + k] = M[k];
    }
  }
  if (verdict && threadIdx.x == 0) {
    Verdict v{again, 1.0, 1.0};
    if (judge == Judge::range && again) {
      rescale(bound[b], v.half, v.rest);
      v.again = v.half != 1.0;
    }
    verdict[b] = v;
  }
}

} // namespace

void launch_upload(const uint64_t* words, int64_t count, uint64_t* table, cudaStream_t stream) {
  while (count > 0) {
    const int part = int(count < kManyWords ? count : kManyWords);
    if (part <= kFewWords) {
      Words<kFewWords> few{};
      memcpy(few.word, words, size_t(part) * 8);
      FASTMTL_LAUNCH(upload<kFewWords>, dim3(1), dim3(256), 0, stream, few, part, table);
    } else {
      Words<kManyWords> many;
      memcpy(many.word, words, size_t(part) * 8);
      FASTMTL_LAUNCH(upload<kManyWords>, dim3(4), dim3(256), 0, stream, many, part, table);
    }
    words += part;
    table += part;
    count -= part;
  }
}

void launch_reduce(
    const GramPlan& plan,
    Pass pass,
    int64_t B,
    int64_t T,
    const Partials& partials,
    double* M,
    double* largest,
    cudaStream_t stream) {
  const auto launch = [&](Layout layout, int64_t groups, const double* partial) {
    const int64_t slot = layout.values() + 1, columns = (slot + kReduceValues - 1) / kReduceValues;
    FASTMTL_LAUNCH(
        gram_reduce,
        dim3(unsigned(B * columns), unsigned(groups)),
        dim3(kReduceThreads),
        kReduceThreads * sizeof(double),
        stream,
        layout,
        pass,
        T,
        partials.blocks,
        groups * partials.blocks * slot,
        partials.blocks * slot,
        partial,
        M,
        largest);
  };
  launch(plan.diagonal_layout(), plan.diagonal, partials.diagonal);
  if (plan.pairs() > 0) {
    launch(plan.pair_layout(), plan.pairs(), partials.pairs);
  }
}

void launch_probe_vectors(const double* M, int64_t B, int64_t T, float* z, cudaStream_t stream) {
  const int64_t blocks = (B * T * kProbes + kReduceThreads - 1) / kReduceThreads;
  FASTMTL_LAUNCH(probe_vectors, dim3(unsigned(blocks)), dim3(kReduceThreads), 0, stream, M, B, T, z);
}

void launch_probe_bound(
    const double* M,
    int64_t B,
    int64_t T,
    const float* z,
    int64_t blocks,
    double* partial,
    double* least,
    cudaStream_t stream) {
  FASTMTL_LAUNCH(probe_bound, dim3(unsigned(B)), dim3(kReduceThreads), 0, stream, M, T, z, blocks, partial, least);
}

void launch_mend(const Sources& G, Pass pass, int64_t T, double* M, cudaStream_t stream) {
  FASTMTL_LAUNCH(
      mend, dim3(unsigned(T)), dim3(kMendThreads), kMendThreads / 32 * sizeof(double), stream, G, pass, T, M);
}

void launch_balance(
    const double* M,
    int64_t B,
    int64_t T,
    const Policy& policy,
    Judge judge,
    Pass pass,
    const double* bound,
    double* scratch,
    const Weights& weights,
    Verdict* verdict,
    double* gram,
    cudaStream_t stream) {
  FASTMTL_LAUNCH(
      balance,
      dim3(unsigned(B)),
      dim3(unsigned(jacobi_threads(T))),
      balance_shared(T, !scratch),
      stream,
      M,
      int(T),
      policy,
      judge,
      pass,
      bound,
      !scratch,
      scratch,
      weights.alpha,
      weights.eigenvalues,
      weights.rank,
      verdict,
      gram);
}

void launch_eigh(
    const double* M,
    int64_t B,
    int64_t T,
    double* eigenvalues,
    double* eigenvectors,
    double* scratch,
    cudaStream_t stream) {
  FASTMTL_LAUNCH(
      eigh,
      dim3(unsigned(B)),
      dim3(unsigned(jacobi_threads(T))),
      jacobi_shared(T, !scratch),
      stream,
      M,
      int(T),
      !scratch,
      eigenvalues,
      eigenvectors,
      scratch);
}

} // namespace fastmtl::cuda
