// The Gram matrix from the partial sums of the blocks that read G.
#include "gram.cuh"
#include "kernels.h"

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

} // namespace

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

} // namespace fastmtl::cuda
